"""What is known of an image besides its voxels: view, phase and label, numbered by tables of names."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medldm.errors import InputError

UNKNOWN = -1  # number of what nobody stated; an unknown place in a stack is NaN
TABLES = {
    "view": "view_names",
    "phase": "phase_names",
    "label": "label_values",
}  # kind -> key of index and facts
UNNAMED = "class "  # how a class is called whose name is not published


def renumber(own: Sequence[str], known: Sequence[str]) -> list[int]:
    """The number among `known` of each of `own`; UNKNOWN for a name that is not there."""
    return [known.index(name) if name in known else UNKNOWN for name in own]


def with_unknown(index: dict) -> dict:
    """An index of an earlier version, which wrote 0 for what nobody stated: UNKNOWN instead, in place.

    Nothing is stated where a case's numbers are all 0 and its acquisitions share no such attribute.
    """
    for kind, table in TABLES.items():
        for case in index["cases"] if index.get(table) else ():
            holder = case.get("slices", case)
            numbers = holder.get(kind)
            if case.get("attributes", {kind: None}).get(kind, "") != "":
                continue
            if isinstance(numbers, list) and not any(numbers):
                holder[kind] = [UNKNOWN] * len(numbers)
            elif numbers == 0:
                holder[kind] = UNKNOWN
    return index


def class_names(facts: Mapping[str, Any]) -> list[str] | None:
    """Names of a mask's classes, or None where they are not all known."""
    names = facts.get("label_names")
    return (
        None if not names or any(str(name).startswith(UNNAMED) for name in names) else list(map(str, names))
    )


def check_class_names(
    trained: Mapping[str, Any], given: Mapping[str, Any], what: str, root: str | Path
) -> None:
    """InputError where a model and the maps of `root` call the same number by two names. Classes without
    names are taken by their numbers.
    """
    known, own = class_names(trained), class_names(given)
    if known is None or own is None or known == own:
        return
    mend = "prepare the data with the classes it knows"
    if sorted(known) == sorted(own):
        preprocess = given.get("preprocess") or {}
        earlier = (preprocess.get("labels") or {}).get("mapping") or {i: i for i in range(len(own))}
        mapping = ", ".join(f"{raw}: {known.index(own[number])}" for raw, number in earlier.items())
        names = ", ".join(known)
        key = "data.preprocess.labels"
        mend = f"prepare with '+{key}.mapping={{{mapping}}}' '{key}.names=[{names}]'"
    raise InputError(f"{what} the classes {', '.join(known)}, but {root} has {', '.join(own)}; {mend}")


def check_order(trained: Mapping[str, Any], given: Mapping[str, Any], what: str) -> None:
    """InputError where weights and data number the same views, phases, labels or classes in another order.
    Other names altogether are another task, which fine-tuning may go on to.
    """
    for table in (*TABLES.values(), "label_names"):
        known, own = (list(map(str, facts.get(table) or [])) for facts in (trained, given))
        if known != own and sorted(known) == sorted(own):
            raise InputError(
                f"{what}: numbers {table} as {', '.join(known)}, the data as {', '.join(own)}; prepare the "
                "data in that order"
            )


def check_nulls(embedded: Sequence[str], nulls: Sequence[str], unstated: Sequence[str], what: str) -> None:
    """InputError where images do not state an attribute that a model embeds, and training never shows the
    model an unknown one: its null would be an untrained vector. `what` names the images.
    """
    for name in unstated:
        if name in embedded and name not in nulls:
            raise InputError(
                f"{what} state no {name}, and training never sees an unknown one; state it for them and "
                "prepare again, or train with model.conditioner.drop_all_prob=0.1"
            )
