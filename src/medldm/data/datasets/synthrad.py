"""SynthRAD2023 and 2025 (Thummerer et al., Med Phys 2023): registered MR and CT of each patient, with a mask
of the body.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from medldm.data.case import Case, stem_of
from medldm.data.raw.layouts import (
    VOLUME_SUFFIXES,
    check_modality_choice,
    existing_volume,
    files_below,
    folder_pairs,
    map_folder,
    modality_cases,
    read_split_table,
    require_cases,
    require_root,
    stated_split_of,
)
from medldm.errors import InputError

MODALITIES = ("mr", "ct", "cbct")


def index(root: str | Path, modalities: Sequence[str] = ("mr",), label_dir: str | None = None) -> list[Case]:
    """Lists cases of the published `[Task1/][pelvis/]<patient>/{mr,ct,mask}.{nii.gz,mha}`, with class maps
    `<patient>_ct_label.nii.gz` in `label_dir` (default: `labels/` below the root), or of Med-LSDM's
    `{train,test}/mr/<patient>_<n>.nii.gz` with `ct/` and `label/`.

    Each modality of a patient is a case; patients without any of `modalities` (those of the other task) are
    left out. Cases name the mask of the body, which `preprocess.mask_out` reads.
    """
    root = require_root(root, "Task1/pelvis/1PA001/mr.nii.gz and so on, or train/mr/ and test/mr/")
    check_modality_choice(modalities, MODALITIES)
    cases = windows(root, modalities) or published(root, modalities, map_folder(root, label_dir))
    return require_cases(cases, root, "Task1/pelvis/<patient>/{mr,ct,mask}.nii.gz")


def windows(root: Path, modalities: Sequence[str]) -> list[Case]:
    def patient(stem: str) -> str:
        return re.sub(r"_\d+$", "", stem)

    found = {key: folder_pairs(root, key, "label", patient) for key in modalities}
    return [
        Case(f"{case.id}_{key}" if len(modalities) > 1 else case.id, case.subject, case.paths,
             {**case.attributes, "label": key})
        for key, cases in found.items()
        for case in cases
    ]  # fmt: skip


def published(root: Path, modalities: Sequence[str], maps: Path | None) -> list[Case]:
    stated, cases = read_split_table(root), []
    volumes = files_below(root, VOLUME_SUFFIXES)
    for folder in sorted({p.parent for p in volumes if stem_of(p) in modalities}):
        name = folder.name
        images = {key: existing_volume(folder / f"{key}.nii.gz") for key in modalities}
        missing = [key for key, path in images.items() if path is None]
        if missing:
            raise InputError(f"{folder}: has no {missing[0]}.nii.gz; add it, or remove the folder")
        wanted = maps / f"{name}_ct_label.nii.gz" if maps else None
        label = existing_volume(wanted) if wanted else None
        if wanted and label is None:
            raise InputError(f"{wanted}: missing, though {folder} is there; add it, or remove the folder")
        others = {"mask": label, "body": existing_volume(folder / "mask.nii.gz")}
        cases += modality_cases(name, images, others, **stated_split_of(name, stated, root / "splits.csv"))
    return cases
