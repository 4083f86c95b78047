"""Parts from a config: each is made by what its `_target_` names, and what it refuses is told by its key."""

from collections.abc import Callable, Mapping
from pkgutil import resolve_name
from typing import Any

from hydra.utils import instantiate

from medldm.errors import InputError, told_of
from medldm.parts import in_place
from medldm.signatures import check_arguments
from medldm.values import OURS

INSTRUCTIONS = ("_target_", "_partial_", "_args_", "_convert_", "_recursive_")  # to whoever instantiates


def instantiate_parts(model: Mapping[str, Any], skip: tuple[str, ...]) -> dict[str, Any]:
    """Every dict of the config becomes what its `_target_` names; numbers and strings stay."""
    parts = {}
    for key in (key for key in model if key not in ("kind", *skip)):
        with told_of(f"model.{key}"):
            value = model[key]
            parts[key] = instantiate(in_place(value)) if isinstance(value, Mapping) else value
    return parts


def check_parts(config: Any, key: str) -> None:
    """InputError for the first value, in a config and everything in it, that the part which takes it does not
    allow by its annotations. Parts from other packages are left alone.
    """
    if isinstance(config, Mapping):
        target = config.get("_target_")
        if not isinstance(config.get("_partial_", False), bool):
            raise InputError(f"{key}._partial_={config['_partial_']!s:.80}: give true or false")
        if isinstance(target, str) and target.startswith(OURS):
            arguments = {name: value for name, value in config.items() if name not in INSTRUCTIONS}
            with told_of(key):
                check_arguments(taker_of(target), arguments)
        for name, part in config.items():
            check_parts(part, f"{key}.{name}")
    elif isinstance(config, list | tuple):
        for number, part in enumerate(config):
            check_parts(part, f"{key}.{number}")


def taker_of(target: str) -> Callable:
    """What a `_target_` names; a function that takes anything where there is nothing of that name, which
    Hydra tells.
    """
    try:
        found = resolve_name(in_place({"_target_": target})["_target_"])
    except (ImportError, AttributeError, ValueError):
        return dict
    return found if callable(found) else dict
