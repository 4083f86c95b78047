"""Makes Lightning's Trainer with medldm's callbacks, and chooses the settings of its device."""

import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning_fabric.plugins.environments import SLURMEnvironment
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback, LightningDataModule, Trainer
from pytorch_lightning.callbacks import LearningRateMonitor
from torch.nn.modules.batchnorm import _BatchNorm

from medldm.callbacks import (
    EMA,
    Checkpoints,
    CountUpdates,
    LatentStatistics,
    MetricsFile,
    Pictures,
    PowerAverages,
    ProgressBar,
    ProgressLines,
    RandomState,
    SkipNonFinite,
    StopOnSignal,
)
from medldm.checkpoints import AtomicCheckpointIO
from medldm.devices import (
    DeviceSettings,
    check_accelerator,
    choose_settings,
    find_hardware,
    num_processes,
    uses_gpu,
)
from medldm.errors import InputError, told_of
from medldm.models.common import TrainedModule
from medldm.progress import has_bars
from medldm.signatures import check_arguments
from medldm.training.sharding import FSDP, ShardedStrategy, check_layout, check_sharded

log = logging.getLogger(__name__)


def quieten() -> None:
    """Suppresses Lightning's advertisements, and hints that do not apply here. Other warnings stay."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*`srun` command is available.*",
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*module\\(s\\) in eval mode.*",
        ".*your dataloader is not resumable.*",  # it is resumable, by a sampler of our own
        ".*overridden `transfer_batch_to_device` in `LightningModule`.*",  # on purpose, see `TrainedModule`
    ):
        warnings.filterwarnings("ignore", text)
    warnings.filterwarnings("ignore", ".*number of training batches.*smaller than the logging interval.*")


def choose_for(cfg: DictConfig) -> DeviceSettings:
    """The settings of the device that this training asks for. InputError where there is no such device, or
    where an option of the trainer is impossible.
    """
    options = cfg.trainer
    for key, lowest in (("accumulate_grad_batches", 1), ("num_nodes", 1), ("log_every_n_steps", 1)):
        if not isinstance(options[key], int) or options[key] < lowest:
            raise InputError(f"trainer.{key}={options[key]} must be a whole number, at least {lowest}")
    if options.gradient_clip_val is not None and options.gradient_clip_val < 0:
        raise InputError(
            f"trainer.gradient_clip_val={options.gradient_clip_val}: give a norm, or null for none"
        )
    if options.get("gradient_clip_algorithm") not in (None, "norm"):
        raise InputError(
            f"trainer.gradient_clip_algorithm={options.gradient_clip_algorithm}: gradients are clipped by "
            "their norm; leave it out"
        )
    check_accelerator(options.accelerator, options.devices, find_hardware())
    if SLURMEnvironment.detect():
        check_tasks(options)
    hardware = find_hardware(options.accelerator)
    channels_last, compiles = cfg.channels_last, cfg.compile
    if options.strategy == FSDP:
        check_layout(channels_last, compiles)
        channels_last = compiles = False
    return choose_settings(
        options.precision,
        channels_last,
        compiles=compiles,
        hardware=hardware,
        key="trainer.precision",
    )


def build_trainer(
    cfg: DictConfig,
    module: TrainedModule,
    datamodule: LightningDataModule,
    run_dir: Path,
    resumed_step: int | None,
    settings: DeviceSettings,
) -> Trainer:
    """Lightning's Trainer with medldm's callbacks; modules that step by hand accumulate and clip themselves.

    `resumed_step` is the update at which a resumed run continues, None for a new one.
    """
    options = trainer_options(cfg, module, settings)
    callbacks = list(make_callbacks(cfg, module, datamodule, run_dir))
    if options["strategy"] == FSDP:
        check_sharded(module, callbacks, num_processes(options))
        options["strategy"] = ShardedStrategy()
    loggers: list[Any] = [MetricsFile(run_dir / "metrics.csv", resumed_step=resumed_step)]
    if cfg.logger.wandb:
        loggers.append(instantiate(cfg.logger.wandb, save_dir=str(run_dir)))
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # slurm/job.sbatch requeues
    torch.set_float32_matmul_precision(settings.matmul_precision)
    return instantiate(
        options,
        callbacks=callbacks,
        logger=loggers,
        plugins=plugins,
        default_root_dir=str(run_dir),
        use_distributed_sampler=False,
        enable_model_summary=False,
        enable_checkpointing=True,
    )


def trainer_options(cfg: DictConfig, module: TrainedModule, settings: DeviceSettings) -> dict[str, Any]:
    """The config's options for the Trainer, resolved for this module and device."""
    options = OmegaConf.to_container(cfg.trainer, resolve=True)
    options["precision"] = settings.precision
    # where no bar can be drawn, Lightning would add one of its own to `ProgressLines`
    options["enable_progress_bar"] = options["enable_progress_bar"] and has_bars()
    if not module.automatic_optimization:
        module.accumulate_grad_batches = options.pop("accumulate_grad_batches")
        module.gradient_clip_val = options.pop("gradient_clip_val")
    if options["strategy"] == "auto" and num_processes(options) > 1:
        options["strategy"] = "ddp" if module.automatic_optimization else "ddp_find_unused_parameters_true"
    options["sync_batchnorm"] = syncs_batchnorm(options, module)
    with told_of("trainer"):
        check_arguments(Trainer, options)
    return options


def make_callbacks(
    cfg: DictConfig, module: TrainedModule, datamodule: LightningDataModule, run_dir: Path
) -> Iterator[Callback]:
    """The callbacks of a training, in the order in which they must act."""
    options = OmegaConf.to_container(cfg.callbacks, resolve=True)
    kinds = {"checkpoints": Checkpoints, "ema": EMA, "post_hoc_ema": PowerAverages, "pictures": Pictures}
    for key, kind in kinds.items():
        with told_of(f"callbacks.{key}"):
            check_arguments(kind, options.get(key) or {})
    checkpoints = Checkpoints(run_dir / "checkpoints", **cfg.callbacks.checkpoints)
    yield LatentStatistics(datamodule)
    yield CountUpdates()
    yield SkipNonFinite()
    if cfg.callbacks.ema:
        yield EMA(**cfg.callbacks.ema)
    if cfg.callbacks.get("post_hoc_ema"):
        yield PowerAverages(run_dir, **cfg.callbacks.post_hoc_ema)
    check_volumes(cfg.callbacks.pictures, module)
    if cfg.callbacks.pictures:
        yield Pictures(run_dir / "samples", **cfg.callbacks.pictures)
    yield LearningRateMonitor("step")
    yield RandomState()
    yield checkpoints
    yield StopOnSignal(checkpoints)
    if cfg.trainer.enable_progress_bar:
        yield ProgressBar(refresh_rate=10, leave=False) if has_bars() else ProgressLines()


def scale_rates(choice: str | None, module: TrainedModule, num_ranks: int) -> None:
    """Learning rates for a batch that several processes share, where `scale_lr` asks for them. InputError for
    an unknown choice.
    """
    if choice not in (None, "linear", "sqrt"):
        raise InputError(f"scale_lr={choice} is none of null, linear, sqrt")
    if choice is not None:
        factor = num_ranks if choice == "linear" else math.sqrt(num_ranks)
        with told_of("scale_lr"):
            module.scale_learning_rates(factor)
        log.info("learning rates times %.4g, for %d processes", factor, num_ranks)


def tell_batch(trainer: Trainer, module: TrainedModule, batch_size: int | None) -> None:
    """Say how many items an update sees; of data without batches of their own nothing is said."""
    if batch_size is None:
        return
    accumulated = max(trainer.accumulate_grad_batches, module.accumulate_grad_batches)
    log.info(
        "batch: %d a process x %d processes on %d nodes x %d accumulated = %d an update",
        batch_size, trainer.world_size, trainer.num_nodes, accumulated,
        batch_size * trainer.world_size * accumulated,
    )  # fmt: skip


def check_tasks(options: Mapping[str, Any]) -> None:
    """InputError where a SLURM step has other numbers of nodes and tasks than the trainer is told."""
    tasks, nodes = (os.environ.get(f"SLURM_{name}", "") for name in ("STEP_NUM_TASKS", "STEP_NUM_NODES"))
    if not (tasks.isdigit() and nodes.isdigit()):
        return
    if (int(tasks), int(nodes)) != (num_processes(options), options["num_nodes"]):
        raise InputError(
            f"trainer.num_nodes={options['num_nodes']} trainer.devices={options['devices']}: "
            f"{num_processes(options)} processes, but this SLURM step has {tasks} tasks on {nodes} nodes; "
            "give sbatch --nodes and --ntasks-per-node the same numbers"
        )


def check_volumes(pictures: DictConfig | None, module: TrainedModule) -> None:
    if pictures and pictures.volumes_every_n_validations and module.description["facts"]["spatial_dims"] != 3:
        raise InputError(
            "callbacks.pictures.volumes_every_n_validations: the images are no volumes; set it to null"
        )


def syncs_batchnorm(options: dict[str, Any], module: TrainedModule) -> bool:
    """Whether batch norms are synchronised: under `auto`, where each would otherwise see its own process's
    part of a batch alone. InputError for `true` where nothing can be synchronised; torch does it on GPUs
    alone.
    """
    choice = options["sync_batchnorm"]
    if choice not in (True, False, "auto"):
        raise InputError(f"trainer.sync_batchnorm={choice} is none of true, false, auto")
    obstacles = {
        "the model has no batch norm": not any(isinstance(part, _BatchNorm) for part in module.modules()),
        "the run is one process": num_processes(options) == 1,
        "only GPUs synchronise": not uses_gpu(options["accelerator"]),
    }
    reasons = [reason for reason, is_met in obstacles.items() if is_met]
    if choice is True and reasons:
        raise InputError(f"trainer.sync_batchnorm=true has no effect: {reasons[0]}; set it to auto")
    if choice == "auto" and reasons == ["only GPUs synchronise"]:
        log.warning("batch norms see each process's own part of a batch: on CPUs they are not synchronised")
    return choice is not False and not reasons
