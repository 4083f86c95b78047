"""The base of a control branch: its checkpoint gives the controlled model config, first stage and weights."""

import logging
from collections.abc import Mapping
from typing import Any

from medldm.attributes import check_order
from medldm.build import BASE_KEY, load_module, module_class, with_base_parts
from medldm.checkpoints import read_hashed
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
    pairs = [(module.first_stage, source.first_stage), (module.map_stage, source.map_stage)]
    pairs += [(module.schedule, source.schedule), (module.network.base, source.network)]
    for own, theirs in (*pairs, (module.conditioner.base, source.conditioner)):
        if own is not None:
            own.load_state_dict(theirs.state_dict())
    module.network.branch.copy_weights(module.network.base)
    log.info("a branch on %s, which stays as it is", path)
    return origin_of(source.description) | {"sha256": source.checkpoint_sha256}


def check_same_base(content: Mapping[str, Any], base: Mapping[str, Any], resume: object) -> dict[str, Any]:
    """What a resumed checkpoint keeps of its base. InputError where the config names another file now."""
    kept = content["medldm"].get("adapter") or {}
    if kept.get("sha256") != base["sha256"]:
        raise InputError(
            f"{BASE_KEY}: not the file that resume={resume} was begun with; give that, or start a new run"
        )
    return kept
