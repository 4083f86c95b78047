"""Refuses settings of preparation for data that are prepared already with other ones."""

from collections.abc import Mapping, Sequence
from typing import Any

from medldm.data.preparation.recipe import make_recipe, recipe_of
from medldm.errors import InputError
from medldm.knobs import look_up, typed_keys

OF_RECIPE = ("image_size", "preprocess")


def refuse_other_recipe(
    data: Mapping[str, Any], index: Mapping[str, Any] | None, typed: Sequence[str]
) -> None:
    """InputError where the command line asks for another size or preparation of images than those in
    data.root have, since it would have no effect. Settings that equal those of the preparation are accepted,
    so that all stages of a chain can be given the same overrides.

    Args:
    data: the section `data` of the config.
    index: the content of `index.json` in data.root; None for data that are made on the fly.
    typed: the overrides of the command line, such as `data.image_size=128`.
    """
    paths = [key.split(".")[1:] for key in typed_keys(typed) if key.startswith("data.")]
    paths = [path for path in paths if path[0] in OF_RECIPE]
    if not paths or index is None:
        return
    root = data["root"]
    mend = f"run `medldm prepare` with it into another data.root, or leave it out to read {root} as it is"
    made = recipe_of(index).as_dict() if "preprocess" in index else {}
    stored = {"image_size": made.pop("image_size", None), "preprocess": made}
    for path in paths:
        key, value = ".".join(["data", *path]), look_up(data, ".".join(path))
        asked = with_value(stored, path, value)
        if not made or remade(asked) != remade(stored):
            was = look_up(stored, ".".join(path)) if made else "settings that it does not state"
            raise InputError(f"{key}={value}: {root} was prepared with {was}; {mend}")


def with_value(tree: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    """A copy of nested dicts in which the value at `path` is replaced."""
    head, *rest = path
    return {**tree, head: with_value(tree.get(head) or {}, rest, value) if rest else value}


def remade(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as index.json keeps them, where a size of one number and of two equal ones are the same."""
    preprocess = dict(settings["preprocess"])
    return make_recipe(preprocess.pop("spatial_dims"), settings["image_size"], preprocess).as_dict()
