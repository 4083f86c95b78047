"""Bounds the memory that the header of a file may claim.

The bound is half of the memory that is free when a file is read, or `MEDLDM_MAX_GIB` where that environment
variable is set.
"""

import os
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any

from medldm.errors import InputError

VARIABLE = "MEDLDM_MAX_GIB"
GIBIBYTE = 2**30
SHARE_OF_FREE = 0.5  # of the memory that is free
DEFLATE = 1032  # the most bytes that one byte of deflated data can unpack to
CGROUP = Path("/sys/fs/cgroup")
PART = 2**20  # bytes that are unpacked at a time


def check_number(key: str, value: Any, low: float, high: float, *, whole: bool = False) -> None:
    """InputError where the value of a key is no number from `low` to `high`, or, with `whole`, no integer."""
    is_number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        kind = "whole number" if whole else "number"
        raise InputError(f"{key}={value!s:.80}: give a {kind} from {low:g} to {high:g}")


def free_memory() -> int:
    """The bytes that this process can still allocate, on the machine or in its control group if that has
    less.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):  # "max" where there is no limit
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat.get("file", 0)))
    return max(free, 0)


def largest() -> int:
    """The most bytes that one array of a file may have."""
    stated = os.environ.get(VARIABLE)
    if stated is None:
        return int(SHARE_OF_FREE * free_memory())
    try:
        size = float(stated)
    except ValueError:
        size = 0.0
    if not 0 < size < 2**20:
        raise InputError(f"{VARIABLE}={stated}: give a number of GiB above 0")
    return int(size * GIBIBYTE)


def check_claim(
    place: object,
    shape: Sequence[int],
    itemsize: int,
    *,
    holds: float | None = None,
    times: float = 1,
    kind: str = "file",
) -> int:
    """The bytes of an array that a header claims. InputError where they are beyond the bound, or more than
    the `holds` bytes of the file can unpack to, at most `times` bytes each. `kind` names the kind of file in
    messages.
    """
    size = prod(int(n) for n in shape) * itemsize
    what = f"its header speaks of {' x '.join(map(str, shape))} values of {itemsize} bytes"
    mend = "copy or download it again, or remove its case"
    if min(shape, default=1) < 0:
        raise InputError(f"{place}: not a complete {kind}: {what}, which is no size; {mend}")
    if holds is not None and size > holds * times:
        raise InputError(f"{place}: not a complete {kind}: {what}, more than the file can hold; {mend}")
    if size > (bound := largest()):
        raise InputError(
            f"{place}: {what}, {size / GIBIBYTE:.3g} GiB, and the bound is {bound / GIBIBYTE:.3g} GiB; "
            f"remove its case, or set {VARIABLE} where it is meant"
        )
    return size


def check_unpacked(place: object, parts: Iterable[bytes], bound: int, unpacker: object = None) -> int:
    """The number of bytes that deflated data unpack to. They are counted in pieces, which are not kept.
    InputError where there are more than `bound`, zlib.error where the data are damaged.
    """
    unpack = zlib.decompressobj() if unpacker is None else unpacker
    count = 0
    for part in parts:
        while not unpack.eof and (part or not getattr(unpack, "needs_input", True)):
            count += len(unpack.decompress(part, PART))
            # bz2 has no such attribute: it keeps unread data itself
            part = getattr(unpack, "unconsumed_tail", b"")
            if count > bound:
                raise InputError(
                    f"{place}: unpacks to more than the {bound} bytes that it speaks of; copy or download it "
                    "again, or remove its case"
                )
    return count
