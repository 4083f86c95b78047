"""Checks what must be the same where a run is resumed, or starts from the weights of another one."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medldm.attributes import check_order
from medldm.build import load_module
from medldm.checkpoints import read_checkpoint
from medldm.errors import InputError
from medldm.fingerprints import file_sha256
from medldm.held_out import changed_attributes, changed_data, origin_of
from medldm.models.common import TrainedModule
from medldm.schemas import check_schema
from medldm.training.restoring import ANOTHER, State

log = logging.getLogger(__name__)
FROZEN = ("first_stage.", "map_stage.", "network.base.", "conditioner.base.")  # weights of earlier stages
# Parts of a model's config that decide its weights.
STRUCTURE = (
    "autoencoder", "codec", "network", "translator", "conditioner", "schedule", "objective", "likelihood",
    "adapter",
)  # fmt: skip


def checked_resume(path: Path, model: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's content; InputError where it is of another model than the config's."""
    content = read_checkpoint(path)
    check_schema(content, State, path, ANOTHER)
    description = content["medldm"]
    if description["stage"] != model["kind"]:
        raise InputError(
            f"{path}: holds a {description['stage']} model, the experiment trains a {model['kind']} model"
        )
    kept = description["model"]
    changed = [key for key in STRUCTURE if without_path(kept.get(key)) != without_path(model.get(key))]
    if changed:
        raise InputError(
            f"{path}: model.{changed[0]} differs from the run's config; undo it or start a new run"
        )
    return content


def without_path(part: Any) -> Any:
    """A part of a config without the place of its checkpoint, which may be another for the same file."""
    return {key: part[key] for key in part if key != "checkpoint"} if isinstance(part, Mapping) else part


def require_stages(model: dict[str, Any], content: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    """The descriptions of the first stage and of the map stage, where a resumed checkpoint brings their
    weights along; None for one that is to be loaded. InputError where a checkpoint is needed and not named.
    """
    resumed = [content["medldm"].get(key) if content else None for key in ("first_stage", "map_stage")]
    hints = {
        "first_stage": "stage-one checkpoint, or model/first_stage=pixel for none",
        "map_stage": "map VQ-VAE",
    }
    for (key, hint), found in zip(hints.items(), resumed, strict=True):
        if found is None and (model.get(key) or {}).get("checkpoint") == "???":
            raise InputError(f"model.{key}.checkpoint: not given; name the {hint}")
    return resumed


def initialise(
    module: TrainedModule, path: str, facts: dict[str, Any], *, is_whole: bool = False
) -> dict[str, Any]:
    """Start from another run's weights (fine-tuning) and return what is kept of their origin; InputError
    where they do not fit.

    A first stage stays the one that `model.first_stage.checkpoint` names, and the base of a control branch
    that of `model.adapter.checkpoint`, unless the weights are taken `is_whole`, as a student takes its
    teacher's.
    """

    def is_frozen(name: str) -> bool:
        return name.startswith(FROZEN) and not is_whole

    own = {name: x for name, x in module.state_dict().items() if is_frozen(name)}
    source = load_module(path)
    check_order(source.facts, facts, f"init_from={path}")
    others = {name: x for name, x in source.state_dict().items() if not is_frozen(name)}
    try:
        module.load_state_dict(own | others)
    except RuntimeError as error:
        first = next(line.strip() for line in str(error).splitlines()[1:])
        raise InputError(f"init_from={path}: not the same model: {first}") from error
    log.info("starting from the weights of %s", path)
    return origin_of(source.description)


def warn_of_other_stages(model: dict[str, Any], description: dict[str, Any]) -> None:
    """Warns where another file is at the path of an earlier stage: a resumed run keeps the one it
    began with.
    """
    for stage in ("first_stage", "map_stage"):
        path, kept = (model.get(stage) or {}).get("checkpoint"), description.get(stage)
        if path and kept and Path(path).is_file() and file_sha256(path) != kept.get("sha256"):
            log.warning(
                "model.%s.checkpoint=%s: not the file that the run was begun with, whose weights it keeps; "
                "start a new run to use this one",
                stage,
                path,
            )


def check_resumed_data(path: Path, content: dict[str, Any], record: dict[str, Any] | None) -> None:
    """InputError where a run would go on with other subjects or images than it was begun with."""
    earlier = content["medldm"].get("data")
    if record is None:
        return
    if earlier is None:
        log.warning(
            "resume=%s: an older medldm did not record its data; whether they are still the same is unknown",
            path,
        )
        return
    changed = changed_data(earlier, record)
    if changed is not None:
        raise InputError(
            f"resume={path}: other data than the run's: {changed}; give those, or start anew from its "
            f"weights with init_from={path} and another run_dir"
        )


def check_resumed_attributes(
    path: Path, content: dict[str, Any], record: dict[str, Any] | None, embedded: Sequence[str]
) -> None:
    """InputError where cases state other values of an attribute that the model embeds than when the run was
    begun; a warning for one that it does not read.
    """
    changed = changed_attributes(content["medldm"].get("data") or {}, record or {})
    read = [name for name in changed if name in embedded]
    if read:
        raise InputError(
            f"resume={path}: other data than the run's: its cases stated other values of {', '.join(read)} "
            f"when it was begun; give those, or start anew from its weights with init_from={path} and "
            "another run_dir"
        )
    if changed:
        log.warning(
            "resume=%s: the cases state other values of %s than when the run was begun, which this model "
            "does not read",
            path,
            ", ".join(changed),
        )
