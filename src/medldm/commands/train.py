"""medldm train: train one stage of an experiment.

  medldm train experiment=cardiac2d/vqvae data.root=DATA
  medldm train experiment=cardiac2d/ldm data.root=DATA model.first_stage.checkpoint=runs/.../best.ckpt

Keys people use:
  data.root=DIR               prepared dataset (`medldm prepare`); data=folder for your own images
  data.batch_size, data.num_workers, data.latents=auto (the cache of `medldm encode`)
  model.optimizer.lr, model.first_stage.checkpoint
  trainer.max_steps (updates), trainer.max_epochs, trainer.devices, trainer.precision
  trainer.num_nodes           under srun, which starts the processes; scale_lr=linear | sqrt
  run_dir=DIR                 default: runs/<experiment>/<time>
  init_from=CKPT              start from the weights of another run of the same model (fine-tuning)
  resume=auto | CKPT          continue run_dir, or the newest run of the experiment, or start a new one
  logger=wandb                Weights & Biases beside metrics.csv
  debug=tiny                  two updates of a narrow network, to see whether everything fits together
  seed=0

SIGUSR1, SIGTERM and Ctrl-C finish the step and write checkpoints/last.ckpt; after SIGUSR1 the process ends
with status 85. Prints the run folder at the end.
"""

import signal
import sys

import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import LightningDataModule, Trainer, seed_everything

from medldm.asked import refuse_other_recipe
from medldm.callbacks import EXIT_REQUEUE, Interrupted
from medldm.commands import experiment_name, run_command
from medldm.devices import DeviceSettings, num_processes
from medldm.locks import one_writer
from medldm.models.common import TrainedModule
from medldm.networks.compiling import compile_blocks
from medldm.overrides import typed_command, typed_overrides
from medldm.runs import note_command
from medldm.training.checks import check_knobs, check_monitor, check_sizes
from medldm.training.restoring import check_state
from medldm.training.run import Run, make_data, make_module, open_folder, open_run
from medldm.training.trainer import build_trainer, choose_for, quieten, scale_rates, tell_batch


def task(cfg: DictConfig) -> None:
    quieten()
    settings = choose_for(cfg)
    seed_everything(cfg.seed, workers=True, verbose=False)
    run = open_run(cfg, experiment_name())
    datamodule = make_data(cfg, run)
    module = make_module(cfg, run, datamodule)
    lay_out(module, settings, run)
    scale_rates(cfg.scale_lr, module, num_processes(cfg.trainer))
    check(cfg, run, module, datamodule)
    trainer = build_trainer(cfg, module, datamodule, run.folder, run.step, settings)
    check_state(run.resume, run.content, module, datamodule, trainer)
    config = OmegaConf.to_yaml(cfg, resolve=True)
    with one_writer(run.folder if trainer.is_global_zero else None):
        open_folder(run, module, config, is_first_rank=trainer.is_global_zero)
        if trainer.is_global_zero:
            note_command(run.folder, typed_command())
            tell_batch(trainer, module, cfg.data.get("batch_size"))
        torch.manual_seed(cfg.seed)
        fit(trainer, module, datamodule, run)


def lay_out(module: TrainedModule, settings: DeviceSettings, run: Run) -> None:
    """Memory layout and compilation of the networks; compiled kernels are kept in the run's folder."""
    if settings.channels_last:
        module.use_channels_last()
    if settings.compiles:
        compile_blocks(module, run.folder.absolute() / "compiled")


def check(cfg: DictConfig, run: Run, module: TrainedModule, datamodule: LightningDataModule) -> None:
    """InputError for what this training could not do, before its folder is made."""
    spatial_dims, typed = datamodule.facts["spatial_dims"], typed_overrides() or ()
    refuse_other_recipe(cfg.data, getattr(datamodule, "index", None), typed)
    check_knobs(cfg, run.model, module, spatial_dims, typed)
    check_sizes(module, datamodule)
    check_monitor(cfg.callbacks.checkpoints.monitor, module)
    module.setup("fit")  # finds out whether pretrained weights are there


def fit(trainer: Trainer, module: TrainedModule, datamodule: LightningDataModule, run: Run) -> None:
    """Train and print the run folder; a signal ends the process with a status that tells which."""
    try:
        trainer.fit(module, datamodule, ckpt_path=str(run.resume) if run.resume else None)
    except Interrupted as stop:
        if not trainer.is_global_zero:
            return  # Lightning kills the first process when another ends with a status, even its own
        mend = f"continue with run_dir={run.folder} resume=auto"
        print(f"medldm train: stopped by {stop}; {mend}", file=sys.stderr)
        sys.exit(EXIT_REQUEUE if stop.signum == signal.SIGUSR1 else 128 + stop.signum)
    if trainer.is_global_zero:
        print(run.folder)


def main() -> None:
    run_command(task, "train")


if __name__ == "__main__":
    main()
