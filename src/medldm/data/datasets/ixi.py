"""IXI (brain-development.org): T1, T2 and PD of healthy brains.

The published contrasts are not registered to each other, so that they can be used as single volumes only.
Translation needs the co-registered folder `output/<subject>/{T1w,T2,PD}.nii.gz` that ALDM reads.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

from medldm.data.case import Case
from medldm.data.raw.layouts import (
    check_modality_choice,
    existing_volume,
    modality_cases,
    read_split_table,
    read_table,
    require_cases,
    require_root,
    stated_split_of,
    volume_files,
)
from medldm.data.raw.tables import Note
from medldm.files import is_hidden

log = logging.getLogger(__name__)
MODALITIES = {"t1": "T1w", "t2": "T2", "pd": "PD"}  # name in `output/`
NAME = re.compile(r"(IXI\d{3}-[^-]+-\d+)-(T1|T2|PD)\.nii(\.gz)?$")  # IXI002-Guys-0828-T1.nii.gz


def index(
    root: str | Path, modalities: Sequence[str] = tuple(MODALITIES), *, note: Note = log.info
) -> list[Case]:
    """Lists cases of `output/<subject>/{T1w,T2,PD}.nii.gz` with `train_subs.csv` and `test_subs.csv`
    (subject_id), or of the published `IXI-T1/IXI002-Guys-0828-T1.nii.gz`, `IXI-T2/`, `IXI-PD/`.

    In the first layout all contrasts are cropped to the foreground of PD, as in ALDM; in the second each
    image is cropped to its own, because the contrasts are not registered.
    """
    root = require_root(root, "output/ (co-registered), or IXI-T1/, IXI-T2/ and IXI-PD/")
    check_modality_choice(modalities, MODALITIES)
    is_registered = (root / "output").is_dir()
    cases = registered(root, modalities, note) if is_registered else published(root, modalities)
    return require_cases(cases, root, "output/<subject>/{T1w,T2,PD}.nii.gz, or IXI-T1/IXI*-T1.nii.gz")


def registered(root: Path, modalities: Sequence[str], note: Note) -> list[Case]:
    """The cases of the co-registered folder `output/`."""
    stated, cases, unlisted = table_split(root), [], []
    for folder in sorted(p for p in (root / "output").iterdir() if p.is_dir() and not is_hidden(p.name)):
        if stated and folder.name not in stated:  # the tables name the subjects that have all contrasts
            unlisted.append(folder.name)
            continue
        images = {key: existing_volume(folder / f"{MODALITIES[key]}.nii.gz") for key in modalities}
        images = {key: path for key, path in images.items() if path is not None}
        split = stated_split_of(folder.name, stated, root)
        found = modality_cases(folder.name, images, {}, **split)
        box = images.get("pd") or next(iter(images.values()), None)
        cases += [Case(c.id, c.subject, {**c.paths, "foreground": str(box)}, c.attributes) for c in found]
    absent = sorted(stated.keys() - {case.subject for case in cases})
    for names, what in (
        (unlisted, "folders are in no table"),
        (absent, "listed subjects have no images here"),
    ):
        if names:
            note(f"{len(names)} {what} and are left out ({', '.join(names[:3])}...)")
    return cases


def table_split(root: Path) -> dict[str, str]:
    """{subject: train | val | test} of `{train,val,test}_subs.csv`, or else of `splits.csv`."""
    stated = {}
    for split in ("train", "val", "test"):
        for folder in (root, root / "output"):
            path = folder / f"{split}_subs.csv"
            if path.is_file():
                stated |= {row["subject_id"]: split for row in read_table(path, "subject_id")}
    return stated or read_split_table(root)


def published(root: Path, modalities: Sequence[str]) -> list[Case]:
    stated, cases = read_split_table(root), []
    for key in modalities:
        for path in volume_files(root / f"IXI-{key.upper()}"):
            match = NAME.match(path.name)
            if match:
                subject = match.group(1)
                split = stated_split_of(subject, stated, root / "splits.csv")
                cases.append(Case(f"{subject}_{key}", subject, {"image": str(path)}, {"label": key, **split}))
    return sorted(cases, key=lambda case: case.subject)
