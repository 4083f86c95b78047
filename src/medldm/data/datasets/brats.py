"""BraTS 2020 and 2021: co-registered, skull-stripped T1, T1ce, T2, FLAIR; tumour map 0, 1, 2, 4."""

from collections.abc import Sequence
from pathlib import Path

from medldm.data.case import Case
from medldm.data.layouts import (
    check_modalities,
    existing,
    modality_cases,
    require_cases,
    require_root,
    split_of,
    stated_split,
)

MODALITIES = ("t1", "t1ce", "t2", "flair")


def index(root: str | Path, modalities: Sequence[str] = MODALITIES) -> list[Case]:
    """Cases of `<subject>/<subject>_{t1,t1ce,t2,flair,seg}.nii[.gz]`, at any depth below the root (the 2020
    release nests twice, 2018 has HGG/ and LGG/).

    One case a modality; one that is missing is left out, a subject without any is no subject. The crop of
    all modalities is that of the first of `modalities` that is there. `splits.csv` (id, split) is kept.
    """
    root = require_root(root, "BraTS2021_00000/BraTS2021_00000_t1.nii.gz and so on")
    check_modalities(modalities, MODALITIES)
    stated, cases = stated_split(root), []
    for folder in sorted({path.parent for path in root.rglob("*_*.nii*")}):
        name = folder.name
        images = {key: existing(folder / f"{name}_{key}.nii.gz") for key in modalities}
        images = {key: path for key, path in images.items() if path is not None}
        if images:
            split = split_of(name, stated, root / "splits.csv")
            seg = existing(folder / f"{name}_seg.nii.gz")
            cases += modality_cases(name, images, {"mask": seg}, **split)
    return require_cases(cases, root, "<subject>/<subject>_{t1,t1ce,t2,flair}.nii.gz")
