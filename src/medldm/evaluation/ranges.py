"""What the numbers of other programs' images mean: decided for a whole folder, refused where it is open."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from medldm.errors import InputError

NAMED = {"unit": (0.0, 1.0), "symmetric": (-1.0, 1.0)}
TOLERANCE = 1e-3  # beyond the ends of a range: rounding of another program
SPAN = (0.2, 50.0)  # of raw values over the reference's own intensity range: less or more is another unit
CHOICES = "unit, symmetric, raw or [low,high]"
Limits = tuple[float, float]


class ImageValues(Protocol):
    """What an image holds; `is_picture` where its type alone tells the range."""

    dtype: np.dtype
    low: float
    high: float
    is_picture: bool


def check_range(key: str, stated: object) -> None:
    if isinstance(stated, str):
        if stated in ("auto", "raw", *NAMED):
            return
    elif isinstance(stated, Sequence) and len(stated) == 2:
        low, high = stated
        if all(isinstance(end, int | float) for end in stated) and low < high:
            return
    raise InputError(f"{key}={stated}: choose auto, {CHOICES}, for instance [0,255]")


class Range(NamedTuple):
    """[low, high] of the files becomes [-1, 1]; None: the units of each reference, its `intensity_range`."""

    limits: Limits | None

    def of(self, attributes: Mapping) -> Limits:
        return self.limits or tuple(float(end) for end in attributes["intensity_range"])


def known_limits(attributes: Mapping) -> Limits | None:
    stated = attributes.get("intensity_range")
    return None if stated is None else (float(stated[0]), float(stated[1]))


def decide_range(
    key: str,
    stated: str | Sequence[float],
    folder: Path,
    images: Sequence[ImageValues],
    units: Sequence[Limits | None],
) -> Range:
    """`units`: what the raw values of each image's reference span. InputError where `auto` has not exactly
    one answer, or `raw` no units.
    """
    if not isinstance(stated, str):
        return Range((float(stated[0]), float(stated[1])))
    if stated == "raw" and None in units:
        raise InputError(f"{key}=raw: the reference does not record its units; give {key}=[low,high]")
    if stated == "raw":
        return Range(None)
    if stated in NAMED:
        return Range(NAMED[stated])
    if all(image.is_picture for image in images):
        return Range((0.0, picture_top(key, folder, images)))
    found = possible_ranges(images, units)
    if len(found) == 1:
        return Range(next(iter(found.values())))
    low, high = min(i.low for i in images), max(i.high for i in images)
    may_be = f"may be {' or '.join(found)}" if found else "fit no range that is known"
    raise InputError(f"{folder}: values from {low:.4g} to {high:.4g} {may_be}; set {key} to {CHOICES}")


def picture_top(key: str, folder: Path, images: Sequence[ImageValues]) -> float:
    """The largest number that pictures of one type hold. InputError where their depth is open."""
    types = sorted({image.dtype.itemsize * 8 for image in images})
    high = max(image.high for image in images)
    if len(types) > 1:
        raise InputError(f"{folder}: holds pictures of {types[0]} and {types[1]} bits; set {key}=[low,high]")
    if types[0] == 8:
        return 255.0
    depths = [bits for bits in (8, 10, 12, 14) if high < 2**bits]
    if types[0] == 16 and not depths:
        return 65535.0
    raise InputError(
        f"{folder}: pictures of {types[0]} bits with values up to {high:.0f}: their depth is open; set "
        f"{key}=[0,{2 ** (depths[0] if depths else types[0]) - 1}], for instance"
    )


def possible_ranges(
    images: Sequence[ImageValues], units: Sequence[Limits | None]
) -> dict[str, Limits | None]:
    """Every reading of the values of a folder that they and the reference's units leave open, by name."""
    low, high = min(image.low for image in images), max(image.high for image in images)
    found: dict[str, Limits | None] = {}
    if -1 - TOLERANCE <= low < -TOLERANCE and high <= 1 + TOLERANCE:
        found["symmetric"] = NAMED["symmetric"]
    if low >= -TOLERANCE and TOLERANCE < high <= 1 + TOLERANCE:
        found["unit"] = NAMED["unit"]
    if low >= -TOLERANCE and 100 <= high <= 255 + TOLERANCE:
        found["[0,255]"] = (0.0, 255.0)
    known = [(image, limits) for image, limits in zip(images, units, strict=True) if limits is not None]
    if len(known) == len(images) and fit_units(known):
        same = [
            name
            for name, ends in found.items()
            if all(np.allclose(ends, u, atol=TOLERANCE) for _, u in known)
        ]
        if not same:
            found["raw"] = None
    return found


def fit_units(known: Sequence[tuple[ImageValues, Limits]]) -> bool:
    """Whether values may be in the units of their references: spans of like size that overlap."""
    spans = [(image.high - image.low) / max(high - low, 1e-12) for image, (low, high) in known]
    overlap = [image.low < high and image.high > low for image, (low, high) in known]
    return SPAN[0] <= float(np.median(spans)) <= SPAN[1] and np.mean(overlap) > 0.5


def describe_range(what: str, folder: Path, limits: Limits | None, how: str) -> str:
    if limits is None:
        return f"{what} {folder}: values taken in the units of the reference ({how})"
    return f"{what} {folder}: values taken as [{limits[0]:g}, {limits[1]:g}] ({how})"


def decide_reference(
    key: str, stated: str | Sequence[float], folder: Path, images: Sequence[ImageValues]
) -> Range:
    """The range of the reference images, as `stated` or found from their values."""
    if stated == "raw":
        return Range(None)
    nothing: list[Limits | None] = [None] * len(images)
    pictures = all(image.is_picture for image in images)
    if stated != "auto" or pictures:
        return decide_range(key, stated, folder, images, nothing)
    found = possible_ranges(images, nothing)
    if not found:
        return Range(None)
    if "[0,255]" in found and any(image.dtype != np.uint8 for image in images):
        raise InputError(f"{folder}: values from 0 to 255 may be [0,255] or raw; set {key}=[0,255] or raw")
    return Range(next(iter(found.values())))
