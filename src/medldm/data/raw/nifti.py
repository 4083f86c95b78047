"""NIfTI files: voxels, and where they lie in the body."""

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
    """The volume of number `key` of a 4D file."""
    image = whole_nifti(file, file_identity(file))
    array = image.array
    if array.ndim != 4 or not key.isdigit() or int(key) >= array.shape[3]:
        raise InputError(f"{file}: has no volume {key} (shape {array.shape}); restore it, or remove its case")
    return RawImage(np.array(array[..., int(key)]), image.affine.copy(), image.spacing[:3])


@lru_cache(maxsize=1)
def whole_nifti(file: Path, identity: tuple[int, int, int]) -> RawImage:
    """The file that was read last, kept for its other volumes; `identity` tells a file that has changed."""
    return read_nifti(file)


def nifti_shape(path: Path) -> tuple[int, ...]:
    """The axes that a NIfTI file states in its header; no voxel is read."""
    import nibabel

    with nifti_errors(require_file(path)):
        return tuple(map(int, nibabel.load(path).shape))


def read_nifti(path: Path) -> RawImage:
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
    """InputError for voxels beyond the bound, more than the file has, or that are made of no numbers."""
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
    """The voxels of a compressed file, which is read to its end: its checksum stands there, and nibabel does
    not come to it. InputError where what follows the voxels is beyond the bound.
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
    """What nibabel says of a damaged file as an InputError."""
    from nibabel.imageglobals import logger

    logger.setLevel(logging.CRITICAL)  # what it mends by itself in a header is looked at here
    return unreadable(
        lambda reason: (
            f"{path}: not a complete NIfTI file ({reason}); copy or download it again, or remove its case"
        )
    )


def is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) in (b"\x1f\x8b", b"")  # an empty file is cut, which reading it says


def nifti_affine(header: "Nifti1Header", voxel_sizes: Sequence[float], path: Path) -> np.ndarray:
    """Voxels -> RAS, mm (4, 4): the sform, or the qform where the former is empty. A file that names neither
    is taken as nibabel takes it, with a warning; so is the sform where the qform says another place.

    InputError where voxels get no size: `voxel_sizes` are those of the file, of which nibabel turns 0 into 1.
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
        log.warning("%s: does not say how it lies in the body; taken as LAS, as nibabel does", path)
    if affines.keys() != readers.keys() and "sform" not in affines:
        log.warning("%s: its sform is empty; its qform is taken", path)
    affine = next(iter(affines.values()))
    if {"sform", "qform"} <= affines.keys() and not is_same_grid(shape, affine, shape, affines["qform"]):
        apart = distance(shape, affine, affines["qform"])
        log.warning(
            "%s: its sform and qform disagree by up to %.3g mm; the sform is taken, as nibabel does",
            path,
            apart,
        )
    unit, in_mm = MM.get(int(header["xyzt_units"]) % 8, ("mm", 1.0))
    if unit != "mm":
        log.warning("%s: its lengths are in %s; converted to mm", path, unit)
    return np.diag([in_mm, in_mm, in_mm, 1.0]) @ affine


def valid_affine(read: Callable[[], np.ndarray]) -> np.ndarray | None:
    """The affine that `read` gives, or None where it is no affine: voxels would have no volume."""
    from nibabel.spatialimages import HeaderDataError

    try:
        affine = np.asarray(read(), np.float64)
    except HeaderDataError:  # a quaternion that is none
        return None
    return affine if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-12 else None
