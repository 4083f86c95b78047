"""Reads NRRD files, and the segmentations that 3D Slicer writes in them."""

import bz2
import logging
import re
import zlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from medldm.bounds import DEFLATE, PART, check_claim, check_unpacked, largest
from medldm.errors import InputError, unreadable
from medldm.files import leads_out

log = logging.getLogger(__name__)
BZIP2 = 2**21  # about how many bytes one byte of bzip2 can unpack to
# The signs that bring a named NRRD space to RAS. Spaces without a body, such as scanner-xyz, have no entry.
NRRD_SPACES = {
    "right-anterior-superior": (1, 1, 1),
    "left-anterior-superior": (-1, 1, 1),
    "left-posterior-superior": (-1, -1, 1),
}
NRRD_SPACES |= {"".join(word[0] for word in name.split("-")): signs for name, signs in NRRD_SPACES.items()}


def nrrd_errors(path: Path) -> AbstractContextManager[None]:
    """A context in which what the library raises of a damaged file becomes an InputError."""
    return unreadable(
        lambda reason: (
            f"{path}: not a complete NRRD file, or of an encoding that is not read ({reason}); "
            "copy it again, or save it with encoding gzip"
        )
    )


def check_nrrd_header(path: Path) -> None:
    """InputError where a header names data outside of its folder, or claims more voxels than the file has or
    the limit of `medldm.bounds` allows, and where the data unpack to more than the header claims.
    """
    import nrrd

    with open(path, "rb") as file:
        header, start = nrrd.read_header(file), file.tell()
    name = header.get("datafile", header.get("data file"))
    if name is not None and leads_out(name):
        raise InputError(
            f"{path}: has its voxels in {name:.120}, outside of its folder; put it beside the header and "
            "name it there without a folder"
        )
    data, start = (path, start) if name is None else (path.parent / name, 0)
    holds = data.stat().st_size - start
    if int(header.get("lineskip", header.get("line skip", 0))) > holds:
        raise InputError(f"{path}: skips more lines than there are; copy or download it again")
    encoding = header["encoding"].lower()
    itemsize = np.dtype(nrrd.reader._TYPEMAP_NRRD2NUMPY[header["type"]]).itemsize
    times = {"raw": 1, "gzip": DEFLATE, "gz": DEFLATE, "bzip2": BZIP2, "bz2": BZIP2}.get(encoding, itemsize)
    size = check_claim(
        path, [int(n) for n in header["sizes"]], itemsize, holds=holds, times=times, kind="NRRD file"
    )
    if times > itemsize and holds * times > largest():
        with open(data, "rb") as file:
            file.seek(start)
            unpacker = bz2.BZ2Decompressor() if times == BZIP2 else zlib.decompressobj(zlib.MAX_WBITS | 16)
            check_unpacked(path, iter(lambda: file.read(PART), b""), size + PART, unpacker)


def nrrd_sizes(path: Path) -> tuple[int, ...]:
    """The number of voxels along each axis. The header alone is read."""
    import nrrd

    with nrrd_errors(path):
        return tuple(int(n) for n in nrrd.read_header(str(path))["sizes"])


def read_nrrd(path: Path, segment: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) and a RAS affine. `segment` picks one segment of a 3D Slicer segmentation by a part of its
    name, and gives a map of 0 and 1. Label 1 is taken where no segment has a name.

    InputError where the file is damaged, has several values a voxel, or does not say how it lies in the body.
    """
    import nrrd

    with nrrd_errors(path):
        check_nrrd_header(path)
        array, fields = nrrd.read(str(path))
        header = {key.lower(): value for key, value in fields.items()}
        return placed_volume(array, header, segment, path)


def placed_volume(
    array: np.ndarray, header: Mapping[str, Any], segment: str | None, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """As `read_nrrd`, from the whole array and the header, whose keys are in lower case."""
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
    """(4, 4) The affine from voxels to RAS, mm. InputError for a space that is not one of the body. A file
    without a space is read as ITK reads it, in LPS, with a warning.
    """
    space = str(header.get("space", "")).lower()
    if not space:
        log.warning("%s: names no space; it is read as left-posterior-superior, as ITK does", path)
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
    """(layer, label value) of the segment whose name contains `name`. Where no segment was given a name (3D
    Slicer's default is Segment_1), this is the only segment, or label 1 of the first layer with a warning.
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
