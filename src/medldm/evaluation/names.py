"""Shortens long lists of names to one line of text, and tells the faults of several folders in one."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from medldm.errors import InputError

NUM_NAMED = 3  # of a list in a line
NUM_BROKEN = 5  # files whose fault is told in a line


def first_names(names: Sequence[str]) -> str:
    """The first few of the names, with dots where there are more."""
    return ", ".join(names[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")


def check_broken(path: Path, broken: Sequence[str], num_files: int) -> None:
    """InputError that names every file that cannot be used, as far as they fit in a line."""
    if len(broken) == 1:
        raise InputError(broken[0])
    if broken:
        shown = "; ".join(line.partition("; ")[0] for line in broken[:NUM_BROKEN])
        more = f"; and {len(broken) - NUM_BROKEN} more" if len(broken) > NUM_BROKEN else ""
        raise InputError(
            f"{path}: {len(broken)} of {num_files} files cannot be used: {shown}{more}; write them again, or "
            "take them out"
        )


def faults_of(read: Callable[[], object]) -> list[str]:
    """The line of the InputError that `read()` raises; none where it raises nothing."""
    try:
        read()
    except InputError as error:
        return [str(error)]
    return []


@contextmanager
def besides(look: Callable[[], Iterable[str]]) -> Iterator[None]:
    """A context whose InputError also tells what `look` finds wrong in another folder: whoever mends the one
    learns of the other at once.
    """
    try:
        yield
    except InputError as error:
        others = [line for line in look() if line not in str(error)]
        if not others:
            raise
        raise InputError("; also: ".join([str(error), *others])) from error
