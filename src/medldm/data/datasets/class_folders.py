"""Pictures in one folder for each class, with or without train/, val/ and test/ above them, as Kermany et al.
(2018) and many others publish theirs.
"""

import re
from pathlib import Path

from medldm.data.case import Case, stem_of
from medldm.data.raw.layouts import pictures_below, require_root, split_folders
from medldm.errors import InputError
from medldm.files import is_hidden

# How published chest X-rays name their patients: NORMAL and PNEUMONIA of Kermany et al., and NIH.
PATIENTS = (
    re.compile(r"^((?:NORMAL2-)?IM-\d+)-\d+"),
    re.compile(r"^(person\d+)_"),
    re.compile(r"^(\d{8})_\d{3}$"),
)


def index(root: str | Path) -> list[Case]:
    """Lists cases with the name of the class folder as `label` and, below train/, val/ or test/, that name as
    `split`.

    The subject is the patient where the file name tells it, otherwise each picture is a subject of its own.
    Patients of two split folders are different ones, since Kermany et al. count anew in each. InputError
    where there are no class folders, or an empty one.
    """
    root = require_root(root, "one folder a class")
    splits = split_folders(root)
    if not splits:
        return class_folder_cases(root, None)
    return [case for name, split in splits.items() for case in class_folder_cases(root / name, split)]


def class_folder_cases(root: Path, split: str | None) -> list[Case]:
    """The cases of all class folders below a root."""
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
    if not folders:
        raise InputError(
            f"{root}: holds no class folders; put the pictures into folders named by their class"
        )
    return [case for folder in folders for case in class_cases(folder, split)]


def class_cases(folder: Path, split: str | None) -> list[Case]:
    """The cases of one class folder."""
    files = pictures_below(folder)
    if not files:
        raise InputError(
            f"{folder}: holds no PNG or JPEG pictures and no DICOM radiographs; fill the class folder, or "
            "remove it"
        )
    prefix = f"{split}-" if split else ""
    attributes = {"label": folder.name} | ({"split": split} if split else {})
    cases = []
    for file in files:
        name = "_".join((*file.relative_to(folder).parts[:-1], stem_of(file)))
        identity, subject = f"{folder.name}_{name}", patient_of(name, folder.name)
        cases.append(Case(prefix + identity, prefix + subject, {"image": str(file)}, attributes))
    return cases


def patient_of(name: str, label: str) -> str:
    matches = (pattern.match(name) for pattern in PATIENTS)
    return next((match[1] for match in matches if match), f"{label}_{name}")
