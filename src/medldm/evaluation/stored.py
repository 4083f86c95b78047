"""Volumes that are read when they are asked for: an evaluation holds a few of them at a time, not all."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from medldm.data.records import ImageRecord, read_images


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


def store(record: ImageRecord, file: Path | None, sample: int = 0) -> ImageRecord:
    """The record of a volume without its arrays; a slice keeps them, it is small."""
    if not isinstance(record.image, np.ndarray) or record.image.ndim < 4 or file is None:
        return record
    stored = {
        part: StoredImage(array.shape, partial(read_again, file, sample, part))
        for part in ("image", "mask")
        if (array := getattr(record, part)) is not None
    }
    return record._replace(**stored)


def hdf5_files(folder: Path) -> list[Path]:
    """The HDF5 files of a folder, in order, without hidden ones: macOS leaves `._name.h5` on shared disks."""
    return [file for file in sorted(folder.glob("*.h5")) if not file.name.startswith(".")]
