"""Which attributes a stand-in shares with the image beside it: names exactly, numbers as nearly as can be."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from medldm.attributes import TABLES, Attribute, as_number, further_attributes
from medldm.errors import InputError
from medldm.evaluation.conditions import Conditions
from medldm.evaluation.pairs import Pair


class Wanted(NamedTuple):
    """Attributes to match by: names, which are to be equal, and numbers with the width of their range."""

    names: tuple[str, ...] = ()
    scalars: Mapping[str, float] = {}


class Match(NamedTuple):
    """The attributes that a stand-in shares with the image beside it, those whose nearest value it has, and
    why not more of them.
    """

    attributes: tuple[str, ...] = ()
    note: str = ""
    nearest: tuple[str, ...] = ()


def attributes_to_match(
    stated: str | Sequence[str], conditions: Conditions, facts: Mapping[str, Any], pairs: Sequence[Pair]
) -> Wanted:
    """Attributes to match by. `auto`: those that were conditions of the model, since a stand-in that shares
    what the model was never told is no fair one. InputError for a name that the data do not have.
    """
    known = declared_attributes(facts, pairs)
    if stated == "auto":
        names = tuple(name for name in conditions.matchable if name in known)
    else:
        names = (stated,) if isinstance(stated, str) else tuple(stated)
    for name in names:
        if name not in known:
            raise InputError(f"metrics.match: no attribute '{name}'; choose auto or from {', '.join(known)}")
    widths = {name: known[name].limits for name in names if known[name].is_scalar}
    return Wanted(
        tuple(name for name in names if name not in widths),
        {name: max(high - low, 1e-12) for name, (low, high) in widths.items()},
    )


def declared_attributes(facts: Mapping[str, Any], pairs: Sequence[Pair]) -> dict[str, Attribute]:
    """Attributes of the reference by name: view, phase and label, the place of a slice in its stack, and what
    its index.json declares.
    """
    known = {name: Attribute(names=("any",)) for name in TABLES} | further_attributes(facts)
    if any(position_of(pair) is not None for pair in pairs):
        known["slice_position"] = Attribute(limits=(0.0, 1.0))
    return known


def position_of(pair: Pair) -> float | None:
    """Place of a slice in its stack, 0 to 1; None where it has none."""
    index, num = (as_number(pair.attributes.get(name)) for name in ("slice_index", "num_slices"))
    return None if index is None or num is None or num < 2 else index / (num - 1)


def number_stated(pair: Pair, name: str) -> float:
    """NaN where the image states none."""
    value = position_of(pair) if name == "slice_position" else as_number(pair.attributes.get(name))
    return np.nan if value is None else value


def choose_match(
    wanted: Wanted, has_stand_in: Callable[[tuple[str, ...]], Sequence[bool]], *, relax: bool
) -> Match:
    """As many of the names as leave no image without a stand-in, so that all rows are on the same images; all
    of them where `relax` is False. `has_stand_in(names)` says it for every image. Numbers leave none without.
    """
    names, dropped = list(wanted.names), []
    best = sum(has_stand_in(()))
    while relax and names and (num := sum(has_stand_in(tuple(names)))) < best:
        name = names.pop()
        dropped.append(f"{name} is not matched: it would leave {best - num} of {best} images without one")
    return Match(tuple(names), "; ".join(dropped), tuple(wanted.scalars))


def random_partners(
    pairs: list[Pair], seed: int, match: Sequence[str] = (), scalars: Mapping[str, float] | None = None
) -> list[int | None]:
    """For each image the number of one of another subject, of the same shape and attributes: a random one of
    those whose `scalars` are nearest, by the sum of their distances as shares of each range.
    """
    rng = np.random.default_rng(seed)
    places = numbers_by_place(pairs, match)
    values = np.array(
        [[number_stated(pair, name) / width for name, width in (scalars or {}).items()] for pair in pairs]
    )
    partners: list[int | None] = []
    for number, pair in enumerate(pairs):
        others = [i for i in places[pair.place(match)] if pairs[i].subject != pair.subject]
        if others and scalars:
            others = nearest_images(values, number, others)
        partners.append(int(rng.choice(others)) if others else None)
    return partners


def nearest_images(values: np.ndarray, number: int, others: Sequence[int]) -> list[int]:
    """Those of `others` whose rows of `values` (N, scalars) are nearest to row `number`. An unknown value
    (NaN) is as far from any as the ends of a range are apart, and at no distance from another unknown one.
    """
    own, theirs = values[number], values[list(others)]
    apart = np.abs(theirs - own)
    both = np.isnan(theirs) & np.isnan(own)
    distances = np.where(both, 0.0, np.where(np.isnan(apart), 1.0, apart)).sum(1)
    close = distances <= distances.min() + 1e-9
    return [other for other, is_close in zip(others, close, strict=True) if is_close]


def numbers_by_place(pairs: Sequence[Pair], match: Sequence[str]) -> dict[tuple, list[int]]:
    places: dict[tuple, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        places[pair.place(match)].append(i)
    return places


def has_partner(pairs: Sequence[Pair], match: Sequence[str]) -> list[bool]:
    subjects: dict[tuple, set[str]] = defaultdict(set)
    for pair in pairs:
        subjects[pair.place(match)].add(pair.subject)
    return [len(subjects[pair.place(match)]) > 1 for pair in pairs]
