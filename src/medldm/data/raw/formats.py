"""Reads MetaImage files and NumPy arrays."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from medldm.bounds import DEFLATE, check_claim
from medldm.data.raw.image import LPS_TO_RAS
from medldm.errors import InputError, unreadable
from medldm.files import leads_out


@contextmanager
def no_output_of_libraries() -> Iterator[None]:
    """A context in which nothing that compiled code writes to stderr is shown. Of a damaged file it prints
    lines of its own before it raises the exception that becomes our one line.
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
    damaged = f"{path}: not a complete MetaImage file; copy or download it again"
    with unreadable(damaged), no_output_of_libraries():
        check_meta_header(path)
        image = SimpleITK.ReadImage(str(path), imageIO="MetaImageIO")
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise InputError(
            f"{path}: {image.GetDimension()} axes with {image.GetNumberOfComponentsPerPixel()} values a "
            "voxel; save one volume of one value a file"
        )
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return SimpleITK.GetArrayFromImage(image).transpose(2, 1, 0), LPS_TO_RAS @ affine


def check_meta_header(path: Path) -> None:
    """InputError where a MetaImage header claims more voxels than its data can hold, or than the limit of
    `medldm.bounds`.
    """
    import SimpleITK

    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("MetaImageIO")
    reader.ReadImageInformation()
    data = detached_data(path) or path
    values = (*reader.GetSize(), max(reader.GetNumberOfComponents(), 1))
    holds = data.stat().st_size if data.is_file() else 0
    check_claim(path, values, 1, holds=holds, times=DEFLATE, kind="MetaImage file")
    check_claim(path, values, 8)


def detached_data(path: Path) -> Path | None:
    """The file that a header (.nhdr, .mhd) names for its voxels. InputError where that lies outside of the
    header's folder: a header may come from a stranger, who must not choose among the files of its reader.
    """
    text = path.read_bytes()[: 1 << 16].decode(errors="replace")
    found = re.search(r"^\s*(?:data ?file\s*:|ElementDataFile\s*=)\s*(\S.*?)\s*$", text, re.MULTILINE | re.I)
    if found is None or found.group(1).upper() == "LOCAL":
        return None
    names = [found.group(1)]
    if names[0].upper().startswith("LIST"):
        names = [line.strip() for line in text[found.end() :].splitlines() if line.strip()]
    for name in names:
        if leads_out(name):
            raise InputError(
                f"{path}: has its voxels in {name:.120}, outside of its folder; put it beside the header and "
                "name it there without a folder"
            )
    return path.parent / names[0] if names else None


def check_numpy_header(path: Path) -> None:
    """InputError where a .npy file claims more values than it has, or than the limit of `medldm.bounds`.
    Files of another kind pass.
    """
    from numpy.lib import format as npy

    with open(path, "rb") as file:
        if file.read(6) != b"\x93NUMPY":
            return
        file.seek(0)
        version = npy.read_magic(file)
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, _, dtype = read(file)
        check_claim(path, shape, dtype.itemsize, holds=path.stat().st_size - file.tell(), kind="NumPy array")


def read_numpy(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Of a picture (H, W) the array and None; of a volume stored as (D, H, W) the array as (X, Y, Z) and an
    affine. No NumPy file says where its voxels lie: the stored axes are taken as S, P and L with voxels of
    1 mm, so that the prepared array, in the orientation SPL, has them as they were stored.
    """
    mend = "save it again, or remove its case"
    with unreadable(lambda reason: f"{path}: not a complete NumPy array ({reason}); {mend}"):
        check_numpy_header(path)
        array = np.load(path, allow_pickle=False)
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path}: holds several arrays; save one array a file as .npy")
    if array.ndim not in (2, 3) or array.size == 0 or array.dtype.kind not in "biuf":
        raise InputError(f"{path}: holds {array.dtype} of shape {array.shape}; give (H, W) or (D, H, W)")
    if array.ndim == 2:
        return array, None
    if array.shape[-1] <= 4 < min(array.shape[:2]):
        raise InputError(
            f"{path}: shape {array.shape} has colours or slices as its last axis; save grey "
            "pictures as (H, W) and volumes with their slices first, as (D, H, W)"
        )
    return array.transpose(2, 1, 0), LPS_TO_RAS.copy()
