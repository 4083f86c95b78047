"""Sorts keyword arguments into small dataclasses, each of which checks arguments that belong together."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from medldm.signatures import check_arguments


def grouped(owner: str, options: Mapping[str, Any], *groups: type) -> list[Any]:
    """One instance of each dataclass in `groups`, made from those of `options` that are its fields.

    Configs stay flat, however a network groups its options. Raises TypeError, as a call does, for an option
    that no group has and for one that is missing, ValueError for one of another type; `owner` is the name of
    what takes the options.
    """
    names = [{field.name for field in fields(group)} for group in groups]
    unknown = options.keys() - set().union(*names)
    if unknown:
        raise TypeError(f"{owner} got an unexpected keyword argument '{min(unknown)}'")
    chosen = [{name: options[name] for name in options if name in own} for own in names]
    for group, arguments in zip(groups, chosen, strict=True):
        check_arguments(group, arguments)
    return [group(**arguments) for group, arguments in zip(groups, chosen, strict=True)]


def check_one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises ValueError where the argument `name` has a value that is none of `choices`."""
    if value not in choices:
        raise ValueError(f"{name}={value} is none of {', '.join(choices)}")
