"""Opens a training run: its folder and model, then its data and module. All is checked before anything is
written.
"""

import logging
import os
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningDataModule

from medldm.attributes import check_order
from medldm.build import batch_keys, build_module, module_class
from medldm.checkpoints import describe
from medldm.data import build_datamodule
from medldm.models.common import TrainedModule
from medldm.runs import RUN_DIR_VARIABLE, begin, find_run_dir
from medldm.shrinking import shrink
from medldm.training.base import check_same_base, has_base, on_base, start_from_base
from medldm.training.checks import check_stages, check_unknown
from medldm.training.latents import find_latents
from medldm.training.resume import (
    check_resumed_attributes,
    check_resumed_data,
    checked_resume,
    initialise,
    require_stages,
    warn_of_other_stages,
)
from medldm.training.segmenter import ask_segmenter
from medldm.training.teacher import as_student, attach_teacher, teacher_of

log = logging.getLogger(__name__)


class Run(NamedTuple):
    """Where a training writes, what it trains, and from which checkpoint it continues."""

    folder: Path
    model: dict[str, Any]  # the model's resolved config
    resume: Path | None  # the checkpoint from which it continues
    content: dict[str, Any] | None  # of that checkpoint
    origin: dict[str, Any] | None = None  # content of the checkpoint of a student's teacher, a branch's base

    @property
    def stages_from(self) -> dict[str, Any] | None:
        """The checkpoint that holds the weights of the earlier stages."""
        return self.origin if self.content is None else self.content

    @property
    def step(self) -> int | None:
        """The update at which a resumed run continues."""
        return None if self.content is None else self.content["global_step"]


def job_of_sweep() -> int | None:
    """The number of this job in a sweep (-m), None outside of one."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return HydraConfig.get().job.num


def open_run(cfg: DictConfig, experiment: str) -> Run:
    """The run that a config asks for: a new one, or one that is resumed. Nothing is written yet."""
    model = OmegaConf.to_container(cfg.model, resolve=True)
    model = shrink(model) if cfg.get("tiny") else model
    model, teacher = as_student(model)
    model, base = on_base(model)
    parent = Path(cfg.paths.output_root) / experiment
    folder, resume = find_run_dir(parent, cfg.run_dir, cfg.resume, job_of_sweep())
    return Run(folder, model, resume, checked_resume(resume, model) if resume else None, teacher or base)


def make_data(cfg: DictConfig, run: Run) -> LightningDataModule:
    """The prepared data with the arrays that the model needs, or with cached latents in the place
    of images.
    """
    first_stage, _ = require_stages(run.model, run.stages_from)
    data = OmegaConf.to_container(cfg.data, resolve=True)
    data["latents"] = find_latents(data, run.model, first_stage)
    keys = batch_keys(run.model, data["latents"])
    with_cine = module_class(run.model).takes_unlabelled
    return build_datamodule(data, keys=keys, seed=cfg.seed, with_cine=with_cine)


def make_module(cfg: DictConfig, run: Run, datamodule: LightningDataModule) -> TrainedModule:
    """The module with its description, after checking that its data are those of a resumed run and that
    held-out subjects are unseen.
    """
    facts, content, record = datamodule.facts, run.content, datamodule.record
    teacher = teacher_of(run.model)
    if content is not None:
        check_order(content["medldm"]["facts"], facts, f"resume={run.resume}")
        check_resumed_data(run.resume, content, record)
        warn_of_other_stages(run.model, content["medldm"])
    module = build_module(run.model, facts, *require_stages(run.model, run.stages_from))
    if content is not None:
        embedded = () if module.conditioner is None else module.conditioner.attributes
        check_resumed_attributes(run.resume, content, record, embedded)
    module.description = describe(run.model, facts, module, record)
    if has_base(run.model):
        module.description["adapter"] = base_of(run, module, facts)
    if content is not None and content["medldm"].get("init_from"):
        module.description["init_from"] = content["medldm"]["init_from"]
    elif (origin := teacher or cfg.init_from) and not run.resume:
        module.description["init_from"] = initialise(module, origin, facts, is_whole=teacher is not None)
    if segmenter := ask_segmenter(module, run.model, facts, resume=run.resume, content=content):
        module.description["segmenter"] = segmenter
    if teacher is not None:
        attach_teacher(module, teacher)
    if record is not None:
        check_stages(cfg, module.description, datamodule)
        check_unknown(module, datamodule)
    return module


def base_of(run: Run, module: TrainedModule, facts: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps of the base of its branch, which a new run starts from."""
    if run.content is not None:
        return check_same_base(run.content, run.origin, run.resume)
    return start_from_base(module, run.model["adapter"]["checkpoint"], facts)


def open_folder(run: Run, module: TrainedModule, config: str, *, is_first_rank: bool) -> None:
    """Make the run folder, on the first rank; the others are told where it is."""
    os.environ[RUN_DIR_VARIABLE] = str(run.folder)
    if not is_first_rank:
        return
    begin(run.folder, config)
    count = sum(p.numel() for p in module.parameters() if p.requires_grad) / 1e6
    log.info("%s: %.2fM trainable parameters, run folder %s", run.model["kind"], count, run.folder)
    if run.resume:
        log.info("resuming %s at step %s", run.resume, run.step)
