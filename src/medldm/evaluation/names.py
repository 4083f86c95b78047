"""Shortens long lists of names to one line of text."""

from collections.abc import Sequence
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
