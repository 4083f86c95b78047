"""Formats beside NIfTI and pictures: DICOM series, NRRD maps as 3D Slicer writes them, NumPy arrays."""

import gzip
import re
import zlib
from pathlib import Path

import numpy as np

from medldm.errors import InputError

LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM and Slicer count to the left and back, NIfTI does not
NRRD_TYPES = {
    "uchar": "u1", "unsigned char": "u1", "uint8": "u1", "uint8_t": "u1", "signed char": "i1", "int8": "i1",
    "short": "i2", "int16": "i2", "ushort": "u2", "unsigned short": "u2", "uint16": "u2",
    "int": "i4", "int32": "i4", "unsigned int": "u4", "uint32": "u4", "float": "f4", "double": "f8",
}  # fmt: skip


def read_dicom_series(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) float32 in the units of the rescale slope, and a RAS affine. Slices are ordered by their
    position; InputError where files are damaged, unequal or unevenly spaced.
    """
    try:
        import pydicom
        from pydicom.errors import InvalidDicomError
    except ImportError as error:
        raise InputError(f"{folder}: DICOM needs pydicom; run `pip install 'medldm[dicom]'`") from error
    slices = []
    for path in sorted(folder.glob("*.dcm")):
        try:
            slices.append(pydicom.dcmread(path))
        except (InvalidDicomError, OSError, EOFError) as error:
            raise InputError(f"{path}: not a complete DICOM file; copy or download it again") from error
    if not slices:
        raise InputError(f"{folder}: holds no .dcm files; restore them, or remove its case")
    try:
        row, column = np.reshape(np.float64(slices[0].ImageOrientationPatient), (2, 3))
        normal = np.cross(row, column)
        slices.sort(key=lambda s: float(np.dot(normal, np.float64(s.ImagePositionPatient))))
        planes = [
            s.pixel_array * float(getattr(s, "RescaleSlope", 1)) + float(getattr(s, "RescaleIntercept", 0))
            for s in slices
        ]
        origins = np.float64([s.ImagePositionPatient for s in slices])
        dy, dx = np.float64(slices[0].PixelSpacing)
    except (AttributeError, ValueError, RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{folder}: not a readable DICOM series ({reason}); convert it to NIfTI") from error
    if len({plane.shape for plane in planes}) > 1:
        raise InputError(f"{folder}: slices have unequal sizes; keep one series a folder")
    steps = np.diff(origins, axis=0)
    if len(steps) and np.abs(steps - steps.mean(0)).max() > 0.1:
        raise InputError(f"{folder}: slices are not evenly spaced; one is missing, or two series are mixed")
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1] = row * dx, column * dy
    affine[:3, 2] = steps.mean(0) if len(steps) else normal * float(getattr(slices[0], "SliceThickness", 1))
    affine[:3, 3] = origins[0]
    return np.stack(planes, -1).transpose(1, 0, 2).astype(np.float32), LPS_TO_RAS @ affine


def read_nrrd_header(path: Path) -> dict[str, str]:
    """Fields of an NRRD file in lower case, and `data offset` in bytes."""
    with open(path, "rb") as file:
        if not file.readline().startswith(b"NRRD"):
            raise InputError(f"{path}: not an NRRD file; download it again")
        fields = {}
        for line in iter(file.readline, b""):
            text = line.decode(errors="replace").strip()
            if not text:
                break
            key, _, value = text.partition(":")
            if not text.startswith("#"):
                fields[key.strip().lower()] = value.lstrip("= ").strip()
        return fields | {"data offset": str(file.tell())}


def read_nrrd(path: Path, segment: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) and a RAS affine. `segment` picks one of a Slicer segmentation by a part of its name, as 0
    and 1; where no name fits, label 1 of the first layer.
    """
    header = read_nrrd_header(path)
    try:
        sizes = [int(n) for n in header["sizes"].split()]
        order = "<" if header.get("endian", "little") == "little" else ">"
        dtype = np.dtype(order + NRRD_TYPES[header["type"]])
        data = path.read_bytes()[int(header["data offset"]) :]
        data = gzip.decompress(data) if header["encoding"] in ("gzip", "gz") else data
        array = np.frombuffer(data, dtype, int(np.prod(sizes))).reshape(sizes, order="F")
        affine = nrrd_affine(header)
    except (KeyError, ValueError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path}: not a complete NRRD file ({error}); download it again") from error
    layers = array if array.ndim == 4 else array[None]
    if segment is None:
        return layers.max(0), affine
    layer, value = find_segment(header, segment)
    return (layers[layer] == value).astype(np.uint8), affine


def nrrd_affine(header: dict[str, str]) -> np.ndarray:
    def numbers(text: str) -> list[list[float]]:
        return [[float(x) for x in group.split(",")] for group in re.findall(r"\(([^)]*)\)", text)]

    affine = np.eye(4)
    affine[:3, :3] = np.transpose(numbers(header["space directions"]))
    affine[:3, 3] = numbers(header["space origin"])[0]
    space = header.get("space", "left-posterior-superior").lower()
    return LPS_TO_RAS @ affine if space in ("left-posterior-superior", "lps") else affine


def find_segment(header: dict[str, str], name: str) -> tuple[int, int]:
    """(layer, label value) of the segment whose name holds `name`."""
    for key, value in header.items():
        match = re.fullmatch(r"segment(\d+)_name", key)
        if match and name.lower() in value.lower():
            number = match.group(1)
            layer = header.get(f"segment{number}_layer", "0")
            return int(layer), int(header.get(f"segment{number}_labelvalue", 1))
    return 0, 1


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
    return array.transpose(2, 1, 0), LPS_TO_RAS.copy()
