"""The box that training cuts out of an image, and the sizes of images that follow from it."""

from collections.abc import Collection, Sequence
from pathlib import Path

from medldm.errors import InputError

BoxSize = tuple[int | None, ...]  # by axis; None for an axis that is kept whole


def box_size(root: Path, index: dict, crop_size: int | Sequence[int | None] | None) -> BoxSize | None:
    """`crop_size` for each axis of the images of an index, None where nothing is cut. InputError, which names
    the file, where a case is smaller.
    """
    dims = index["spatial_dims"]
    if crop_size is None:
        return None
    size = (crop_size,) * dims if isinstance(crop_size, int) else tuple(crop_size)
    if len(size) != dims or min((n for n in size if n is not None), default=1) < 1:
        raise InputError(f"data.crop_size={list(size)}: give one number, or {dims} of them, above 0")
    for case in index["cases"]:
        shape = case.get("shape") or index["image_size"] or ()
        if any(n is not None and n > m for n, m in zip(size, shape, strict=False)):
            raise InputError(
                f"data.crop_size={list(size)}: {root / case['file']} has {list(shape)} only; take a "
                "smaller box, or prepare with data.preprocess.min_size or data.image_size to pad it"
            )
    return size


def image_sizes(
    root: Path, index: dict, box: BoxSize | None, subjects: Collection[str]
) -> dict[tuple[int, ...], Path]:
    """The grids of the images of `subjects` once `box` is cut out of them, each with one of their files."""
    dims = index["spatial_dims"]
    sizes: dict[tuple[int, ...], Path] = {}
    for case in index["cases"]:
        shape = (case.get("shape") or index["image_size"] or ())[-dims:]
        if case["subject"] in subjects and len(shape) == dims:
            size = tuple(m if n is None else n for n, m in zip(box or [None] * dims, shape, strict=True))
            sizes.setdefault(size, root / case["file"])
    return sizes
