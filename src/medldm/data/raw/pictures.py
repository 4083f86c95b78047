"""Reads pictures (PNG, JPEG, BMP, TIFF) as grey values or as class numbers."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from medldm.bounds import check_claim
from medldm.data.raw.formats import no_output_of_libraries
from medldm.errors import InputError, unreadable

log = logging.getLogger(__name__)
MOST_BYTES = 8  # of one decoded pixel: four channels of 16 bits
EXIF_SUFFIXES = (".png", ".jpg", ".jpeg")
EXIF_ORIENTATION = 0x0112
# EXIF 2.3, tag Orientation: how the stored rows and columns are turned to be shown; 1 leaves them as they
# are.
EXIF_TURNS = {
    2: np.fliplr,
    3: lambda x: np.rot90(x, 2),
    4: np.flipud,
    5: lambda x: np.swapaxes(x, 0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: np.swapaxes(np.rot90(x, 2), 0, 1),
    8: np.rot90,
}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_NOTES = (b"eXIf", b"tEXt", b"zTXt", b"iTXt")
COLOUR_ROUNDING = 3 / 255  # of the largest value: by so much JPEG may separate the channels of a grey picture


def read_raster_mask(path: Path) -> np.ndarray:
    """(H, W) class numbers of a PNG, BMP or TIFF; where it has a palette, the numbers and not the colours.

    InputError where the file is damaged, has several pages, or holds colours or lossy JPEG.
    """
    picture, data = decode_raster(path), path.read_bytes()
    if data.startswith(b"\xff\xd8"):
        raise InputError(f"{path}: JPEG changes class numbers; save the mask as PNG, from its source")
    if data[:2] in (b"\x89P", b"BM") and (numbers := palette_numbers(path)) is not None:
        return turned_by_exif(numbers, path)
    if picture.ndim == 3 and (picture != picture[..., :1]).any():
        raise InputError(
            f"{path}: a mask must hold class numbers in one channel, not colours; save it as grey"
        )
    return to_grey(picture)


def decode_raster(path: Path) -> np.ndarray:
    """(H, W), or (H, W, 3) blue, green, red, of a PNG, JPEG, BMP or TIFF with its bit depth kept, turned as
    its EXIF orientation says (PNG, JPEG).

    InputError where the file is damaged or has several pages.
    """
    import cv2

    data = path.read_bytes()
    suffix = path.suffix.lower()
    complete = {".png": b"IEND" in data[-64:]}.get(suffix, True)
    if suffix in (".jpg", ".jpeg"):
        complete = b"\xff\xd9" in data[-1024:]
    array = decoded(path, data) if data and complete else None
    if array is None:
        raise InputError(f"{path}: not a complete image file; copy or download it again, or remove its case")
    with no_output_of_libraries():
        pages = cv2.imcount(str(path), cv2.IMREAD_UNCHANGED) if suffix in (".tif", ".tiff") else 1
    if pages > 1:
        raise InputError(f"{path}: holds {pages} pages; save one picture a file, or the stack as NIfTI")
    if array.ndim == 3 and array.shape[-1] == 4 and np.ptp(array[..., 3]) > 0:
        log.warning("%s: partly transparent; its transparency is ignored", path)
    return turned_by_exif(array if array.ndim == 2 else np.ascontiguousarray(array[..., :3]), path)


@contextmanager
def quiet() -> Iterator[None]:
    """A context without Pillow's warnings: a damaged picture ends in our one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def decoded(path: Path, data: bytes) -> np.ndarray | None:
    """The picture in the bytes of a file, None where they are no picture. InputError where it would be larger
    than the limit of `medldm.bounds`. What libpng and libtiff print of a damaged file is suppressed.
    """
    import cv2
    from PIL import Image as Picture

    size, Picture.MAX_IMAGE_PIXELS = Picture.MAX_IMAGE_PIXELS, None  # check_claim has a limit of its own
    try:
        with quiet(), Picture.open(io.BytesIO(data)) as header:
            check_claim(path, header.size, MOST_BYTES)
    except InputError:
        raise
    except Exception:  # a header that Pillow does not understand says nothing
        log.debug("%s: its header is not Pillow's", path)
    finally:
        Picture.MAX_IMAGE_PIXELS = size
    try:
        with no_output_of_libraries():
            return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:
        return None


def turned_by_exif(picture: np.ndarray, path: Path) -> np.ndarray:
    """A decoded picture (H, W[, 3]), turned as it is to be shown: cameras and phones store it as their sensor
    was held, and state in EXIF how to turn it.
    """
    turn = EXIF_TURNS.get(exif_orientation(path))
    return picture if turn is None else np.ascontiguousarray(turn(picture))


def is_turned(path: Path) -> bool:
    """Whether reading turns a picture from how its rows and columns are stored. Its pixels are not read."""
    return exif_orientation(path) in EXIF_TURNS


def exif_orientation(path: Path) -> int:
    """The orientation that EXIF states, 1 to 8; 1 where it states none, and for files that are no PNG or
    JPEG.
    """
    from PIL import Image as Picture

    suffix = path.suffix.lower()
    if suffix not in EXIF_SUFFIXES or (suffix == ".png" and not has_notes(path)):
        return 1
    try:
        with quiet(), Picture.open(path) as header:
            return header.getexif().get(EXIF_ORIENTATION, 1)
    except Exception:  # a header that Pillow does not understand says nothing
        return 1


def has_notes(path: Path) -> bool:
    """Whether a PNG has a chunk that can hold EXIF. Pillow would have to decode the picture to find
    that out.
    """
    with open(path, "rb") as file:
        file.seek(len(PNG_SIGNATURE))
        while len(header := file.read(8)) == 8:
            if header[4:] in PNG_NOTES:
                return True
            file.seek(int.from_bytes(header[:4]) + 4, 1)  # skips the chunk's data and their checksum
    return False


def to_grey(picture: np.ndarray) -> np.ndarray:
    """(H, W) A decoded picture in grey: equal channels stay as they are, colours become luminance (ITU-R
    BT.601).
    """
    import cv2

    if picture.ndim == 2:
        return picture
    if (picture == picture[..., :1]).all():
        return np.ascontiguousarray(picture[..., 0])
    return cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)


def is_coloured(picture: np.ndarray) -> bool:
    """Whether the channels of a decoded picture differ by more than rounding."""
    if picture.ndim == 2:
        return False
    is_integer = np.issubdtype(picture.dtype, np.integer)
    largest = np.iinfo(picture.dtype).max if is_integer else np.abs(picture).max()
    gap = picture.max(-1).astype(np.float64) - picture.min(-1)
    return bool(gap.max() > COLOUR_ROUNDING * largest)


def palette_numbers(path: Path) -> np.ndarray | None:
    """(H, W) The palette indices of a picture, as Pascal VOC stores its classes; None where it has no
    palette.

    InputError where the palette is grey but does not map each number to itself: then nothing says whether the
    number or the grey level is the class.
    """
    from PIL import Image as Picture

    damaged = f"{path}: its palette cannot be read; save it as 8-bit grey"
    with unreadable(damaged), quiet(), Picture.open(path) as picture:
        if picture.mode != "P":
            return None
        numbers, grey = np.asarray(picture), np.asarray(picture.convert("RGB"))
    if (grey == grey[..., :1]).all() and (grey[..., 0] != numbers).any():
        raise InputError(
            f"{path}: its palette gives other grey levels than its numbers, so either could be the class; "
            "save it as 8-bit grey without a palette"
        )
    return numbers
