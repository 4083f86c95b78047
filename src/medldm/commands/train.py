"""medldm train: train one stage of an experiment.

  medldm train experiment=cardiac2d/vqvae data.root=DATA
  medldm train experiment=cardiac2d/ldm data.root=DATA model.first_stage.checkpoint=runs/.../best.ckpt

Keys people use:
  data.root=DIR               prepared dataset (`medldm prepare`); data=folder for your own images
  data.batch_size, data.num_workers, data.latents=auto (the cache of `medldm encode`)
  model.optimizer.lr, model.first_stage.checkpoint
  trainer.max_steps (updates), trainer.max_epochs, trainer.devices, trainer.precision
  run_dir=DIR                 default: runs/<experiment>/<time>
  init_from=CKPT              start from the weights of another run of the same model (fine-tuning)
  resume=auto | CKPT          continue run_dir, or the newest run of the experiment, or start afresh
  logger=wandb                Weights & Biases beside metrics.csv
  debug=tiny                  two updates of a narrow network: does everything fit together?
  seed=0

SIGUSR1, SIGTERM and Ctrl-C finish the step and write checkpoints/last.ckpt; SIGUSR1 exits with 85.
Prints the run folder at the end.
"""

import logging
import math
import os
import sys
from pathlib import Path
from typing import Any

from medldm.commands import experiment_name, run_command
from medldm.errors import InputError

log = logging.getLogger(__name__)

TINY_WIDTH = 16
NARROWED = [
    f"{part}_channels" for part in ("stem", "mid", "hidden", "middle", "encoder", "decoder", "spade_hidden")
]


def shrink(model: dict[str, Any]) -> dict[str, Any]:
    """The same model, narrow: what `debug=tiny` trains. Only sizes change, never the parts."""

    def narrow(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: narrow(k, v) for k, v in value.items()}
        if key in ("channels", "up_channels") and isinstance(value, list):
            return [TINY_WIDTH] * len(value)
        if key in NARROWED and value:
            return TINY_WIDTH
        limits = {"embedding_channels": 32, "sinusoidal_channels": 16, "num_codes": 64, "num_heads": 2}
        limits |= {"head_channels": 8, "start": 1, "ramp": 0, "warmup_steps": 0, "num_mid_units": 1}
        limits |= {"num_res_blocks": 1, "num_blocks": 1, "num_features": 16}
        limits["norm_groups"] = 8  # two channels a group: one alone cannot be normalised on a 1x1 grid
        if key in limits and value is not None:
            return [limits[key]] * len(value) if isinstance(value, list) else min(value, limits[key])
        return value

    small = {key: narrow(key, value) for key, value in model.items()}
    for part in (small, small.get("objective") or {}):
        if part.get("perceptual"):
            part["perceptual"]["network"] = "random_conv"  # needs no weights
    if small["kind"] == "translation":  # latents of a few voxels leave no room for more
        for part in (small["discriminators"] or {}).values():
            part |= {"channels": part["channels"][:1], "strides": part["strides"][:1]}
    if small.get("sampler"):
        small["sampler"]["num_steps"] = 2
    return small


def find_run_dir(cfg: Any) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to resume from or None). Other ranks use the first one's folder."""
    from medldm.runs import new_run_dir, newest_run

    parent = Path(cfg.paths.output_root) / experiment_name()
    of_first_rank = os.environ.get("MEDLDM_RUN_DIR") if "LOCAL_RANK" in os.environ else None
    given = cfg.run_dir or of_first_rank
    if cfg.resume and cfg.resume != "auto":
        checkpoint = Path(cfg.resume)
        if not checkpoint.is_file():
            raise InputError(f"resume={checkpoint}: no such checkpoint; give a path or resume=auto")
        return Path(given) if given else checkpoint.resolve().parents[1], checkpoint
    run_dir = Path(given) if given else (newest_run(parent) if cfg.resume else None) or new_run_dir(parent)
    last = run_dir / "checkpoints" / "last.ckpt"
    if cfg.resume:
        return run_dir, last if last.is_file() else None
    if last.is_file() and of_first_rank is None:
        raise InputError(
            f"run_dir={run_dir} holds a run already; add resume=auto to continue it, or give another"
        )
    return run_dir, None


def choose_for(cfg: Any) -> Any:
    """The `DeviceSettings` of this training. InputError where it asks for devices or numbers that there are
    not.
    """
    from medldm.devices import check_accelerator, choose_settings, find_hardware

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
    hardware = find_hardware(options.accelerator)
    return choose_settings(options.precision, cfg.channels_last, hardware=hardware, key="trainer.precision")


def build_trainer(
    cfg: Any, module: Any, datamodule: Any, run_dir: Path, resumed_step: int | None, settings: Any
) -> Any:
    """Lightning's Trainer with medldm's callbacks; modules that step by hand accumulate and clip."""
    import torch
    from hydra.utils import instantiate
    from lightning_fabric.plugins.environments import SLURMEnvironment
    from omegaconf import OmegaConf
    from pytorch_lightning.callbacks import LearningRateMonitor

    from medldm.callbacks import (
        EMA,
        Checkpoints,
        CountUpdates,
        LatentStatistics,
        MetricsFile,
        Pictures,
        ProgressBar,
        RandomState,
        StopOnSignal,
    )
    from medldm.checkpoints import AtomicCheckpointIO
    from medldm.devices import num_processes

    options = OmegaConf.to_container(cfg.trainer, resolve=True)
    options["precision"] = settings.precision
    if not module.automatic_optimization:
        module.accumulate_grad_batches = options.pop("accumulate_grad_batches")
        module.gradient_clip_val = options.pop("gradient_clip_val")
    if options["strategy"] == "auto" and num_processes(options) > 1:
        options["strategy"] = "ddp" if module.automatic_optimization else "ddp_find_unused_parameters_true"
    options["sync_batchnorm"] = syncs_batchnorm(options, module)
    checkpoints = Checkpoints(run_dir / "checkpoints", **cfg.callbacks.checkpoints)
    callbacks = [LatentStatistics(datamodule), CountUpdates()]
    callbacks += [EMA(**cfg.callbacks.ema)] if cfg.callbacks.ema else []
    check_volumes(cfg.callbacks.pictures, module)
    callbacks += [Pictures(run_dir / "samples", **cfg.callbacks.pictures)] if cfg.callbacks.pictures else []
    callbacks += [LearningRateMonitor("step"), RandomState(), checkpoints, StopOnSignal(checkpoints)]
    if options["enable_progress_bar"]:
        callbacks.append(ProgressBar(refresh_rate=10, leave=False))
    loggers: list[Any] = [MetricsFile(run_dir / "metrics.csv", resumed_step=resumed_step)]
    if cfg.logger.wandb:
        loggers.append(instantiate(cfg.logger.wandb, save_dir=str(run_dir)))
    plugins: list[Any] = [AtomicCheckpointIO()]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # slurm/job.sbatch requeues
    torch.set_float32_matmul_precision(settings.matmul_precision)
    options["_target_"] = cfg.trainer._target_
    return instantiate(
        options, callbacks=callbacks, logger=loggers, plugins=plugins, default_root_dir=str(run_dir),
        use_distributed_sampler=False, enable_model_summary=False, enable_checkpointing=True,
    )  # fmt: skip


def check_volumes(pictures: Any, module: Any) -> None:
    if pictures and pictures.volumes_every_n_validations and module.description["facts"]["spatial_dims"] != 3:
        raise InputError(
            "callbacks.pictures.volumes_every_n_validations: the images are no volumes; set it to null"
        )


def syncs_batchnorm(options: dict[str, Any], module: Any) -> bool:
    """`auto`: where batch norms would each see one process's part of a batch. InputError for `true` where
    nothing can be synchronised; torch does it on GPUs alone.
    """
    from torch.nn.modules.batchnorm import _BatchNorm

    from medldm.devices import num_processes, uses_gpu

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


def quieten() -> None:
    """Drop Lightning's advertisements and hints that do not apply; warnings of substance stay."""
    import warnings

    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for text in (
        ".*`srun` command is available.*",
        ".*does not have many workers.*",
        ".*LeafSpec.*",
        ".*module\\(s\\) in eval mode.*",
        ".*your dataloader is not resumable.*",  # the data module is
        ".*overridden `transfer_batch_to_device` in `LightningModule`.*",  # and to be used
    ):
        warnings.filterwarnings("ignore", text)
    warnings.filterwarnings("ignore", ".*number of training batches.*smaller than the logging interval.*")


def checked_resume(path: Path, model: dict[str, Any]) -> dict[str, Any]:
    """The checkpoint's content; InputError where it is of another model than the config's."""
    from medldm.checkpoints import read_checkpoint

    content = read_checkpoint(path)
    description = content["medldm"]
    if description["stage"] != model["kind"]:
        raise InputError(
            f"{path}: holds a {description['stage']} model, the experiment trains a {model['kind']} model"
        )
    changed = [
        key
        for key in (
            "autoencoder",
            "codec",
            "network",
            "translator",
            "conditioner",
            "schedule",
            "objective",
            "likelihood",
        )
        if description["model"].get(key) != model.get(key)
    ]
    if changed:
        raise InputError(
            f"{path}: model.{changed[0]} differs from the run's config; undo it or start a new run"
        )
    return content


def require_stages(model: dict[str, Any], content: dict[str, Any] | None) -> list[dict[str, Any] | None]:
    """Descriptions of first stage and map stage where a resumed checkpoint brings their weights, else None:
    load them.
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


def initialise(module: Any, path: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Start from another run's weights (fine-tuning) and return what is kept of their origin; InputError
    where they do not fit.

    A first stage stays the one that `model.first_stage.checkpoint` names.
    """
    from medldm.attributes import check_order
    from medldm.build import load_module
    from medldm.held_out import origin_of

    def is_frozen(name: str) -> bool:
        return name.startswith(("first_stage.", "map_stage."))

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
    """A resumed run keeps the stages that it was begun with, whatever lies at their paths now."""
    from medldm.fingerprints import file_sha256

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
    from medldm.held_out import changed_data

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


def check_stages(cfg: Any, description: dict[str, Any], datamodule: Any) -> None:
    """InputError where a stage below, the model that a fine-tuning starts from, or the one that made the
    synthetic images was trained on subjects of this split's test part; a warning where it was on those of the
    validation part.
    """
    from medldm.held_out import EARLIER, check_held_out, seen_subjects

    if datamodule.synthetic is not None:
        seen = datamodule.synthetic.seen
        path, allow = datamodule.synthetic_dir, bool(cfg.allow_training_subjects)
        check_held_out(seen, datamodule.subjects["test"], path, "test", allow=allow, key="data.synthetic")
    for stage in (stage for stage in EARLIER if description.get(stage)):
        key = stage if stage == "init_from" else f"model.{stage}.checkpoint"
        path = cfg.init_from if stage == "init_from" else cfg.model[stage].checkpoint
        seen = seen_subjects(description[stage], datamodule.index)
        for subset in ("test", "val"):
            allow = bool(cfg.allow_training_subjects) or subset == "val"
            check_held_out(seen, datamodule.subjects[subset], path, subset, allow=allow, key=key)
            seen = seen._replace(unrecorded=[])  # said once


def make_module(
    cfg: Any, model: dict[str, Any], datamodule: Any, resume: Path | None, content: dict[str, Any] | None
) -> Any:
    """The module with its description, after checking that its data are those of a resumed run and held-out
    subjects are unseen.
    """
    from medldm.attributes import check_nulls, check_order
    from medldm.build import build_module
    from medldm.checkpoints import describe

    record = getattr(datamodule, "record", None)  # None for data that are made on the fly
    if content is not None:
        check_order(content["medldm"]["facts"], datamodule.facts, f"resume={resume}")
        check_resumed_data(resume, content, record)
        warn_of_other_stages(model, content["medldm"])
    module = build_module(model, datamodule.facts, *require_stages(model, content))
    module.description = describe(model, datamodule.facts, module, record)
    if content is not None and content["medldm"].get("init_from"):
        module.description["init_from"] = content["medldm"]["init_from"]
    elif cfg.init_from and not resume:
        module.description["init_from"] = initialise(module, cfg.init_from, datamodule.facts)
    if record is not None:
        check_stages(cfg, module.description, datamodule)
        conditioner = getattr(module, "conditioner", None)
        if conditioner is not None:
            what = f"{datamodule.root}: some images of val"
            check_nulls(conditioner.attributes, conditioner.null_attributes, datamodule.unstated("val"), what)
    return module


def check_sizes(module: Any, datamodule: Any) -> None:
    """InputError where an image of training or validation does not divide by the model's factors."""
    factors = module.size_factors
    sizes = datamodule.image_sizes() if factors and hasattr(datamodule, "image_sizes") else {}
    for size, path in sizes.items():
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


def cache_of(model: dict[str, Any], resumed: dict[str, Any] | None) -> str | None:
    """Name of the cache of the encoder that makes the latents: that of a resumed checkpoint's own first
    stage, whatever has become of the file that it came from, else of `model.first_stage.checkpoint`.
    """
    from medldm.checkpoints import encoder_sha256, latents_name

    if resumed is not None:
        return encoder_sha256(resumed, resumed["sha256"])[:12]
    checkpoint = Path(model["first_stage"]["checkpoint"])
    return latents_name(checkpoint) if checkpoint.is_file() else None


def find_latents(data: dict[str, Any], model: dict[str, Any], resumed: dict[str, Any] | None) -> str | None:
    """Name of the latent cache; `auto`: what `medldm encode` made with this encoder, if anything. InputError
    where the cache is of another encoder, or encoding has not finished.
    """
    from medldm.data.loading.latents import encode_command
    from medldm.files import read_json

    name = data.get("latents")
    checkpoint = model.get("first_stage", {}).get("checkpoint")
    if name is None or checkpoint is None:
        return None
    expected = cache_of(model, resumed)
    folder = Path(data["root"]) / "latents" / (expected if name == "auto" and expected else name)
    mend = f"run `{encode_command(checkpoint, data['root'], data.get('spatial_dims'))}` to its end"
    if name == "auto" and not folder.is_dir():
        log.warning("data.latents=auto: no cache of %s; encoding every batch", checkpoint)
        return None
    facts = read_json(folder / "latents.json", f"{mend}, or set data.latents=null")
    made_with = facts.get("encoder_sha256") or folder.name  # an older medldm says it in the name alone
    if expected is not None and made_with[:12] != expected:
        raise InputError(
            f"data.latents={name}: made with another autoencoder than {checkpoint}; set data.latents=auto"
        )
    return folder.name


def check_knobs(cfg: Any, model: dict[str, Any], module: Any, spatial_dims: int) -> None:
    """InputError for a setting that nothing would read, before anything is written."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    from medldm.diffusion.sampler import check_guidance
    from medldm.knobs import refuse_idle, typed_keys

    typed = typed_keys(HydraConfig.get().overrides.task) if HydraConfig.initialized() else ()
    options = {name: OmegaConf.to_container(cfg[name], resolve=True) for name in ("data", "callbacks")}
    conditioner = module.conditioner
    groups = () if conditioner is None else conditioner.groups
    refuse_idle(model, spatial_dims, groups, options=options, typed=typed)
    if conditioner is not None:
        check_guidance(module.sampler, conditioner)
    start, updates = (model.get("adversarial") or {}).get("start", 0), cfg.trainer.max_steps
    if 0 < updates <= start:
        log.warning(
            "model.adversarial.start=%d is not reached in trainer.max_steps=%d: no discriminator trains",
            start,
            updates,
        )


def check_monitor(monitor: str, module: Any) -> None:
    if monitor not in module.validation_metrics:
        raise InputError(
            f"callbacks.checkpoints.monitor={monitor}: not logged by this model; "
            f"choose one of {', '.join(module.validation_metrics)}"
        )


def task(cfg: Any) -> None:
    import torch
    from omegaconf import OmegaConf
    from pytorch_lightning import seed_everything

    from medldm.build import module_class
    from medldm.callbacks import EXIT_REQUEUE, Interrupted
    from medldm.data import build_datamodule
    from medldm.files import replacing
    from medldm.runs import log_to

    quieten()
    settings = choose_for(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    model = OmegaConf.to_container(cfg.model, resolve=True)
    model = shrink(model) if cfg.get("tiny") else model
    run_dir, resume = find_run_dir(cfg)
    content = checked_resume(resume, model) if resume else None
    resumed_step = content["global_step"] if content else None
    first_stage, _ = require_stages(model, content)
    data = OmegaConf.to_container(cfg.data, resolve=True)
    data["latents"] = find_latents(data, model, first_stage)
    kind = module_class(model)
    keys = kind.batch_keys(model, is_cached=data["latents"] is not None)
    datamodule = build_datamodule(data, keys=keys, seed=cfg.seed, with_cine=kind.takes_unlabelled)
    module = make_module(cfg, model, datamodule, resume, content)
    if settings.channels_last:
        module.use_channels_last()
    for part in module.compiled_parts if cfg.compile else ():
        part.compile()
    check_knobs(cfg, model, module, datamodule.facts["spatial_dims"])
    check_sizes(module, datamodule)
    check_monitor(cfg.callbacks.checkpoints.monitor, module)
    module.setup("fit")  # finds out whether its weights are there, before the run folder is
    trainer = build_trainer(cfg, module, datamodule, run_dir, resumed_step, settings)
    os.environ["MEDLDM_RUN_DIR"] = str(run_dir)
    if trainer.is_global_zero:
        for left in (run_dir / "checkpoints").glob(".*.tmp"):  # of a process killed while it saved
            left.unlink(missing_ok=True)
        with replacing(run_dir / "config.yaml") as aside:
            aside.write_text(OmegaConf.to_yaml(cfg, resolve=True))
        log_to(run_dir / "log")
        num_parameters = sum(p.numel() for p in module.parameters() if p.requires_grad)
        log.info(
            "%s: %.2fM trainable parameters, run folder %s", model["kind"], num_parameters / 1e6, run_dir
        )
        log.info("resuming %s at step %s", resume, resumed_step) if resume else None
    torch.manual_seed(cfg.seed)
    try:
        trainer.fit(module, datamodule, ckpt_path=str(resume) if resume else None)
    except Interrupted as stop:
        import signal

        message = f"medldm train: stopped by {stop}; continue with run_dir={run_dir} resume=auto"
        if not trainer.is_global_zero:
            return  # Lightning kills the first process when another ends with a status, be it its own
        print(message, file=sys.stderr)
        sys.exit(EXIT_REQUEUE if stop.signum == signal.SIGUSR1 else 128 + stop.signum)
    if trainer.is_global_zero:
        print(run_dir)


def main() -> None:
    run_command(task, "train")


if __name__ == "__main__":
    main()
