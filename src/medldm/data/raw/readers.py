"""Reads one raw image of any known format, which is named as `file` or `file::dataset`."""

import logging
from pathlib import Path

import numpy as np

from medldm.data.case import split_path
from medldm.data.hdf5 import open_hdf5
from medldm.data.raw.dicom import (
    dicom_files,
    is_dicom_file,
    is_dicom_folder,
    is_radiograph,
    read_dicom_series,
    read_radiograph,
)
from medldm.data.raw.formats import detached_data, read_meta_image, read_numpy
from medldm.data.raw.image import (
    HDF5_SUFFIXES,
    IMAGE_SUFFIXES,
    META_SUFFIXES,
    NIFTI_SUFFIXES,
    NRRD_SUFFIXES,
    NUMPY_SUFFIXES,
    RASTER_SUFFIXES,
    RawImage,
    has_suffix,
    require_file,
    with_spacing,
)
from medldm.data.raw.nifti import nifti_volume, read_nifti
from medldm.data.raw.nrrd import read_nrrd
from medldm.data.raw.pictures import decode_raster, is_coloured, read_raster_mask, to_grey
from medldm.errors import InputError

log = logging.getLogger(__name__)


def is_image(path: str | Path) -> bool:
    """Whether `read_image` can read a path: a file of a known kind, or a folder with the DICOM slices of a
    volume. Hidden files, such as the `._` files of macOS, are not images.
    """
    path = Path(path)
    if path.name.startswith("."):
        return False
    if path.is_dir():
        return is_dicom_folder(path)
    return path.is_file() and (has_suffix(path, IMAGE_SUFFIXES) or is_dicom_file(path))


def files_of(path: str | Path) -> list[Path]:
    """The files that `read_image` reads for `file` or `file::dataset`: all of a DICOM folder, or a header and
    the data file that it names.
    """
    file, _ = split_path(path)
    if file.is_dir():
        return dicom_files(file)
    data = detached_data(require_file(file)) if has_suffix(file, (".nhdr", ".mhd")) else None
    return [file] if data is None else [file, data]


def read_image(path: str | Path) -> RawImage:
    """Read `file` or `file::dataset` with its values unchanged; of complex numbers the magnitude is taken.
    InputError where it is missing or damaged.
    """
    file, key = split_path(path)
    image = read_any(file, key)
    if image.array.dtype.kind == "c":
        log.warning("%s: holds complex numbers; their magnitude is taken", file)
        return image._replace(array=np.abs(image.array))
    if image.array.dtype.kind not in "biuf":
        raise InputError(f"{file}: holds colours ({image.array.dtype}); save it with one grey value a voxel")
    return image


def read_any(file: Path, key: str | None) -> RawImage:
    """Read a file by its kind, or a folder of DICOM; `key` names a dataset or a volume inside."""
    if file.is_dir():
        return with_spacing(*read_dicom_series(file))
    require_file(file)
    if has_suffix(file, NIFTI_SUFFIXES):
        return read_nifti(file) if key is None else nifti_volume(file, key)
    if has_suffix(file, NRRD_SUFFIXES):
        return with_spacing(*read_nrrd(file, key))
    if has_suffix(file, META_SUFFIXES):
        return with_spacing(*read_meta_image(file))
    if has_suffix(file, RASTER_SUFFIXES):
        picture = decode_raster(file)
        return RawImage(to_grey(picture), None, None, is_coloured(picture))
    if has_suffix(file, NUMPY_SUFFIXES):
        array, affine = read_numpy(file)
        return RawImage(array, None, None) if affine is None else with_spacing(array, affine)
    if has_suffix(file, HDF5_SUFFIXES):
        if key is None:
            raise InputError(f"{file}: name the dataset inside as {file.name}::dataset")
        return RawImage(np.asarray(open_hdf5(file).read(key)), None, None)
    if is_dicom_file(file):
        if is_radiograph(file):
            return read_radiograph(file)
        raise InputError(
            f"{file}: one slice of a volume; name the folder of its series, or convert it to NIfTI"
        )
    raise InputError(
        f"{file}: unknown file type; use NIfTI, NRRD, MetaImage, DICOM, PNG, JPEG, NumPy or HDF5"
    )


def read_mask(path: str | Path) -> RawImage:
    """As `read_image`, with an InputError for pictures that hold no class numbers (colours, JPEG)."""
    file, key = split_path(path)
    if key is None and has_suffix(file, RASTER_SUFFIXES):
        return RawImage(read_raster_mask(require_file(file)), None, None)
    return read_image(path)
