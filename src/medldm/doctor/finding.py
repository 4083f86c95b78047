"""One line of the doctor's table."""

from typing import NamedTuple

OK, TO_NOTE, WRONG = "ok", "note", "wrong"


class Finding(NamedTuple):
    """What was checked, and its state: "ok", "note" (it works, with restrictions) or "wrong"."""

    topic: str
    name: str
    text: str
    state: str = OK
    mend: str = ""  # what to do about it; empty where nothing needs to be done
