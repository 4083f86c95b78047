"""Formats beside NIfTI and pictures: DICOM series, NRRD, MetaImage, NumPy arrays."""

import logging
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from medldm.errors import InputError

log = logging.getLogger(__name__)
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM and Slicer count to the left and back, NIfTI does not
DICOM_SUFFIXES = (".dcm", ".ima")
# The signs that bring a named NRRD space to RAS. Spaces of no body, such as scanner-xyz, are not in it.
NRRD_SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
}
NRRD_SPACES |= {"".join(word[0] for word in name.split("-")): signs for name, signs in NRRD_SPACES.items()}
EVEN = 0.1  # of a slice distance: how far one step between DICOM slices may be from the usual one


# ---- DICOM ----


def dicom_files(folder: Path) -> list[Path]:
    """The DICOM files right inside a folder, by suffix, or by their first bytes where they have none."""
    return sorted(path for path in folder.iterdir() if is_dicom_file(path))


def is_dicom_file(path: Path) -> bool:
    if path.name.startswith(".") or path.name.upper() == "DICOMDIR" or not path.is_file():
        return False
    if path.suffix.lower() in DICOM_SUFFIXES:
        return True
    if re.fullmatch(r"\.[A-Za-z]\w*", path.suffix):  # some other format; `1.2.840.7` has no suffix
        return False
    with open(path, "rb") as file:
        return file.read(132)[128:] == b"DICM"


def is_dicom_folder(path: Path) -> bool:
    return path.is_dir() and any(map(is_dicom_file, path.iterdir()))


def read_dicom_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) float32 in the units of each slice's rescale slope, and a RAS affine. Slices are ordered by
    their position, and MONOCHROME1 is turned so that much is bright.

    InputError where files are damaged or unequal, belong to several series, or are not evenly spaced.
    """
    slices = read_dicom_files(folder)
    try:
        row, column = np.reshape(np.float64(slices[0].ImageOrientationPatient), (2, 3))
        normal = np.cross(row, column)
        slices.sort(key=lambda s: float(np.dot(normal, np.float64(s.ImagePositionPatient))))
        check_one_series(folder, slices)
        planes = [dicom_plane(s) for s in slices]
        origins = np.float64([s.ImagePositionPatient for s in slices])
        dy, dx = np.float64(slices[0].PixelSpacing)
        thickness = float(getattr(slices[0], "SliceThickness", None) or 1)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    except (AttributeError, ValueError, RuntimeError, TypeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: not a readable DICOM series ({reason}); convert it to NIfTI") from error
    if len({plane.shape for plane in planes}) > 1:
        raise InputError(f"{folder}: slices have unequal sizes; keep one series a folder")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * dx, column * dy
    affine[:3, 2] = slice_step(folder, origins, normal) if len(slices) > 1 else normal * thickness
    affine[:3, 3] = origins[0]
    return np.stack(planes, -1).transpose(1, 0, 2).astype(np.float32), LPS_TO_RAS @ affine


def read_dicom_files(folder: Path) -> list:
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise InputError(f"{folder}: DICOM needs pydicom; run `pip install 'medldm[dicom]'`") from error
    slices = []
    for path in dicom_files(folder):
        try:
            slices.append(pydicom.dcmread(path))
        except (InvalidDicomError, OSError, EOFError) as error:
            raise InputError(f"{path}: not a complete DICOM file; copy or download it again") from error
    if not slices:
        raise InputError(f"{folder}: holds no DICOM files; restore them, or remove its case")
    return slices


def check_one_series(folder: Path, slices: Sequence[Any]) -> None:
    """InputError where files differ in series, direction or voxel size, or hold no grey slice each."""
    first = slices[0]
    for s in slices:
        if getattr(s, "SeriesInstanceUID", None) != getattr(first, "SeriesInstanceUID", None):
            raise InputError("holds several series; keep one series a folder")
        if int(getattr(s, "NumberOfFrames", None) or 1) > 1:
            raise InputError(f"several frames in one file; convert it: dcm2niix '{folder}'")
        if not str(s.PhotometricInterpretation).startswith("MONOCHROME"):
            raise InputError(f"{s.PhotometricInterpretation} pictures, no grey slices; remove its case")
        for key in ("ImageOrientationPatient", "PixelSpacing"):
            if np.abs(np.float64(s[key].value) - np.float64(first[key].value)).max() > 1e-3:
                raise InputError(f"slices differ in {key}; keep one series a folder")


def dicom_plane(s: Any) -> np.ndarray:
    """(rows, columns) of one file in the units of its own rescale slope.

    MONOCHROME1 shows high numbers dark: they are turned within their bits. Of CT and PET, whose numbers are
    physical, it is not said whether the writer has turned them: InputError.
    """
    stored = s.pixel_array.astype(np.float64)
    if s.PhotometricInterpretation == "MONOCHROME1":
        if getattr(s, "Modality", None) in ("CT", "PT"):
            raise InputError(
                f"{s.Modality} as MONOCHROME1, where it is open whether its units are turned; save it again "
                "as MONOCHROME2, or give NIfTI"
            )
        stored = (-1 if s.PixelRepresentation else 2**s.BitsStored - 1) - stored
    return stored * float(getattr(s, "RescaleSlope", 1)) + float(getattr(s, "RescaleIntercept", 0))


def slice_step(folder: Path, origins: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """From one slice to the next, mm (3,), of origins (N, 3) in order."""
    steps = np.diff(origins, axis=0)
    usual = float(np.median(steps @ normal))
    if np.min(steps @ normal) < EVEN * usual or usual <= 0:
        raise InputError(
            f"{folder}: two slices lie at one place, so it holds several volumes; keep one series a folder"
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


# ---- NRRD ----


@contextmanager
def nrrd_errors(path: Path) -> Iterator[None]:
    """What the library raises of a file that it cannot read, as an InputError."""
    import nrrd

    try:
        yield
    except (nrrd.NRRDError, OSError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: not a complete NRRD file, or of an encoding that is not read ({reason}); copy it "
            "again, or save it with encoding gzip"
        ) from error


def nrrd_sizes(path: Path) -> tuple[int, ...]:
    """Voxels along each axis, from the header alone."""
    import nrrd

    with nrrd_errors(path):
        return tuple(int(n) for n in nrrd.read_header(str(path))["sizes"])


def read_nrrd(path: Path, segment: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) and a RAS affine. `segment` picks one of a Slicer segmentation by a part of its name, as 0
    and 1; where it has no named segments, label 1.

    InputError where the file is damaged, has several values a voxel, or does not say how it lies in the body.
    """
    import nrrd

    with nrrd_errors(path):
        array, fields = nrrd.read(str(path))
    header = {key.lower(): value for key, value in fields.items()}
    directions = np.asarray(header.get("space directions", np.zeros((0, 0))), np.float64)
    is_spatial = np.isfinite(directions).all(-1) if directions.ndim == 2 else np.zeros(0, bool)
    if is_spatial.sum() != 3 or directions.shape[1] != 3:
        raise InputError(
            f"{path}: its header gives no `space directions` of three axes (shape {array.shape}), so it is "
            "open how it lies; save it as a volume in 3D Slicer, or as NIfTI"
        )
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    layers = np.moveaxis(array, np.flatnonzero(~is_spatial), range(array.ndim - 3))
    layers = layers.reshape(-1, *layers.shape[-3:])
    affine = nrrd_affine(header, directions[is_spatial], path)
    if segment is not None:
        layer, value = find_segment(header, segment, layers, path)
        return (layers[layer] == value).astype(np.uint8), affine
    if len(layers) > 1:
        kinds = " ".join(header.get("kinds", ()))
        is_segmentation = any(re.fullmatch(r"segment\d+_layer", key) for key in header)
        mend = "export it as a label map in 3D Slicer" if is_segmentation else "save one volume a file"
        raise InputError(f"{path}: holds {len(layers)} values a voxel (kinds: {kinds or 'not said'}); {mend}")
    return layers[0], affine


def nrrd_affine(header: Mapping[str, Any], directions: np.ndarray, path: Path) -> np.ndarray:
    """Voxels -> RAS, mm. InputError for a space that says nothing of the body; without one the file is read
    as ITK reads it, in LPS, with a warning.
    """
    space = str(header.get("space", "")).lower()
    if not space:
        log.warning("%s: names no space; read as left-posterior-superior, as ITK does", path)
    signs = NRRD_SPACES.get(space or "lps")
    if signs is None:
        raise InputError(
            f"{path}: its space '{space}' does not say where left and front are; save it as "
            f"{', '.join(name for name in NRRD_SPACES if '-' in name)}"
        )
    units = {str(unit).strip('"').lower() for unit in header.get("space units", ())} - {"mm", ""}
    if units:
        raise InputError(f"{path}: its space units are {', '.join(sorted(units))}; save it in mm")
    affine = np.eye(4)
    affine[:3, :3] = directions.T
    affine[:3, 3] = header.get("space origin", np.zeros(3))
    return np.diag([*signs, 1.0]) @ affine


def find_segment(header: Mapping[str, Any], name: str, layers: np.ndarray, path: Path) -> tuple[int, int]:
    """(layer, label value) of the segment whose name holds `name`. Where none has a name of its own (Slicer's
    default is Segment_1), the only one, or label 1 of the first layer with a warning.
    """
    named = {
        match.group(1): str(value)
        for key, value in header.items()
        if (match := re.fullmatch(r"segment(\d+)_name", key))
    }
    fitting = [number for number, text in named.items() if name.lower() in text.lower()]
    are_unnamed = all(re.fullmatch(r"segment[_ ]?\d+", text.lower()) for text in named.values())
    if not fitting and not are_unnamed:
        raise InputError(f"{path}: has no segment '{name}', but {', '.join(named.values())}; rename it there")
    if not fitting and len(named) != 1:
        if layers.max() > 1 or len(layers) > 1:
            log.warning("%s: names no segments; its label 1 is taken for '%s'", path, name)
        return 0, 1
    number = (fitting or list(named))[0]
    return int(header.get(f"segment{number}_layer", 0)), int(header.get(f"segment{number}_labelvalue", 1))


# ---- MetaImage and NumPy ----


def read_meta_image(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) and a RAS affine of a .mha or .mhd file, through SimpleITK."""
    try:
        import SimpleITK
    except ImportError as error:
        raise InputError(f"{path}: MetaImage needs SimpleITK; run `pip install 'medldm[itk]'`") from error
    try:
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
