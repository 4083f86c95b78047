"""Prepared HDF5 files, opened once in every process and read by rows."""

import json
import os
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medldm.data.raw.image import require_file
from medldm.errors import InputError

if TYPE_CHECKING:
    import h5py

# Attributes that say what a file was made from: a prepared case of raw files and recipe, latents of an image.
STAMPS = ("fingerprint", "image_digest")
BODY = "body"  # of a case that `mask_out` emptied: where it was not, (X, Y, Z) bool of the raw volume
# Names that the 2D schema and the rest of the program use for the same thing.
DATASET_NAMES = {"image": ("images", "image"), "mask": ("semantic_maps", "mask"), "edges": ("edges",)}


class HDF5Reader:
    """Rows of an HDF5 file. Unfiltered chunks are read straight from the file at their stored offset.

    That is several times faster than h5py (no locks, no chunk cache) and holds no HDF5 state that a fork
    could share. Filtered or oddly chunked datasets go through h5py.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        self.path = Path(path)
        try:
            self.file = h5py.File(require_file(self.path), "r")
        except OSError as error:
            raise InputError(
                f"{path}: not a complete HDF5 file ({str(error).splitlines()[0]}); run `medldm prepare` again"
            ) from error
        self.descriptor = os.open(self.path, os.O_RDONLY)
        self.identity = file_identity(self.path)
        self.stamps = {key: self.file.attrs[key] for key in STAMPS if key in self.file.attrs}
        self.offsets: dict[str, np.ndarray | None] = {}
        self.datasets: dict[str, h5py.Dataset] = {}
        self.maps: dict[str, np.ndarray] = {}

    def dataset(self, key: str) -> "h5py.Dataset":
        if key not in self.datasets:
            names = [name for name in DATASET_NAMES.get(key, (key,)) if name in self.file]
            if not names:
                raise InputError(
                    f"{self.path}: holds no dataset '{key}'; prepare it again with this part switched on"
                )
            self.datasets[key] = self.file[names[0]]
        return self.datasets[key]

    def __contains__(self, key: str) -> bool:
        return any(name in self.file for name in DATASET_NAMES.get(key, (key,)))

    @property
    def attributes(self) -> dict:
        return {
            key: value.tolist() if hasattr(value, "tolist") else value
            for key, value in self.file.attrs.items()
        }

    def row_offsets(self, key: str) -> np.ndarray | None:
        """Byte offset of every row, or None where rows are not stored whole and unfiltered."""
        if key not in self.offsets:
            self.offsets[key] = find_row_offsets(self.dataset(key))
        return self.offsets[key]

    def read_row(self, key: str, row: int) -> np.ndarray:
        """One row of a dataset (one slice of `images`), in its stored dtype."""
        dataset, offsets = self.dataset(key), self.row_offsets(key)
        if offsets is not None:
            out = np.empty(dataset.shape[1:], dataset.dtype)
            if os.preadv(self.descriptor, [out], int(offsets[row])) == out.nbytes:
                return out
        return self.read(key, row)

    def read(self, key: str, selection: object = ()) -> np.ndarray:
        dataset = self.dataset(key)
        try:
            return dataset[selection]
        except OSError as error:
            raise InputError(
                f"{self.path}: dataset '{key}' is damaged ({str(error).splitlines()[0]}); run `medldm "
                "prepare` again"
            ) from error

    def mapped(self, key: str) -> np.ndarray:
        """The whole dataset, mapped into memory where it is stored in one unfiltered piece: a crop reads only
        itself.
        """
        if key not in self.maps:
            dataset = self.dataset(key)
            offset = dataset.id.get_offset() if dataset.chunks is None and dataset.dtype.isnative else None
            if offset is None:
                return self.read(key)
            self.maps[key] = np.memmap(self.path, dataset.dtype, "r", offset, dataset.shape)
        return self.maps[key]

    def is_current(self) -> bool:
        """Whether the path still leads to the file that was opened."""
        return file_identity(self.path) == self.identity

    def close(self) -> None:
        self.file.close()
        os.close(self.descriptor)


def file_identity(path: Path) -> tuple[int, int, int] | None:
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def find_row_offsets(dataset: "h5py.Dataset") -> np.ndarray | None:
    from h5py import h5d

    plain = dataset.dtype.isnative and dataset.ndim > 1 and dataset.id.get_create_plist().get_nfilters() == 0
    if not plain or len(dataset) == 0:
        return None
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        row_bytes = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
        return None if start is None else start + row_bytes * np.arange(len(dataset), dtype=np.int64)
    if dataset.chunks != (1, *dataset.shape[1:]) or not isinstance(dataset.id, h5d.DatasetID):
        return None
    offsets = np.full(len(dataset), -1, np.int64)
    for i in range(dataset.id.get_num_chunks()):
        info = dataset.id.get_chunk_info(i)
        offsets[info.chunk_offset[0]] = info.byte_offset
    return offsets if (offsets >= 0).all() else None


class HandleCache:
    """Open HDF5 files of this process, the least recently used closed first. After a fork the child starts
    afresh.
    """

    def __init__(self, max_open: int = 128) -> None:
        self.max_open = max_open
        self.pid = os.getpid()
        self.readers: OrderedDict[str, HDF5Reader] = OrderedDict()
        self.inherited: list = []

    def get(self, path: str | Path) -> HDF5Reader:
        if self.pid != os.getpid():
            self.inherited.append(self.readers)  # kept, not closed: the file state belongs to the parent
            self.readers, self.pid = OrderedDict(), os.getpid()
        key = str(path)
        if key in self.readers:
            if self.readers[key].is_current():
                self.readers.move_to_end(key)
                return self.readers[key]
            self.readers.pop(key).close()
        while len(self.readers) >= self.max_open:
            self.readers.popitem(last=False)[1].close()
        self.readers[key] = HDF5Reader(Path(path))
        return self.readers[key]


HANDLES = HandleCache()


def open_hdf5(path: str | Path) -> HDF5Reader:
    """The reader of a file, shared within this process and opened on first use."""
    return HANDLES.get(path)


def made_from(path: str | Path) -> dict[str, str]:
    """Digests of the arrays of a case that a sample was made from, by key; {} where the file states none."""
    return json.loads(open_hdf5(path).attributes.get("made_from", "{}"))
