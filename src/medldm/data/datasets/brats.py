"""BraTS 2018 to 2025 and the Medical Segmentation Decathlon's Task01: co-registered, skull-stripped T1, T1ce,
T2, FLAIR and a tumour map, whose classes are numbered as in the releases until 2021: 1 necrosis, 2 oedema, 4
enhancing tumour.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from medldm.data.case import Case, stem_of
from medldm.data.raw.image import NIFTI_SUFFIXES, has_suffix
from medldm.data.raw.layouts import (
    check_modality_choice,
    existing_volume,
    files_below,
    files_in,
    modality_cases,
    read_split_table,
    require_cases,
    require_root,
    stated_split_of,
)
from medldm.data.raw.tables import Note
from medldm.errors import InputError

log = logging.getLogger(__name__)
MODALITIES = ("t1", "t1ce", "t2", "flair")
# How releases name each modality: until 2021, and since 2023.
RELEASE_NAMES = {
    "t1": "t1", "t1ce": "t1ce", "t2": "t2", "flair": "flair", "seg": "seg",
    "t1n": "t1", "t1c": "t1ce", "t2w": "t2", "t2f": "flair",
}  # fmt: skip
FILE = re.compile(
    rf"(?P<name>.+)[-_](?P<key>{'|'.join(sorted(RELEASE_NAMES, key=len, reverse=True))})", re.IGNORECASE
)
VISIT = re.compile(r"(?P<patient>BraTS-[A-Za-z]+-\d+)-(?P<visit>\d+)")  # BraTS-GLI-00000-001, since 2023
SINCE_2023 = {
    0: 0,
    1: 1,
    2: 2,
    3: 4,
    4: 5,
}  # there 3 is enhancing tumour, and 4, added in 2024, a resection cavity
TASK01 = {0: 0, 1: 2, 2: 1, 3: 4}  # oedema, not enhancing, enhancing
TASK01_CHANNELS = {"flair": 0, "t1": 1, "t1ce": 2, "t2": 3}


def index(root: str | Path, modalities: Sequence[str] = MODALITIES, *, note: Note = log.info) -> list[Case]:
    """Lists cases of `<subject>_{t1,t1ce,t2,flair,seg}.nii[.gz]`, of
    `BraTS-GLI-00000-000-{t1n,t1c,t2w,t2f,seg}`, at any depth below the root (also with each file in a folder
    of its own name, as copies on Kaggle have it), or of the 4D `imagesTr/BRATS_001.nii.gz` with `labelsTr/`.

    Each modality of a subject is a case; missing modalities are left out. All are cropped to the foreground
    of the first of `modalities` that the subject has. Visits of a patient (the last number of names since
    2023) are one subject. A split that `splits.csv` (id, split) states is kept.
    """
    root = require_root(root, "BraTS2021_00000/BraTS2021_00000_t1.nii.gz and so on")
    check_modality_choice(modalities, MODALITIES)
    cases = task01(root, modalities, note) or published(root, modalities, note)
    return require_cases(cases, root, "<subject>/<subject>_{t1,t1ce,t2,flair}.nii.gz")


def published(root: Path, modalities: Sequence[str], note: Note) -> list[Case]:
    """The cases of scans whose modalities are files of their own."""
    stated, cases, files = read_split_table(root), [], files_below(root, NIFTI_SUFFIXES)
    scans = scans_of(files)
    for (folder, name), found in sorted(scans.items()):
        images = {key: found[key] for key in modalities if key in found}
        if not images:
            continue
        visit = VISIT.fullmatch(name)
        seg = found.get("seg") or misnamed_map(folder, files, scans, note)
        subject, details = (visit["patient"], {"visit": visit["visit"]}) if visit else (name, {})
        details |= stated_split_of(name, stated, root / "splits.csv", subject)
        relabel = SINCE_2023 if visit and seg else None
        cases += modality_cases(subject, images, {"mask": seg}, name=name, relabel=relabel, **details)
    if any(case.relabel for case in cases):
        note(
            "class maps named as since BraTS 2023: their label 3 (enhancing tumour) is read as 4, and 4 "
            "(resection cavity, 2024) as 5, as the releases before number them"
        )
    return cases


def scans_of(files: Sequence[Path]) -> dict[tuple[Path, str], dict[str, Path]]:
    """{(folder, name): {modality or seg: file}}. Where there are `.nii` and `.nii.gz` of one name, the
    latter.
    """
    scans: dict[tuple[Path, str], dict[str, Path]] = defaultdict(dict)
    for path in files:
        folder, stem = scan_place(path)
        match = FILE.fullmatch(stem)
        if match:
            own = scans[folder, match["name"]]
            if folder != path.parent:
                own[RELEASE_NAMES[match["key"].lower()]] = only_file_of(path)
                continue
            key = RELEASE_NAMES[match["key"].lower()]
            own[key] = existing_volume(path.with_name(f"{stem_of(own.get(key, path))}.nii.gz")) or path
    return scans


def scan_place(path: Path) -> tuple[Path, str]:
    """The folder of a scan and its name. Copies on Kaggle hold each scan in a folder that is named like the
    file, such as BraTS20_Training_001_flair.nii/00000057_brain_flair.nii: then the name is the folder's.
    """
    above = path.parent
    return (above.parent, stem_of(above)) if has_suffix(above, NIFTI_SUFFIXES) else (above, stem_of(path))


def only_file_of(path: Path) -> Path:
    """The only file of a folder that is named like a file. InputError where the folder holds others."""
    beside = files_in(path.parent, NIFTI_SUFFIXES)
    if len(beside) > 1:
        raise InputError(f"{path.parent}: holds {len(beside)} files and is named like one; keep one of them")
    return path


def misnamed_map(folder: Path, files: Sequence[Path], scans: Mapping, note: Note) -> Path | None:
    """The one file of a subject's folder that is named like a map but not like its subject, such as
    W39_1998.09.19_Segm.nii of BraTS20_Training_355. None where there are several or none.
    """
    used = {path for found in scans.values() for path in found.values()}
    odd = [p for p in files if scan_place(p)[0] == folder and p not in used and "seg" in p.name.lower()]
    is_alone = sum(parent == folder for parent, _ in scans) == 1
    if len(odd) != 1 or not is_alone:
        return None
    note(f"{odd[0].name} is read as the map of {folder.name}, which has no map of the usual name")
    return odd[0]


def task01(root: Path, modalities: Sequence[str], note: Note) -> list[Case]:
    """Cases of the Decathlon's Task01, whose volumes hold the four modalities as channels."""
    cases, stated = [], read_split_table(root)
    for path in files_in(root / "imagesTr", NIFTI_SUFFIXES):
        name = stem_of(path)
        if not name.startswith("BRATS_"):
            continue
        images = {key: f"{path}::{TASK01_CHANNELS[key]}" for key in modalities}
        label = existing_volume(root / "labelsTr" / f"{name}.nii.gz")
        split = stated_split_of(name, stated, root / "splits.csv")
        cases += modality_cases(name, images, {"mask": label}, relabel=TASK01 if label else None, **split)
    if cases:
        note(
            "Decathlon Task01: its labels 1, 2, 3 are read as 2 (oedema), 1 (necrosis), 4 (enhancing tumour)"
        )
    return cases
