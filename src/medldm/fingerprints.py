"""Digests of settings, files and arrays, which tell from what something was made, and whether that has
changed.

A raw file is known by its content, so that a moved or copied dataset stays the same. A file whose size and
times have not changed since it was last read is not read again. One of these times is that of the inode
(ctime), which no program can set back.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SETTLED_NS = 2_000_000_000  # a file that changed more recently may change again without another time stamp
KNOWN: dict[
    tuple, tuple[str, int]
] = {}  # by the state of a file: the sha256 of its content, and when it was read
STATE = ("path", "num_files", "size", "mtime_ns", "ctime_ns")


def digest(content: Any) -> str:
    """16 hexadecimal digits of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_sha256(path: str | Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def array_digest(array: np.ndarray) -> str:
    """16 hexadecimal digits of an array's data type, shape and values."""
    described = hashlib.sha256(f"{array.dtype.str} {array.shape}".encode())
    described.update(np.ascontiguousarray(array))
    return described.hexdigest()[:16]


def state_of(path: Path, files: Sequence[Path]) -> dict[str, Any]:
    """The path, and the size, newest change and newest inode change of its files together."""
    states = [file.stat() for file in files]
    return {
        "path": str(path),
        "num_files": len(files),
        "size": sum(state.st_size for state in states),
        "mtime_ns": max((state.st_mtime_ns for state in states), default=0),
        "ctime_ns": max((state.st_ctime_ns for state in states), default=0),
    }


def content_of(path: Path, files: Sequence[Path] | None = None) -> dict[str, Any]:
    """The state and `sha256` of a file, and the time at which it was read. Of an image in several `files` (a
    DICOM series, a header with its data) the hash is of their names and contents.
    """
    files = [path] if files is None else list(files)
    state = state_of(path, files)
    key = tuple(state[name] for name in STATE)
    if key not in KNOWN:
        now = time.time_ns()
        KNOWN[key] = (file_sha256(path) if files == [path] else files_sha256(files), now)
    sha256, read_ns = KNOWN[key]
    return state | {"sha256": sha256, "read_ns": read_ns}


def files_sha256(files: Sequence[Path]) -> str:
    parts = [(file.name, file_sha256(file)) for file in files]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def recall(records: Iterable[Mapping[str, Any]]) -> None:
    """Reuses the hashes of an earlier process for files whose size and times are still the same."""
    for record in records:
        if not {*STATE, "sha256", "read_ns"} <= record.keys():
            continue  # an earlier version, which did not record contents
        if record["read_ns"] - max(record["mtime_ns"], record["ctime_ns"]) > SETTLED_NS:
            KNOWN.setdefault(tuple(record[name] for name in STATE), (record["sha256"], record["read_ns"]))
