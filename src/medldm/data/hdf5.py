"""Reads prepared HDF5 files by rows. Each file is opened once in every process."""

import json
import os
from collections import OrderedDict
from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medldm.bounds import DEFLATE, check_claim, check_unpacked, largest
from medldm.data.raw.image import require_file
from medldm.errors import InputError, unreadable
from medldm.fingerprints import array_digest

if TYPE_CHECKING:
    import h5py

# Attributes of a file that say what it was made from: of a case raw files and recipe, of latents the image.
STAMPS = ("fingerprint", "image_digest", "latents_digest")
BODY = "body"  # of a case that `mask_out` emptied: where it was not, (X, Y, Z) bool of the raw volume
NUMBER_KINDS = "biuf"  # of numbers: other kinds hold pointers, which the file decides
MOST_LINKS = 16  # of soft links in a row
# Names of the 2D schema, and of the rest of the program for the same thing.
DATASET_NAMES = {"image": ("images", "image"), "mask": ("semantic_maps", "mask"), "edges": ("edges",)}


class HDF5Reader:
    """Reads rows of an HDF5 file. Unfiltered chunks are read directly from the file at their stored offset.

    That is several times faster than h5py (without locks and a cache of chunks), and leaves no HDF5 state
    that processes could share after a fork. Filtered or oddly chunked datasets go through h5py.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        self.path = Path(path)
        with hdf5_errors(self.path, "not a complete HDF5 file"):
            self.file = h5py.File(require_file(self.path), "r")
            self.stamps = {key: self.file.attrs[key] for key in STAMPS if key in self.file.attrs}
        self.descriptor = os.open(self.path, os.O_RDONLY)
        self.identity = file_identity(self.path)
        self.offsets: dict[str, np.ndarray | None] = {}
        self.datasets: dict[str, h5py.Dataset] = {}
        self.maps: dict[str, np.ndarray] = {}

    def dataset(self, key: str) -> "h5py.Dataset":
        if key not in self.datasets:
            with hdf5_errors(self.path, f"dataset '{key}' is damaged"):
                found = (linked_dataset(self.file, name) for name in DATASET_NAMES.get(key, (key,)))
                dataset = next((one for one in found if one is not None), None)
                if dataset is None:
                    raise InputError(
                        f"{self.path}: holds no dataset '{key}'; prepare it again with this part switched on"
                    )
                check_dataset(dataset, self.path)
            self.datasets[key] = dataset
        return self.datasets[key]

    def __contains__(self, key: str) -> bool:
        with hdf5_errors(self.path, f"dataset '{key}' is damaged"):
            return any(linked_dataset(self.file, name) is not None for name in DATASET_NAMES.get(key, (key,)))

    @property
    def names(self) -> set[str]:
        """The names of the datasets and groups at the top of the file."""
        with hdf5_errors(self.path, "its names are damaged"):
            return set(self.file)

    @property
    def attributes(self) -> dict:
        with hdf5_errors(self.path, "its attributes are damaged"):
            return {
                key: value.tolist() if hasattr(value, "tolist") else value
                for key, value in self.file.attrs.items()
            }

    def row_offsets(self, key: str) -> np.ndarray | None:
        """The byte offset of every row; None where rows are not stored whole and unfiltered."""
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
        with hdf5_errors(self.path, f"dataset '{key}' is damaged"):
            return dataset[selection]

    def check_content(self, key: str, digest: str | None) -> None:
        """InputError where the content of a dataset does not have this `array_digest`. It is read
        and compared once in each process.
        """
        if digest is None or (self.identity, key) in CHECKED:
            return
        if array_digest(self.read(key)) != digest:
            raise InputError(
                f"{self.path}: dataset '{key}' is damaged: it differs from what index.json says; delete "
                "the file and run `medldm prepare` again"
            )
        CHECKED.add((self.identity, key))

    def mapped(self, key: str) -> np.ndarray:
        """The whole dataset, mapped into memory where it is stored in one unfiltered piece, so that a crop
        reads only its own part.
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


def hdf5_errors(path: Path, what: str) -> AbstractContextManager[None]:
    """A context in which whatever the library raises of a damaged file becomes an InputError."""
    return unreadable(lambda reason: f"{path}: {what} ({reason}); run `medldm prepare` again")


def linked_dataset(file: "h5py.File", name: str, depth: int = 0) -> "h5py.Dataset | None":
    """The dataset of a name, None where there is none. InputError where a link leads into another file, which
    is not opened.
    """
    import h5py

    if depth > MOST_LINKS:
        raise InputError(f"{file.filename}: its links lead in circles; save it again without them")
    node, place = file, ""
    for step in filter(None, name.split("/")):
        link = node.get(step, getlink=True) if isinstance(node, h5py.Group) and step != "." else None
        if link is None:
            return None
        if isinstance(link, h5py.ExternalLink):
            raise InputError(
                f"{file.filename}: '{name}' is a link into another file ({link.filename}); save the data in "
                "this file"
            )
        place += f"/{step}"
        if isinstance(link, h5py.SoftLink):
            target = link.path if link.path.startswith("/") else f"{place.rpartition('/')[0]}/{link.path}"
            node = linked_dataset(file, target, depth + 1)
            if node is None:
                return None
        else:
            node = node[step]
    return node if depth or isinstance(node, h5py.Dataset) else None


def check_dataset(dataset: "h5py.Dataset", path: Path) -> None:
    """InputError for a dataset that is no array of numbers in this very file, and for one that claims more
    than it can hold, or unpacks to more than it claims.
    """
    place = f"{path}::{dataset.name.lstrip('/')}"
    if dataset.external or dataset.is_virtual:
        raise InputError(f"{place}: its values lie in other files; save them in this one")
    if dataset.dtype.kind not in NUMBER_KINDS:
        raise InputError(f"{place}: holds {dataset.dtype}, no numbers; save it as integers or floats")
    stored = dataset.id.get_storage_size()
    holds, times = (None, 1) if dataset.chunks else (stored, 1)
    check_claim(place, dataset.shape, dataset.dtype.itemsize, holds=holds, times=times)
    if dataset.chunks:
        chunk = check_claim(place, dataset.chunks, dataset.dtype.itemsize)
        if dataset.id.get_create_plist().get_nfilters() and DEFLATE * stored > largest():
            check_chunks(dataset, chunk, place)


def check_datasets(file: "h5py.File", path: Path, *, besides: Collection[str]) -> None:
    """Calls `check_dataset` for all datasets at the top of a file but those named `besides`, which
    are texts.
    """
    for name in file:
        dataset = linked_dataset(file, name)
        if dataset is not None and name not in besides:
            check_dataset(dataset, path)


def check_chunks(dataset: "h5py.Dataset", size: int, place: str) -> None:
    """InputError where a deflated chunk unpacks to more than its `size`; the library would unpack it all."""
    for i in range(dataset.id.get_num_chunks()):
        offset = dataset.id.get_chunk_info(i).chunk_offset
        skipped, data = dataset.id.read_direct_chunk(offset)
        if dataset.compression == "gzip" and not skipped:
            check_unpacked(place, [data], size + 4)  # a checksum may follow


def file_identity(path: Path) -> tuple[int, int, int] | None:
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def find_row_offsets(dataset: "h5py.Dataset") -> np.ndarray | None:
    """The byte offset of every row of a dataset; None where h5py must read it."""
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
    """The open HDF5 files of this process; the least recently used is closed first. After a fork the child
    opens its own.
    """

    def __init__(self, max_open: int = 128) -> None:
        self.max_open = max_open
        self.pid = os.getpid()
        self.readers: OrderedDict[str, HDF5Reader] = OrderedDict()
        self.inherited: list = []

    def get(self, path: str | Path) -> HDF5Reader:
        """The reader of a file, which is opened again where the file has been replaced."""
        if self.pid != os.getpid():
            # not closed, since the state of the files belongs to the parent
            self.inherited.append(self.readers)
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
CHECKED: set[tuple] = set()  # (identity of a file, dataset) whose content was compared with its digest


def open_hdf5(path: str | Path) -> HDF5Reader:
    """The reader of a file, shared within this process and opened on first use."""
    return HANDLES.get(path)


def made_from(path: str | Path) -> dict[str, str]:
    """Digests of the arrays of a case that a sample was made from, by key; {} where the file states none."""
    return json.loads(open_hdf5(path).attributes.get("made_from", "{}"))
