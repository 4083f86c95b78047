"""What the phantoms' writers share: NIfTI files that come out the same byte for byte, and checks of sizes."""

from collections.abc import Callable
from pathlib import Path

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
