"""What the writers of phantoms share: NIfTI files that are equal byte for byte in every run, tables, and
checks of sizes.
"""

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from medldm.errors import InputError
from medldm.files import replacing

Progress = Callable[[], None]


def save_nifti(path: Path, array: np.ndarray, spacing: tuple[float, ...], affine: np.ndarray) -> None:
    image = nibabel.Nifti1Image(array, affine)
    image.header.set_zooms((*spacing, 1.0)[: array.ndim])
    image.header.set_xyzt_units("mm")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        temporary.write_bytes(compressed(image))


def compressed(image: nibabel.Nifti1Image) -> bytes:
    import gzip

    return gzip.compress(image.to_bytes(), 1, mtime=0)


def check_picture_request(num_subjects: int, image_size: int) -> None:
    if num_subjects < 1:
        raise InputError(f"num_subjects={num_subjects}: give 1 or more")
    if image_size < 16:
        raise InputError(f"image_size={image_size}: give 16 pixels or more")


def save_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes a CSV table whose columns are the keys of its first row."""
    with replacing(path) as aside, open(aside, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
