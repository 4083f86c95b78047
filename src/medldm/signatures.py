"""Compares the values of a config with the annotations of what takes them, so that a text in the place of a
number is told by its key, before it meets arithmetic.
"""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

ONE = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", NoneType: "null"}
MANY = {int: "whole numbers", float: "numbers", str: "texts", NoneType: "nulls"}
SEQUENCES = (Sequence, Collection, Iterable, list, tuple)


def check_arguments(taker: Callable, arguments: Mapping[str, Any]) -> None:
    """ValueError, as "name=value: give a whole number", for the first argument whose value is none that the
    annotations of `taker`, a class or a function, allow. Values that are made from a config of their own are
    not looked at: parts are checked by what takes theirs.
    """
    hints = hints_of(taker)
    for name, value in arguments.items():
        if name in hints and not allows(value, hints[name]):
            raise ValueError(f"{name}={value!s:.80}: give {in_words(hints[name])}")


@cache
def hints_of(taker: Callable) -> dict[str, Any]:
    """The annotations of the arguments, of a class also those that it hands on to the classes it inherits."""
    takers = [base.__init__ for base in taker.__mro__[:-1]] if inspect.isclass(taker) else [taker]
    found: dict[str, Any] = {}
    for function in reversed(takers):
        with suppress(NameError, TypeError):  # an annotation that is there for type checkers alone
            found |= get_type_hints(function)
    return found


def allows(value: Any, hint: Any) -> bool:
    """Whether a plain value may stand where this annotation is."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (Any, object):
        return True
    if origin in (Union, UnionType):
        return any(allows(value, one) for one in inner)
    if origin is Literal:
        return value in inner
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if hint in ONE:
        return is_number if hint is float else isinstance(value, hint) and (is_number or hint is not int)
    if (origin or hint) in SEQUENCES:
        return is_sequence(value) and allows_each(value, inner, is_fixed=(origin or hint) is tuple)
    if (origin or hint) in (Mapping, dict):
        return isinstance(value, Mapping)
    is_plain = isinstance(value, int | float | str) or value is None
    return not is_plain or not takes_parts(hint) or (hint is Path and isinstance(value, str))


def allows_each(values: Sequence[Any], hints: tuple, *, is_fixed: bool) -> bool:
    if is_fixed and hints and hints[-1] is not Ellipsis:
        return len(values) == len(hints) and all(map(allows, values, hints))
    return not hints or all(allows(value, hints[0]) for value in values)


def takes_parts(hint: Any) -> bool:
    """Whether an annotation names a class or a callable, which no number and no text is."""
    return (get_origin(hint) or hint) is Callable or inspect.isclass(hint)


def is_sequence(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def in_words(hint: Any) -> str:
    """What an annotation allows, in words."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        return " or ".join(dict.fromkeys(map(in_words, inner)))
    if origin is Literal:
        return "one of " + ", ".join(map(str, inner))
    if (origin or hint) in SEQUENCES:
        kinds = (get_args(inner[0]) or inner[:1]) if inner else ()
        are_told = kinds and {*kinds} <= {*MANY}
        return "a list of " + " and ".join(MANY[kind] for kind in kinds) if are_told else "a list"
    if (origin or hint) in (Mapping, dict):
        return "keys and values"
    return "a path" if hint is Path else ONE.get(hint, "a part with a _target_")
