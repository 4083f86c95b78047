"""Shortens long lists of names to one line of text."""

from collections.abc import Sequence

NUM_NAMED = 3  # of a list in a line


def first_names(names: Sequence[str]) -> str:
    """The first few of the names, with dots where there are more."""
    return ", ".join(names[:NUM_NAMED]) + (", ..." if len(names) > NUM_NAMED else "")
