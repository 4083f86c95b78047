"""A raw image in memory, and the kinds of files that one is read from."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from medldm.errors import InputError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
NRRD_SUFFIXES = (".nrrd", ".nhdr")
META_SUFFIXES = (".mha", ".mhd")
RASTER_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
HDF5_SUFFIXES = (".h5", ".hdf5")
NUMPY_SUFFIXES = (".npy",)
IMAGE_SUFFIXES = (
    NIFTI_SUFFIXES + NRRD_SUFFIXES + META_SUFFIXES + RASTER_SUFFIXES + HDF5_SUFFIXES + NUMPY_SUFFIXES
)


class RawImage(NamedTuple):
    """An image as it was read."""

    array: np.ndarray  # (X, Y[, Z[, T]]) of a NIfTI file, (H, W) of a picture
    affine: np.ndarray | None  # 4x4, mm; None for pictures
    spacing: tuple[float, ...] | None  # mm per array axis
    is_coloured: bool = False  # whether the grey values were made from colours


def has_suffix(path: str | Path, suffixes: tuple[str, ...]) -> bool:
    return str(path).lower().endswith(suffixes)


def require_file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file; restore it, or remove its case from the dataset")
    return path


def with_spacing(array: np.ndarray, affine: np.ndarray) -> RawImage:
    return RawImage(array, affine, tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()))


# DICOM and Slicer count towards left and posterior, NIfTI towards right and anterior
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
