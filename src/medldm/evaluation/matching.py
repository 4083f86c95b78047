"""Chooses real images of other subjects as stand-ins, which a baseline compares with an image in its place.

A stand-in shares named attributes with the image exactly, and has the nearest numbers that there are.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from medldm.attributes import TABLES, Attribute, as_number, further_attributes
from medldm.errors import InputError
from medldm.evaluation.conditions import Conditions
from medldm.evaluation.pairs import Pair


class Wanted(NamedTuple):
    """The attributes to match by: names, which must be equal, and numbers with the width of their range."""

    names: tuple[str, ...] = ()
    scalars: Mapping[str, float] = {}


class Match(NamedTuple):
    """The attributes that a stand-in shares with its image, those of which it has the nearest value, and why
    there are not more of them.
    """

    attributes: tuple[str, ...] = ()
    note: str = ""
    nearest: tuple[str, ...] = ()


def attributes_to_match(
    stated: str | Sequence[str], conditions: Conditions, facts: Mapping[str, Any], pairs: Sequence[Pair]
) -> Wanted:
    """The attributes to match by. `auto` takes those that were conditions of the model: it would be unfair if
    a stand-in shared what the model was never told. InputError for a name that the data do not have.
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
    """The attributes of the reference by name: view, phase and label, the position of a slice in its stack,
    and those that its index.json declares.
    """
    known = {name: Attribute(names=("any",)) for name in TABLES} | further_attributes(facts)
    if any(position_of(pair) is not None for pair in pairs):
        known["slice_position"] = Attribute(limits=(0.0, 1.0))
    return known


def position_of(pair: Pair) -> float | None:
    """The position of a slice in its stack, 0 to 1; None where it has none."""
    index, num = (as_number(pair.attributes.get(name)) for name in ("slice_index", "num_slices"))
    return None if index is None or num is None or num < 2 else index / (num - 1)


def number_stated(pair: Pair, name: str) -> float:
    """The number that an image states of an attribute, NaN where it states none."""
    value = position_of(pair) if name == "slice_position" else as_number(pair.attributes.get(name))
    return np.nan if value is None else value


def choose_match(
    wanted: Wanted, has_stand_in: Callable[[tuple[str, ...]], Sequence[bool]], *, relax: bool
) -> Match:
    """As many of the names as leave every image with a stand-in, so that all rows are on the same images; all
    of them where `relax` is False. `has_stand_in(names)` tells for every image whether it has one. Numbers
    never leave an image without.
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
    """For each image the index of an image of another subject with the same shape and attributes. It is drawn
    from those whose `scalars` are nearest, by the sum of their distances as shares of each range.
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
    """Those of `others` whose rows of `values` (N, scalars) are nearest to row `number`. The distance of an
    unknown value (NaN) is 1, the whole range, to a known one and 0 to another unknown one.
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
