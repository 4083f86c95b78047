"""What the 3D datasets' index functions share: listing, pairing by name, modalities of a subject."""

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from medldm.data.case import Case
from medldm.data.readers import NIFTI_SUFFIXES, has_suffix
from medldm.errors import InputError

SPLITS = ("train", "val", "test")


def require_root(root: str | Path, holds: str) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise InputError(f"data.raw={root}: no such folder; give the folder that holds {holds}")
    return root


def require_cases(cases: Sequence[Case], root: Path, expected: str) -> list[Case]:
    if not cases:
        raise InputError(f"{root}: holds no case of this dataset; expected {expected}")
    name, count = Counter(case.id for case in cases).most_common(1)[0]
    if count > 1:
        first, second, *_ = (case.main_path for case in cases if case.id == name)
        raise InputError(f"{second}: has the name '{name}' like {first}; rename or remove one of them")
    return list(cases)


def map_folder(root: Path, label_dir: str | None) -> Path | None:
    """The folder of maps that a dataset does not publish: `label_dir`, else `labels/` where it is there."""
    if label_dir is not None and not Path(label_dir).is_dir():
        raise InputError(f"data.label_dir={label_dir}: no such folder; give the folder of the class maps")
    folder = Path(label_dir) if label_dir is not None else root / "labels"
    return folder if folder.is_dir() else None


def nifti_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.iterdir() if p.is_file() and has_suffix(p, NIFTI_SUFFIXES))


def nifti_below(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.is_file() and has_suffix(p, NIFTI_SUFFIXES))


def existing(*candidates: Path) -> Path | None:
    """The first of these that is a file, with `.nii` as good as `.nii.gz`."""
    for path in candidates:
        for name in (path, path.with_name(path.name.removesuffix(".gz"))):
            if name.is_file():
                return name
    return None


def folder_pairs(
    root: Path, image_dir: str, label_dir: str, subject_of=lambda stem: stem, skip: tuple[str, ...] = ()
) -> list[Case]:  # noqa: ANN001
    """Cases of Med-LSDM's own layout `[{train,val,test}/]<image_dir>/<name>.nii.gz` with a map of the same
    name in `<label_dir>/`. The folders' split is kept.
    """
    cases = []
    for split in (*SPLITS, None):
        folder = root / split if split else root
        for image in nifti_files(folder / image_dir):
            if image.name.startswith(skip):
                continue
            label = folder / label_dir / image.name
            if not label.is_file():
                raise InputError(f"{label}: missing, though {image} is there; add it, or remove the image")
            stem = image.name[: -len(".nii.gz")] if image.name.endswith(".nii.gz") else image.stem
            attributes = {"split": split} if split else {}
            cases.append(Case(stem, subject_of(stem), {"image": str(image), "mask": str(label)}, attributes))
    return cases


def modality_cases(
    subject: str, images: Mapping[str, Path], others: Mapping[str, Path | None], **attributes: str
) -> list[Case]:
    """One case a modality; the first of `images` decides the box of all; `others` are files they share."""
    if not images:
        return []
    shared = {key: str(path) for key, path in others.items() if path is not None}
    shared["foreground"] = str(next(iter(images.values())))
    return [
        Case(f"{subject}_{name}", subject, {"image": str(path), **shared}, {"label": name, **attributes})
        for name, path in images.items()
    ]


def check_modalities(modalities: Sequence[str], known: Mapping[str, object] | Sequence[str]) -> None:
    unknown = [name for name in modalities if name not in known]
    if unknown or len(set(modalities)) != len(modalities):
        raise InputError(f"data.modalities={list(modalities)}: choose from {', '.join(known)}, each once")


def read_table(path: Path, column: str) -> list[dict[str, str]]:
    """Rows of a CSV file that has this column."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or column not in rows[0]:
        raise InputError(f"{path}: needs a header line with the column '{column}' and at least one row")
    return rows


def stated_split(root: Path) -> dict[str, str]:
    """{subject: train | val | test} of `splits.csv` with the columns id and split, where there is one."""
    path = root / "splits.csv"
    if not path.is_file():
        return {}
    rows = read_table(path, "split")
    if "id" not in rows[0]:
        raise InputError(f"{path}: needs the columns id and split")
    wrong = next((row for row in rows if row["split"] not in SPLITS), None)
    if wrong:
        raise InputError(f"{path}: split '{wrong['split']}' of {wrong['id']} is none of {', '.join(SPLITS)}")
    return {row["id"]: row["split"] for row in rows}


def split_of(subject: str, stated: Mapping[str, str], path: Path) -> dict[str, str]:
    """The attribute `split` of a subject; InputError where a table is there and does not name it."""
    if not stated:
        return {}
    if subject not in stated:
        raise InputError(f"{path}: does not name subject {subject}; add a line for it")
    return {"split": stated[subject]}
