"""Parts from a config: each is made by what its `_target_` names, and what it refuses is told by its key."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate

from medldm.errors import told_of
from medldm.parts import in_place


def instantiate_parts(model: Mapping[str, Any], skip: tuple[str, ...]) -> dict[str, Any]:
    """Every dict of the config becomes what its `_target_` names; numbers and strings stay."""
    parts = {}
    for key in (key for key in model if key not in ("kind", *skip)):
        with told_of(f"model.{key}"):
            value = model[key]
            parts[key] = instantiate(in_place(value)) if isinstance(value, Mapping) else value
    return parts
