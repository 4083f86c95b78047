"""What was made from what: digests of settings, files and arrays, by which a cache knows its inputs again.

A raw file is known by its content, so that a moved or copied dataset stays the same one. A file whose size
and times have not changed since it was last read is not read again; the time of the inode's change (ctime),
which no program can set back, is one of them.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

SETTLED_NS = 2_000_000_000  # a file changed less long ago may change again within its time stamp
KNOWN: dict[tuple, tuple[str, int]] = {}  # state of a file -> sha256 of its content, and when it was read
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
    """State and `sha256` of a file, or of the several `files` that an image lies in (a DICOM series, a header
    with its data: then of their names and contents), and the time at which they were read.
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
    """Take over what an earlier process read, of files whose size and times are still the same."""
    for record in records:
        if not {*STATE, "sha256", "read_ns"} <= record.keys():
            continue  # written before contents were recorded
        if record["read_ns"] - max(record["mtime_ns"], record["ctime_ns"]) > SETTLED_NS:
            KNOWN.setdefault(tuple(record[name] for name in STATE), (record["sha256"], record["read_ns"]))
