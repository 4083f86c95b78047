"""Reads DICOM. A folder that holds the slices of one series becomes a volume; a file that states no position
in a volume, such as a radiograph or a mammogram, becomes a picture.
"""

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from medldm.bounds import DEFLATE, check_claim
from medldm.data.raw.image import LPS_TO_RAS, RawImage
from medldm.errors import InputError, unreadable

DICOM_SUFFIXES = (".dcm", ".ima")
PLACE = ("ImagePositionPatient", "ImageOrientationPatient")  # a slice of a volume states both
EVEN = 0.1  # one step between slices may differ from the median step by this share of it


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files right inside a folder, by suffix, or by their first bytes where they have none."""
    return sorted(path for path in folder.iterdir() if is_dicom_file(path))


def is_dicom_file(path: Path) -> bool:
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR":
        return False
    is_named = path.suffix.lower() in DICOM_SUFFIXES
    if not is_named and re.fullmatch(
        r"\.[A-Za-z]\w*", path.suffix
    ):  # the last number of a name like `1.2.840.7` is no suffix
        return False
    if is_named or not path.is_file():
        return path.is_file()
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def is_dicom(path: str | Path) -> bool:
    """Whether the path of a case is a DICOM file, or a folder: cases name folders for DICOM series alone."""
    return Path(path).is_dir() or is_dicom_file(Path(path))


def is_dicom_folder(path: Path) -> bool:
    """Whether the DICOM files right inside a folder are slices of a volume. The first of them decides."""
    files = dicom_files(path) if path.is_dir() else []
    return bool(files) and not is_radiograph(files[0])


def is_radiograph(path: Path) -> bool:
    """Whether a DICOM file states no position in a volume, and so is a picture by itself. False for a file
    whose header cannot be read: whoever reads its pixels gets the error.
    """
    try:
        header = read_dataset(path, stop_before_pixels=True, specific_tags=[*PLACE, "Rows"])
        return "Rows" in header and not all(header.get(name) for name in PLACE)
    except Exception:  # of bytes that anyone may have written, anything can be raised
        return False


def dicom_images(folder: Path) -> list[Path]:
    """The images that the DICOM files right inside a folder make up: the folder itself where they are slices
    of a volume, each file where they are radiographs, and an empty list where there are no DICOM files.
    """
    files = dicom_files(folder)
    return files if not files or is_radiograph(files[0]) else [folder]


def read_radiograph(path: Path) -> RawImage:
    """(H, W) float32 in the units of the modality LUT or the rescale slope; high values are shown bright. The
    spacing, in mm, is PixelSpacing, or that of the detector (ImagerPixelSpacing) where the former is missing.

    InputError where the file is damaged, or holds colours or several frames.
    """
    (picture,) = read_dicom_files([path])
    with told_of_path(path, "picture", convert_to="PNG"):
        check_grey(path, picture)
        array = dicom_plane(picture).astype(np.float32)
        spacing = picture.get("PixelSpacing") or picture.get("ImagerPixelSpacing")
    return RawImage(array, None, None if not spacing else tuple(float(mm) for mm in spacing))


def read_dicom_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) float32 in the units of each slice's rescale slope, and a RAS affine. Slices are ordered by
    their position, and MONOCHROME1 is inverted so that high values are bright.

    InputError where files are damaged or unequal, belong to several series, or are not evenly spaced.
    """
    slices = read_dicom_files(dicom_files(folder))
    if not slices:
        raise InputError(f"{folder}: holds no DICOM files; restore them, or remove its case")
    with told_of_path(folder, "series", convert_to="NIfTI"):
        row, column = np.reshape(np.float64(slices[0].ImageOrientationPatient), (2, 3))
        normal = np.cross(row, column)
        slices.sort(key=lambda s: float(np.dot(normal, np.float64(s.ImagePositionPatient))))
        check_one_series(folder, slices)
        planes = [dicom_plane(s) for s in slices]
        origins = np.float64([s.ImagePositionPatient for s in slices])
        dy, dx = np.float64(slices[0].PixelSpacing)
        thickness = float(getattr(slices[0], "SliceThickness", None) or 1)
    if len({plane.shape for plane in planes}) > 1:
        raise InputError(f"{folder}: slices have unequal sizes; keep one series a folder")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * dx, column * dy
    affine[:3, 2] = slice_step(folder, origins, normal) if len(slices) > 1 else normal * thickness
    affine[:3, 3] = origins[0]
    return np.stack(planes, -1).transpose(1, 0, 2).astype(np.float32), LPS_TO_RAS @ affine


def read_dicom_files(paths: Sequence[Path]) -> list:
    """The files as pydicom reads them, with their pixels. InputError names a file that is damaged."""
    try:
        import pydicom  # noqa: F401
    except ImportError as error:
        where = paths[0].parent if paths else "DICOM"
        raise InputError(f"{where}: DICOM needs pydicom; run `pip install 'medldm[dicom]'`") from error
    slices = []
    for path in paths:
        with unreadable(f"{path}: not a complete DICOM file; copy or download it again"):
            slices.append(read_dataset(path))
    return slices


@contextmanager
def told_of_path(path: Path, what: str, *, convert_to: str) -> Iterator[None]:
    """A context in which every fault of a DICOM file or folder becomes an InputError that names it."""
    try:
        with unreadable(lambda reason: f"not a readable DICOM {what} ({reason}); convert it to {convert_to}"):
            yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def read_dataset(path: Path, **options: Any) -> Any:
    """A DICOM file as pydicom reads it; pydicom's warnings are suppressed. InputError where a deflated file,
    which pydicom unpacks as a whole, could unpack to more than the limit of `medldm.bounds`.
    """
    import pydicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meta = pydicom.filereader.read_file_meta_info(path)
        if meta.get("TransferSyntaxUID") == pydicom.uid.DeflatedExplicitVRLittleEndian:
            check_claim(path, (path.stat().st_size,), DEFLATE)
        return pydicom.dcmread(path, **options)


def check_one_series(folder: Path, slices: Sequence[Any]) -> None:
    """InputError where files differ in series, direction or voxel size, or where one holds no grey slice."""
    first = slices[0]
    for s in slices:
        if getattr(s, "SeriesInstanceUID", None) != getattr(first, "SeriesInstanceUID", None):
            raise InputError("holds several series; keep one series a folder")
        check_grey(folder, s)
        for key in ("ImageOrientationPatient", "PixelSpacing"):
            if np.abs(np.float64(s[key].value) - np.float64(first[key].value)).max() > 1e-3:
                raise InputError(f"slices differ in {key}; keep one series a folder")


def check_grey(path: Path, s: Any) -> None:
    """InputError where a file holds several frames or colours."""
    if int(getattr(s, "NumberOfFrames", None) or 1) > 1:
        raise InputError(f"several frames in one file; convert it: dcm2niix '{path}'")
    if not str(s.PhotometricInterpretation).startswith("MONOCHROME"):
        raise InputError(f"{s.PhotometricInterpretation} pictures, which are not grey; remove its case")


def dicom_plane(s: Any) -> np.ndarray:
    """(rows, columns) of one file in the units of its own modality LUT or rescale slope.

    MONOCHROME1 shows high numbers dark: numbers are inverted within their bits, or within the values of the
    LUT. InputError for CT and PET as MONOCHROME1: their numbers are physical units, and the file does not say
    whether its writer has inverted them.
    """
    check_claim(s.filename, (int(s.Rows), int(s.Columns), int(s.get("SamplesPerPixel") or 1)), 8)
    stored = s.pixel_array.astype(np.float64)
    if s.PhotometricInterpretation == "MONOCHROME1":
        if getattr(s, "Modality", None) in ("CT", "PT"):
            raise InputError(
                f"{s.Modality} as MONOCHROME1 does not say whether its units are inverted; save it again as "
                "MONOCHROME2, or as NIfTI"
            )
        if "ModalityLUTSequence" not in s:
            stored = (-1 if s.PixelRepresentation else 2**s.BitsStored - 1) - stored
    if "ModalityLUTSequence" in s:
        return through_lut(s)
    return stored * float(getattr(s, "RescaleSlope", 1)) + float(getattr(s, "RescaleIntercept", 0))


def through_lut(s: Any) -> np.ndarray:
    """(rows, columns) float64: the entries of the modality LUT (PS3.3 C.11.1.1), of any number of bits,
    inverted for MONOCHROME1. Stored values before the first entry or after the last take that entry.
    """
    lut = s.ModalityLUTSequence[0]
    count, first, bits = (int(number) for number in lut.LUTDescriptor)
    entries = lut.LUTData
    if isinstance(entries, bytes):
        entries = np.frombuffer(entries, np.uint8 if len(entries) == (count or 2**16) else "<u2")
    entries = np.asarray(entries, np.float64)[: count or 2**16]
    values = entries[np.clip(s.pixel_array.astype(np.int64) - first, 0, len(entries) - 1)]
    return 2**bits - 1 - values if s.PhotometricInterpretation == "MONOCHROME1" else values


def slice_step(folder: Path, origins: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """(3,) The mean step in mm from one slice to the next, of `origins` (N, 3) in the order of slices.

    InputError where steps are uneven, or oblique to the `normal` of the slices.
    """
    steps = np.diff(origins, axis=0)
    usual = float(np.median(steps @ normal))
    if np.min(steps @ normal) < EVEN * usual or usual <= 0:
        raise InputError(
            f"{folder}: two slices lie at the same position, so it holds several volumes; "
            "keep one series a folder"
        )
    if np.abs(steps @ normal - usual).max() > EVEN * usual:
        raise InputError(
            f"{folder}: slices are not evenly spaced, {np.min(steps @ normal):.3g} to "
            f"{np.max(steps @ normal):.3g} mm; one is missing, or two series are mixed: restore it"
        )
    step = steps.mean(0)
    if np.linalg.norm(np.cross(step, normal)) > 0.02 * np.linalg.norm(step):  # about a degree
        raise InputError(
            f"{folder}: slices are shifted against each other (gantry tilt); convert it: dcm2niix '{folder}'"
        )
    return step
