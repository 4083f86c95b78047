"""What is known of an image besides its voxels: names by number (view, phase, label, sex) and numbers (age).

A dataset declares its attributes in `attributes` of index.json. What nobody stated is UNKNOWN (-1), or NaN of
a number.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from medldm.errors import InputError

UNKNOWN = -1  # number of what nobody stated; an unknown place in a stack is NaN
TABLES = {
    "view": "view_names",
    "phase": "phase_names",
    "label": "label_values",
}  # kind -> key of index and facts
MAX_NAMES = 64  # a column of more names tells images apart rather than what they show
UNITS_OF = {
    "age": "years",
    "weight": "kg",
    "height": "m",
    "field_T": "T",
}  # what a column of this name counts
# Columns with a meaning of their own, and keys of batches: they are no attributes to condition on.
NO_CONDITIONS = frozenset({
    *TABLES, "labels", "findings", "split", "visit", "photometric", "source", "grid", "slice_index",
    "num_slices", "slice_position", "image", "latent", "mask", "edges", "source_label", "source_latent",
    "spacing", "affine", "case_id", "case_index", "row", "edge_level", "map_latent",
})  # fmt: skip
UNNAMED = "class "  # how a class is called whose name is not published


def renumber(own: Sequence[str], known: Sequence[str]) -> list[int]:
    """For each name in `own`, its place among `known`; UNKNOWN for a name that is not there."""
    return [known.index(name) if name in known else UNKNOWN for name in own]


def with_unknown(index: dict) -> dict:
    """Change an index of an earlier version in place: such a version wrote 0 where nobody had stated
    anything, and UNKNOWN takes its place.

    Nothing is taken to be stated where a case's numbers are all 0 and its acquisitions share no such
    attribute.
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
    """InputError where a model and the maps of `root` give one number to two names of classes. Classes
    without names are taken by their numbers.
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
    """InputError where weights and data number the same views, labels, classes or other names in two ways.
    Names that are different altogether are another task, to which fine-tuning may go on.
    """
    tables = {
        table: [facts.get(table) for facts in (trained, given)] for table in (*TABLES.values(), "label_names")
    }
    for kind in further_attributes(trained):
        tables[kind] = [names_of(facts, kind) for facts in (trained, given)]
    for table, both in tables.items():
        known, own = (list(map(str, names or [])) for names in both)
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


# ---- what a dataset declares, and what a model is built from ----


@dataclass(frozen=True)
class Attribute:
    """What may be known of an image besides its voxels: one of several `names`, or a number within `limits`.

    `limits` are those of the prepared data; a model scales by them, and numbers beyond are scaled on.
    """

    names: tuple[str, ...] = ()
    limits: tuple[float, float] | None = None
    unit: str | None = None

    @property
    def is_scalar(self) -> bool:
        return self.limits is not None

    def as_dict(self) -> dict[str, Any]:
        """The entry of `attributes` in index.json."""
        if self.is_scalar:
            return {"kind": "scalar", "range": list(self.limits), "unit": self.unit}
        return {"kind": "categorical", "names": list(self.names)}

    @classmethod
    def from_dict(cls, entry: Mapping[str, Any]) -> "Attribute":
        if entry["kind"] == "scalar":
            return cls(limits=tuple(map(float, entry["range"])), unit=entry.get("unit"))
        return cls(names=tuple(map(str, entry["names"])))


@dataclass(frozen=True)
class KnownAttributes:
    """What a model is told of the attributes of its data.

    `declared` are all of them by name; `unstated` those that some training image does not state, so that
    training meets their null. `lone_position` is the place of a slice without a stack for models that were
    trained when such a slice counted as the middle of one.
    """

    declared: Mapping[str, Attribute] = field(default_factory=dict)
    unstated: tuple[str, ...] = ()
    lone_position: float | None = None


def as_number(value: Any) -> float | None:
    """A finite number that a value is or spells, else None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def stated_number(entry: Mapping[str, Any], value: Any) -> float:
    """A stated value as batches hold it, by the attribute's entry in index.json: the place of a name, or a
    number. UNKNOWN, or NaN of a scalar, where nothing is stated.
    """
    if entry["kind"] == "scalar":
        number = as_number(value)
        return math.nan if number is None else number
    return entry["names"].index(str(value)) if str(value) in entry["names"] else UNKNOWN


def declare(name: str, values: Iterable[Any]) -> Attribute | None:
    """What a column of values declares: a scalar where all that is stated are numbers, else a name out of at
    most MAX_NAMES. None for a column that identifies images rather than describes them, or states nothing.
    """
    stated = {str(value) for value in values if value is not None and str(value) != ""}
    numbers = [as_number(value) for value in stated]
    if not stated or name in NO_CONDITIONS:
        return None
    if None not in numbers:
        return Attribute(limits=(min(numbers), max(numbers)), unit=UNITS_OF.get(name))
    return Attribute(names=tuple(sorted(stated))) if len(stated) <= MAX_NAMES else None


def with_attributes(index: dict) -> dict:
    """An index with `attributes`: view, phase and label follow its tables, 2D data have the place of a slice
    in its stack, and in an index of an earlier version the others follow from what its cases state.
    """
    declared = dict(index.get("attributes") or declared_by(index["cases"]))
    for kind, table in TABLES.items():
        declared.pop(kind, None)
        if index.get(table):
            declared[kind] = Attribute(names=tuple(map(str, index[table]))).as_dict()
    if index["spatial_dims"] == 2:
        declared["slice_position"] = Attribute(limits=(0.0, 1.0)).as_dict()
    return index | {"attributes": declared}


def declared_by(cases: Sequence[Mapping[str, Any]]) -> dict[str, dict]:
    """The entries of `attributes` that the cases of an index state beyond view, phase and label."""
    values: dict[str, list] = {}
    for case in cases:
        own = {name: [value] for name, value in (case.get("attributes") or {}).items()}
        for name, column in (own | (case.get("slices") or {})).items():
            if name not in NO_CONDITIONS:
                values.setdefault(name, []).extend(column)
    found = {name: declare(name, column) for name, column in sorted(values.items())}
    return {name: attribute.as_dict() for name, attribute in found.items() if attribute is not None}


def further_entries(index: Mapping[str, Any]) -> dict[str, dict]:
    """The entries of `attributes` but view, phase, label and slice_position, which items hold themselves."""
    entries = index.get("attributes") or {}
    return {name: entry for name, entry in entries.items() if name not in (*TABLES, "slice_position")}


def further_attributes(facts: Mapping[str, Any]) -> dict[str, Attribute]:
    """The attributes of `further_entries`."""
    return {name: Attribute.from_dict(entry) for name, entry in further_entries(facts).items()}


def known_attributes(facts: Mapping[str, Any]) -> KnownAttributes:
    """What the facts of a dataset or of a checkpoint say of attributes. Earlier versions do not say what is
    unstated: missing labels were class 0 then, and a slice without a stack stood in the middle of one.
    """
    declared = {}
    for kind, table in TABLES.items():
        count = facts.get(f"num_{kind}s") or 0
        names = facts.get(table) or range(count)
        if count:
            declared[kind] = Attribute(names=tuple(map(str, names)))
    declared["slice_position"] = Attribute(limits=(0.0, 1.0))
    unstated = facts.get("unknown_attributes")
    lone = 0.5 if unstated is None else None
    return KnownAttributes(declared | further_attributes(facts), tuple(unstated or ()), lone)


def names_of(facts: Mapping[str, Any], kind: str) -> list[str]:
    """The names behind the numbers of an attribute; [] for a scalar, and where the facts do not tell."""
    if kind in TABLES:
        return list(facts.get(TABLES[kind]) or ())
    attribute = further_attributes(facts).get(kind)
    return [] if attribute is None else list(attribute.names)
