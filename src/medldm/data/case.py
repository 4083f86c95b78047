"""One acquisition before preparation: where image and mask lie, whose they are, what is known."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Case:
    """One image file (a volume, or a single picture) with its mask.

    `paths` maps a key ("image", "mask") to `file` or, inside HDF5, `file::dataset`. `attributes` holds what
    the dataset states: view, phase, label, split, vendor... In 2D all cases of a subject share one prepared
    file.
    """

    id: str
    subject: str
    paths: dict[str, str]
    attributes: dict[str, str | int | float] = field(default_factory=dict)


def split_path(path: str | Path) -> tuple[Path, str | None]:
    """`file::dataset` -> (file, dataset); the second is None for a plain file."""
    file, _, key = str(path).partition("::")
    return Path(file), key or None


def stem_of(path: str | Path) -> str:
    """File name without its suffix, where `.nii.gz` counts as one suffix."""
    name = Path(path).name
    return name[: -len(".nii.gz")] if name.lower().endswith(".nii.gz") else Path(name).stem
