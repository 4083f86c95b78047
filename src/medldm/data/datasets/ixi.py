"""IXI (brain-development.org): T1, T2 and PD of healthy brains.

The published contrasts are not registered to each other: as published they serve single volumes; translation
needs the co-registered folder `output/<subject>/{T1w,T2,PD}.nii.gz` that ALDM reads.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from medldm.data.case import Case
from medldm.data.layouts import (
    check_modalities,
    existing,
    modality_cases,
    nifti_files,
    read_table,
    require_cases,
    require_root,
    split_of,
    stated_split,
)

MODALITIES = {"t1": "T1w", "t2": "T2", "pd": "PD"}  # name in `output/`
NAME = re.compile(r"(IXI\d{3}-[^-]+-\d+)-(T1|T2|PD)\.nii(\.gz)?$")  # IXI002-Guys-0828-T1.nii.gz


def index(root: str | Path, modalities: Sequence[str] = tuple(MODALITIES)) -> list[Case]:
    """Cases of `output/<subject>/{T1w,T2,PD}.nii.gz` with `train_subs.csv` and `test_subs.csv` (subject_id),
    or of the published `IXI-T1/IXI002-Guys-0828-T1.nii.gz`, `IXI-T2/`, `IXI-PD/`.

    In the first layout the foreground of PD decides the crop, as ALDM has it; in the second that of each
    image, because the contrasts are not registered.
    """
    root = require_root(root, "output/ (co-registered), or IXI-T1/, IXI-T2/ and IXI-PD/")
    check_modalities(modalities, MODALITIES)
    cases = registered(root, modalities) if (root / "output").is_dir() else published(root, modalities)
    return require_cases(cases, root, "output/<subject>/{T1w,T2,PD}.nii.gz, or IXI-T1/IXI*-T1.nii.gz")


def registered(root: Path, modalities: Sequence[str]) -> list[Case]:
    stated, cases = table_split(root), []
    for folder in sorted(p for p in (root / "output").iterdir() if p.is_dir()):
        if stated and folder.name not in stated:
            continue  # the tables name the complete subjects
        images = {key: existing(folder / f"{MODALITIES[key]}.nii.gz") for key in modalities}
        images = {key: path for key, path in images.items() if path is not None}
        split = split_of(folder.name, stated, root)
        found = modality_cases(folder.name, images, {}, **split)
        box = images.get("pd") or next(iter(images.values()), None)
        cases += [Case(c.id, c.subject, {**c.paths, "foreground": str(box)}, c.attributes) for c in found]
    return cases


def table_split(root: Path) -> dict[str, str]:
    """`{train,val,test}_subs.csv`, else `splits.csv`."""
    stated = {}
    for split in ("train", "val", "test"):
        for folder in (root, root / "output"):
            path = folder / f"{split}_subs.csv"
            if path.is_file():
                stated |= {row["subject_id"]: split for row in read_table(path, "subject_id")}
    return stated or stated_split(root)


def published(root: Path, modalities: Sequence[str]) -> list[Case]:
    stated, cases = stated_split(root), []
    for key in modalities:
        for path in nifti_files(root / f"IXI-{key.upper()}"):
            match = NAME.match(path.name)
            if match:
                subject = match.group(1)
                split = split_of(subject, stated, root / "splits.csv")
                cases.append(Case(f"{subject}_{key}", subject, {"image": str(path)}, {"label": key, **split}))
    return sorted(cases, key=lambda case: case.subject)
