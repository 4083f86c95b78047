"""Reads NIfTI files: their voxels, and where these lie in the body."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medldm.bounds import DEFLATE, PART, check_claim, largest
from medldm.data.hdf5 import file_identity
from medldm.data.raw.grids import distance, is_same_grid
from medldm.data.raw.image import RawImage, has_suffix, require_file
from medldm.errors import InputError, unreadable

if TYPE_CHECKING:
    from nibabel import Nifti1Header, Nifti1Image

log = logging.getLogger(__name__)
MM = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}  # units of length of a NIfTI header, beside mm


def nifti_volume(file: Path, key: str) -> RawImage:
    """One volume of a 4D file, by its number `key`."""
    image = whole_nifti(file, file_identity(file))
    array = image.array
    if array.ndim != 4 or not key.isdigit() or int(key) >= array.shape[3]:
        raise InputError(f"{file}: has no volume {key} (shape {array.shape}); restore it, or remove its case")
    return RawImage(np.array(array[..., int(key)]), image.affine.copy(), image.spacing[:3])


@lru_cache(maxsize=1)
def whole_nifti(file: Path, identity: tuple[int, int, int]) -> RawImage:
    """The file that was read last, cached for its other volumes. `identity` changes where the file has."""
    return read_nifti(file)


def nifti_shape(path: Path) -> tuple[int, ...]:
    """The shape that the header of a NIfTI file states. No voxel is read."""
    import nibabel

    with nifti_errors(require_file(path)):
        return tuple(map(int, nibabel.load(path).shape))


def read_nifti(path: Path) -> RawImage:
    """The voxels of a NIfTI file with their affine. InputError where the file is damaged."""
    import nibabel

    if has_suffix(path, (".gz",)) and not is_gzip(path):
        raise InputError(f"{path}: ends in .gz but is not compressed; rename it to '{str(path)[:-3]}'")
    with nifti_errors(path):
        image = nibabel.load(path)
        check_header(image.header, path)
        array = unpacked(image, path) if is_gzip(path) else np.asanyarray(image.dataobj)
        with image.file_map["image"].get_prepare_fileobj("rb") as file:
            voxel_sizes = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4]
    if array.size == 0:
        raise InputError(f"{path}: holds no voxels (shape {array.shape}); remove its case")
    affine = nifti_affine(image.header, voxel_sizes[: array.ndim], path)
    spacing = [*np.linalg.norm(affine[:3, :3], axis=0).tolist(), *[1.0] * array.ndim]
    return RawImage(array, affine, tuple(spacing[: array.ndim]))


def check_header(header: "Nifti1Header", path: Path) -> None:
    """InputError where voxels are no numbers, more than the file has, or beyond the limit of
    `medldm.bounds`.
    """
    shape, dtype = header.get_data_shape(), header.get_data_dtype()
    if len(shape) > 7 or dtype.kind not in "biufcV":
        raise InputError(f"{path}: holds {dtype} of shape {shape}, which is no volume; remove its case")
    is_scaled = header.get_slope_inter() not in ((None, None), (1.0, 0.0))
    holds = max(path.stat().st_size - (0 if is_gzip(path) else int(header.get_data_offset())), 0)
    check_claim(
        path, shape, dtype.itemsize, holds=holds, times=DEFLATE if is_gzip(path) else 1, kind="NIfTI file"
    )
    if is_scaled:
        check_claim(path, shape, 8)  # bytes of a float64, which scaled voxels become


def unpacked(image: "Nifti1Image", path: Path) -> np.ndarray:
    """The voxels of a compressed file. The file is read to its end, where its checksum stands, which nibabel
    does not check. InputError where more follows the voxels than the limit allows.
    """
    import gzip

    from nibabel.fileholders import FileHolder

    with gzip.open(path) as file:
        again = type(image).from_file_map({**image.file_map, "image": FileHolder(fileobj=file)})
        array = np.array(np.asanyarray(again.dataobj))
        rest, bound = 0, largest()
        while part := file.read(PART):
            rest += len(part)
            if rest > bound:
                raise InputError(f"{path}: unpacks to more than its voxels, without end; remove its case")
    return array


def nifti_errors(path: Path) -> AbstractContextManager[None]:
    """A context in which what nibabel raises of a damaged file becomes an InputError."""
    from nibabel.imageglobals import logger

    logger.setLevel(logging.CRITICAL)  # no messages about headers that it repairs: they are checked here
    return unreadable(
        lambda reason: (
            f"{path}: not a complete NIfTI file ({reason}); copy or download it again, or remove its case"
        )
    )


def is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) in (b"\x1f\x8b", b"")  # an empty file is truncated, which reading it tells


def nifti_affine(header: "Nifti1Header", voxel_sizes: Sequence[float], path: Path) -> np.ndarray:
    """(4, 4) The affine from voxels to RAS, mm: the sform, or the qform where the former is empty. There is a
    warning where a file has neither, which is then read as nibabel reads it, and where both disagree.

    InputError where voxels have no size. `voxel_sizes` are those that the file states: nibabel would turn a
    size of 0 into 1.
    """
    shape = header.get_data_shape()[:3]
    stated = {"sform": header.get_sform, "qform": header.get_qform}
    readers = {name: read for name, read in stated.items() if int(header[f"{name}_code"]) > 0}
    if not readers:
        readers = {"header": header.get_base_affine}
    affines = {
        name: affine
        for name, read in readers.items()
        if (name == "sform" or np.all(voxel_sizes)) and (affine := valid_affine(read)) is not None
    }
    if not affines:
        sizes = " x ".join(f"{size:g}" for size in voxel_sizes)
        raise InputError(
            f"{path}: its header gives voxels no size and place ({' and '.join(readers)} of no use, voxel "
            f"sizes {sizes}); set both, in 3D Slicer for instance, or remove its case"
        )
    if "header" in affines:
        log.warning("%s: does not say how it lies in the body; it is read as LAS, as nibabel does", path)
    if affines.keys() != readers.keys() and "sform" not in affines:
        log.warning("%s: its sform is empty; its qform is used", path)
    affine = next(iter(affines.values()))
    if {"sform", "qform"} <= affines.keys() and not is_same_grid(shape, affine, shape, affines["qform"]):
        apart = distance(shape, affine, affines["qform"])
        log.warning(
            "%s: its sform and qform disagree by up to %.3g mm; the sform is used, as nibabel does",
            path,
            apart,
        )
    unit, in_mm = MM.get(int(header["xyzt_units"]) % 8, ("mm", 1.0))
    if unit != "mm":
        log.warning("%s: its lengths are in %s; they are converted to mm", path, unit)
    return np.diag([in_mm, in_mm, in_mm, 1.0]) @ affine


def valid_affine(read: Callable[[], np.ndarray]) -> np.ndarray | None:
    """The affine that `read` returns, or None where it is singular or not finite."""
    from nibabel.spatialimages import HeaderDataError

    try:
        affine = np.asarray(read(), np.float64)
    except HeaderDataError:  # the qform is no quaternion of unit length
        return None
    return affine if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-12 else None
