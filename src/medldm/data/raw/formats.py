"""MetaImage files and NumPy arrays."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from medldm.data.raw.image import LPS_TO_RAS
from medldm.errors import InputError


@contextmanager
def no_output_of_libraries() -> Iterator[None]:
    """Nothing that compiled code writes to stderr: of a damaged file it tells in lines of its own, before the
    exception that is turned into ours.
    """
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def read_meta_image(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) and a RAS affine of a .mha or .mhd file, through SimpleITK."""
    try:
        import SimpleITK
    except ImportError as error:
        raise InputError(f"{path}: MetaImage needs SimpleITK; run `pip install 'medldm[itk]'`") from error
    try:
        with no_output_of_libraries():
            image = SimpleITK.ReadImage(str(path), imageIO="MetaImageIO")
    except RuntimeError as error:
        raise InputError(f"{path}: not a complete MetaImage file; copy or download it again") from error
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"{path}: {image.GetDimension()} axes with {image.GetNumberOfComponentsPerPixel()} values a "
            "voxel; save one volume of one value a file"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine


def detached_data(path: Path) -> Path | None:
    """The file that a header (.nhdr, .mhd) names for its voxels."""
    text = path.read_bytes()[: 1 << 16].decode(errors="replace")
    found = re.search(r"^\s*(?:data ?file\s*:|ElementDataFile\s*=)\s*(\S.*?)\s*$", text, re.MULTILINE | re.I)
    return None if found is None or found.group(1).upper() == "LOCAL" else path.parent / found.group(1)


def read_numpy(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """(H, W) and None; or of a volume stored as (D, H, W), of which nothing says where it lies, (X, Y, Z) and
    an affine: the axes are taken as S, P and L, voxels of 1 mm, so that the prepared array (orientation SPL)
    has them as they were stored.
    """
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: not a complete NumPy array ({reason}); save it again, or remove its case"
        ) from error
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: holds several arrays; save one array a file as .npy")
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in "biuf":
        raise InputError(f"{path}: holds {array.dtype} of shape {array.shape}; give (H, W) or (D, H, W)")
    if array.ndim == 2:
        return array, None
    if array.shape[-1] <= 4 < min(array.shape[:2]):
        raise InputError(
            f"{path}: shape {array.shape} has colours last, or slices; save grey pictures as (H, W) and "
            "volumes with their slices first, as (D, H, W)"
        )
    return array.transpose(2, 1, 0), LPS_TO_RAS.copy()
