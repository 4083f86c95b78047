"""MRNet (Stanford; Bien et al., PLoS Medicine 2018): MR of knees as NumPy arrays, one for each plane."""

from collections.abc import Sequence
from pathlib import Path

from medldm.data.case import Case
from medldm.data.raw.image import NUMPY_SUFFIXES
from medldm.data.raw.layouts import files_in, require_cases, require_root
from medldm.data.raw.tables import read_text
from medldm.errors import InputError

MRNET_PLANES = ("axial", "coronal", "sagittal")
MRNET_TASKS = ("acl", "abnormal", "meniscus")
MRNET_SPLITS = {"train": "train", "valid": "val", "val": "val", "test": "test"}


def index(root: str | Path, modalities: Sequence[str] = ("sagittal",), task: str = "acl") -> list[Case]:
    """Lists cases of `{train,valid}/<plane>/<exam>.npy`, slices first, of one plane. The label, 0 or 1, is
    read from `{train,valid}-<task>.csv` (exam, label; no header) where there are these tables. The split is
    that of the folders. Each exam is a subject, because the data do not name patients.
    """
    root = require_root(root, "train/<plane>/0000.npy and valid/<plane>/")
    if len(modalities) != 1 or modalities[0] not in MRNET_PLANES:
        raise InputError(f"data.modalities={list(modalities)}: choose one plane of {', '.join(MRNET_PLANES)}")
    if task not in MRNET_TASKS:
        raise InputError(f"data.task={task}: choose from {', '.join(MRNET_TASKS)}")
    cases = []
    for folder, split in MRNET_SPLITS.items():
        labels = read_labels(root / f"{folder}-{task}.csv")
        for path in files_in(root / folder / modalities[0], NUMPY_SUFFIXES):
            if labels and path.stem not in labels:
                raise InputError(
                    f"{root / f'{folder}-{task}.csv'}: does not name exam {path.stem}; add a line"
                )
            known = {"label": labels[path.stem]} if labels else {}
            cases.append(Case(path.stem, path.stem, {"image": str(path)}, {"split": split, **known}))
    return require_cases(cases, root, "{train,valid}/{axial,coronal,sagittal}/<exam>.npy")


def read_labels(path: Path) -> dict[str, str]:
    """{exam: label}; empty where there is no table. InputError names a line that is not of this form."""
    if not path.is_file():
        return {}
    labels = {}
    for number, line in enumerate(read_text(path).split(), 1):
        exam, _, label = line.partition(",")
        if not exam.isdigit() or label not in ("0", "1"):
            raise InputError(f"{path}: line {number} is no exam,label such as 0000,1; correct it")
        labels[exam] = label
    return labels
