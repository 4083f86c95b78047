"""Images that are read when they are asked for: an evaluation holds a few of them at a time, not all."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from medldm.data.hdf5 import open_hdf5
from medldm.data.records import ImageRecord, read_images, slice_image


@dataclass(frozen=True)
class StoredImage:
    """The shape of an array and how to read it; every `read()` reads again."""

    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


Image = np.ndarray | StoredImage


def load(image: Image | None) -> np.ndarray | None:
    return image.read() if isinstance(image, StoredImage) else image


def read_again(file: Path, sample: int, part: str) -> np.ndarray:
    """The `image` or `mask` of a file that holds one volume."""
    return getattr(next(iter(read_images(file, sample=sample))), part)


def read_slice(file: Path, sample: int, part: str, row: int) -> np.ndarray:
    """The `image`, `edges` or `mask` of one slice of a file of slices."""
    reader = open_hdf5(file)
    if part == "image":
        return slice_image(reader, "images" if sample == 0 else f"images_{sample}", row)
    return reader.read_row(part, row)[None]


def store(record: ImageRecord, file: Path, sample: int = 0) -> ImageRecord:
    """The record of an HDF5 file without its arrays: how to read them stands in their place."""
    if not isinstance(record.image, np.ndarray):
        return record
    row = record.attributes.get("row") if record.image.ndim == 3 else None
    stored = {}
    for part in ("image", "edges", "mask"):
        array = getattr(record, part)
        if array is not None:
            again = partial(read_again, file, sample, part)
            read = again if row is None else partial(read_slice, file, sample, part, row)
            stored[part] = StoredImage(array.shape, read)
    return record._replace(**stored)


def hdf5_files(folder: Path) -> list[Path]:
    """The HDF5 files of a folder, in order, without hidden ones: macOS leaves `._name.h5` on shared disks."""
    return [file for file in sorted(folder.glob("*.h5")) if not file.name.startswith(".")]
