"""The base of a control branch: its checkpoint gives the controlled model config, first stage and weights."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from medldm.attributes import check_class_names, check_order, known_attributes
from medldm.build import BASE_KEY, load_module, module_class, with_base_parts
from medldm.checkpoints import fit_weights, read_hashed
from medldm.errors import InputError
from medldm.held_out import origin_of
from medldm.models.common import TrainedModule
from medldm.models.diffusion import DiffusionModule

log = logging.getLogger(__name__)


def has_base(model: Mapping[str, Any]) -> bool:
    """Whether a config trains a branch on a base: a student of a controlled model takes its teacher's."""
    return bool(model.get("adapter")) and model["kind"] != "distillation"


def on_base(model: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The config of what is trained, and the content of its base's checkpoint where it has one."""
    if not has_base(model):
        return model, None
    path = model["adapter"]["checkpoint"]
    if path == "???":
        raise InputError(f"{BASE_KEY}: not given; name the checkpoint of a latent diffusion model")
    content, sha256 = read_hashed(path)
    base = content["medldm"]["model"]
    if not issubclass(module_class(base), DiffusionModule):
        raise InputError(f"{BASE_KEY}={path}: of the kind {base['kind']}; give a latent diffusion model")
    if base.get("adapter"):
        raise InputError(f"{BASE_KEY}={path}: has a branch itself; give the checkpoint below it")
    return with_base_parts(model, base), {**content, "sha256": sha256}


def start_from_base(module: TrainedModule, path: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Take frozen parts and the branch's first weights from the base, by its moving average, and return what
    a checkpoint keeps of it. `facts` are of the data.
    """
    source = load_module(path)
    check_order(source.facts, facts, f"{BASE_KEY}={path}")
    assert isinstance(module, DiffusionModule) and isinstance(source, DiffusionModule)
    check_conditions(source, facts, f"{BASE_KEY}={path}")
    pairs = [(module.first_stage, source.first_stage), (module.map_stage, source.map_stage)]
    pairs += [(module.schedule, source.schedule), (module.network.base, source.network)]
    for own, theirs in (*pairs, (module.conditioner.base, source.conditioner)):
        if own is not None:
            fit_weights(own, theirs.state_dict(), f"{BASE_KEY}={path}: with the facts of this dataset, it")
    module.network.branch.copy_weights(module.network.base)
    log.info("a branch on %s, which stays as it is", path)
    return origin_of(source.description) | {"sha256": source.checkpoint_sha256}


def check_conditions(base: DiffusionModule, facts: Mapping[str, Any], what: str) -> None:
    """InputError where the frozen base would read classes, names or numbers of these data as others: it was
    trained on their places in a list and on numbers scaled by their range. `what` names it.
    """
    if "mask" in base.condition_keys:
        check_class_names(base.facts, facts, f"{what}: reads", "the dataset")
    known, own = (known_attributes(of).declared for of in (base.facts, facts))
    for name in base.conditioner.attributes:
        then, there = ((of[name].names or of[name].limits) if name in of else None for of in (known, own))
        if then != there:
            raise InputError(
                f"{what}: reads {name} in {listed(then)}, the dataset has {listed(there)}, which the frozen "
                "base would take for others; give a base that was trained on such data, or without this "
                "condition"
            )


def listed(values: Sequence[object] | None) -> str:
    return "none" if values is None else f"[{', '.join(map(str, values))}]"


def check_same_base(content: Mapping[str, Any], base: Mapping[str, Any], resume: object) -> dict[str, Any]:
    """What a resumed checkpoint keeps of its base. InputError where the config names another file now."""
    kept = content["medldm"].get("adapter") or {}
    if kept.get("sha256") != base["sha256"]:
        raise InputError(
            f"{BASE_KEY}: not the file that resume={resume} was begun with; give that, or start a new run"
        )
    return kept
