"""Refuses, before anything is written, settings without effect, and sizes, subjects or metrics that do not
fit.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from medldm.attributes import check_nulls
from medldm.data.loading.datamodule import CaseDataModule
from medldm.diffusion.sampler import check_guidance
from medldm.errors import InputError, told_of
from medldm.held_out import EARLIER, check_held_out, seen_subjects
from medldm.knobs import refuse_idle, typed_keys
from medldm.models.common import TrainedModule

log = logging.getLogger(__name__)


def check_knobs(
    cfg: DictConfig,
    model: Mapping[str, Any],
    module: TrainedModule,
    spatial_dims: int,
    typed: Sequence[str] = (),
) -> None:
    """InputError for a setting that has no effect. `model` is the resolved config of what is trained;
    `typed` are the overrides of the command line.
    """
    options = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("data", "callbacks")}
    conditioner = module.conditioner
    groups = () if conditioner is None else conditioner.groups
    has_average = module.ema_modules is not None
    refuse_idle(
        model, spatial_dims, groups, has_average=has_average, options=options, typed=typed_keys(typed)
    )
    if conditioner is not None:
        with told_of("model.sampler"):
            check_guidance(module.sampler, conditioner)
    start, updates = (model.get("adversarial") or {}).get("start", 0), cfg.trainer.max_steps
    if 0 < updates <= start:
        log.warning(
            "model.adversarial.start=%d is not reached in trainer.max_steps=%d: no discriminator trains",
            start,
            updates,
        )


def check_sizes(module: TrainedModule, datamodule: CaseDataModule) -> None:
    """InputError where an image of training or validation does not divide by the model's factors, or is too
    small for what judges it.
    """
    factors = module.size_factors
    sizes = datamodule.image_sizes() if factors else {}
    for size, path in sizes.items():
        check_smallest(module, size, path)
        if any(n % f for n, f in zip(size, factors, strict=True)):
            larger, smaller = (
                "[" + ",".join(str(f * (way(n / f))) for n, f in zip(size, factors, strict=True)) + "]"
                for way in (math.ceil, math.floor)
            )
            crop = f", or train with data.crop_size={smaller}" if all(map(int.__ge__, size, factors)) else ""
            raise InputError(
                f"{path}: its {list(size)} do not divide by {list(factors)}, which this model needs; prepare "
                f"with data.image_size={larger}{crop}"
            )


def check_smallest(module: TrainedModule, size: Sequence[int], path: Path) -> None:
    """InputError where a discriminator or a perceptual loss would have no value left of an image."""
    least = module.smallest_size
    if any(n < m for n, m in zip(size, least, strict=bool(least))):
        needed = "[" + ",".join(str(max(n, m)) for n, m in zip(size, least, strict=True)) + "]"
        raise InputError(
            f"{path}: its {list(size)} are too small for this model's discriminators or its perceptual loss, "
            f"which see {list(least)} at least; prepare with data.image_size={needed} or more and train with "
            "no smaller data.crop_size, lower model.discriminators.NAME.strides, or leave them out with "
            "model.discriminators=null model.adversarial=null model.perceptual_weight=0"
        )


def check_monitor(monitor: str, module: TrainedModule) -> None:
    """InputError where the metric by which checkpoints are kept is not logged by this module."""
    if monitor not in module.validation_metrics:
        raise InputError(
            f"callbacks.checkpoints.monitor={monitor}: not logged by this model; "
            f"choose one of {', '.join(module.validation_metrics)}"
        )


def check_stages(cfg: DictConfig, description: dict[str, Any], datamodule: CaseDataModule) -> None:
    """InputError where a stage below, the model that a fine-tuning starts from, or the one that made the
    synthetic images was trained on subjects of this split's test part; a warning where it was on those of the
    validation part.
    """
    if datamodule.synthetic is not None:
        seen = datamodule.synthetic.seen
        path, allow = datamodule.settings.synthetic, bool(cfg.allow_training_subjects)
        check_held_out(seen, datamodule.subjects["test"], path, "test", allow=allow, key="data.synthetic")
    for stage in (stage for stage in EARLIER if description.get(stage)):
        key = stage if stage == "init_from" else f"model.{stage}.checkpoint"
        path = path_of(cfg, stage)
        seen = seen_subjects(description[stage], datamodule.index)
        for subset in ("test", "val"):
            allow = bool(cfg.allow_training_subjects) or subset == "val"
            check_held_out(seen, datamodule.subjects[subset], path, subset, allow=allow, key=key)
            seen = seen._replace(unrecorded=[])  # they were warned of in the first round


def path_of(cfg: DictConfig, stage: str) -> str:
    """The checkpoint of a stage that a config names. A student takes all of them from its teacher, a control
    branch from its base.
    """
    if cfg.model.get("teacher"):
        return cfg.model.teacher.checkpoint
    if stage == "init_from":
        return cfg.init_from
    return (cfg.model.get(stage) or cfg.model.adapter).checkpoint


def check_unknown(module: TrainedModule, datamodule: CaseDataModule) -> None:
    """InputError where validation images state no value of an attribute whose null is never trained."""
    conditioner = module.conditioner
    if conditioner is not None:
        what = f"{datamodule.root}: some images of val"
        check_nulls(conditioner.attributes, conditioner.null_attributes, datamodule.unstated("val"), what)
