"""Checks that a prepared dataset fits a trained model, and gives its attributes the model's numbers."""

import logging
from typing import Any

from medldm.attributes import names_of, renumber
from medldm.errors import InputError

log = logging.getLogger(__name__)
SAME_FACTS = ("spatial_dims", "image_channels", "num_classes")


def check_facts(trained: dict, prepared: dict, checkpoint: str, root: str) -> None:
    """InputError unless the model and the dataset have the same dimensions, channels and classes."""
    for key in SAME_FACTS:
        if trained[key] != prepared[key]:
            raise InputError(
                f"{checkpoint}: trained with {key}={trained[key]}, but {root} has {prepared[key]}; "
                "use the data it knows"
            )


def embedded(module: Any, keys: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The attributes that a model embeds, and those of them that may be unknown."""
    if "source" in keys:
        return ("label",), ()
    conditioner = module.conditioner
    return ((), ()) if conditioner is None else (conditioner.attributes, conditioner.null_attributes)


def number_as_trained(
    dataset: Any, facts: dict[str, Any], kinds: tuple[str, ...], nulls: tuple[str, ...]
) -> None:
    """Gives the attributes of `kinds` the model's numbers for their names. InputError for an
    image whose name the model does not know, and for one without a name where no null (`nulls`) was trained.
    """
    items = dataset.every_item()
    dataset.conditions = tuple(kinds)
    if dataset.num_findings and "label" in kinds and not facts.get("multi_label"):
        raise InputError(
            f"{dataset.root}: has several labels for an image, but the model was trained with one for each"
        )
    for kind in kinds:
        own, known = dataset.names.get(kind) or [], names_of(facts, kind)
        missing = [item for item in items if not item.stated(kind)]
        if missing:
            tell_missing(kind, missing, dataset, kind in nulls)
        if not own or not known:
            continue
        for item in items:
            for number in map(int, item.stated(kind)):
                if own[number] not in known:
                    raise InputError(
                        f"{dataset.root}: '{dataset.item_id(item)}' has the {kind} '{own[number]}', the "
                        f"model knows {', '.join(known)}"
                    )
        dataset.numbering[kind] = renumber(own, known)
    dataset.num_findings = dataset.num_findings and len(facts.get("label_values") or ())


def tell_missing(kind: str, items: list[Any], dataset: Any, has_null: bool) -> None:
    """InputError where images do not state an attribute and its null was never trained; where it was, the log
    says that they are sampled as unknown.
    """
    what = f"{dataset.root}: {len(items)} images ('{dataset.item_id(items[0])}' first) state no {kind}"
    if not has_null:
        raise InputError(
            f"{what}, and the model never saw an unknown one; state it (data=folder: the column {kind} of "
            "manifest.csv) and prepare again, or train with model.conditioner.drop_all_prob=0.1"
        )
    if kind != "slice_position":
        log.warning("%s; they are sampled as unknown", what)
