"""Training callbacks: moving average, checkpoints, signals, pictures, metrics that survive a resume."""

import csv
import logging
import signal
from pathlib import Path
from typing import Any, TextIO

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from medldm.errors import InputError
from medldm.files import replacing
from medldm.plots import grid

log = logging.getLogger(__name__)
EXIT_REQUEUE = 85  # slurm/job.sbatch requeues a job that ends with this status


class EMA(Callback):
    """Exponential moving average of `module.ema_modules`, used in validation, sampling and export.

    The decay warms up as min(decay, (1 + n) / (10 + n)). It is saved under the checkpoint's key "ema". A
    module without `ema_modules` has no average.
    """

    def __init__(self, decay: float = 0.9999, *, every_n_steps: int = 1) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"callbacks.ema.decay={decay} must lie in [0, 1)")
        self.decay, self.every_n_steps = decay, every_n_steps
        self.average: AveragedModel | None = None
        self.last_step = 0
        self._state: dict[str, Tensor] | None = None
        self._raw: list[Tensor] | None = None

    def _lerp(self, averaged: list[Tensor], current: list[Tensor], num_averaged: Tensor) -> None:
        # num_averaged lives on the host, so looking at it does not wait for the device.
        n = int(num_averaged)
        decay = min(self.decay, (1 + n) / (10 + n))
        torch._foreach_lerp_(averaged, current, 1 - decay)

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if getattr(module, "ema_modules", None) is None:
            return
        self.average = AveragedModel(module.ema_modules, multi_avg_fn=self._lerp)
        self.average.requires_grad_(False)
        if self._state is not None:
            self.average.load_state_dict(self._state)
            self._state = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.last_step = trainer.global_step  # a resumed run's step is not restored yet in on_fit_start

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.average is None or trainer.global_step == self.last_step:
            return  # an accumulating batch: no update happened
        self.last_step = trainer.global_step
        if trainer.global_step % self.every_n_steps == 0:
            self.average.update_parameters(module.ema_modules)

    def _swap_in(self, module: LightningModule) -> None:
        if self.average is None or self.average.n_averaged == 0 or self._raw is not None:
            return
        self._raw = [p.detach().clone() for p in module.ema_modules.parameters()]
        self._copy(list(self.average.module.parameters()), module)

    def _swap_out(self, module: LightningModule) -> None:
        if self._raw is not None:
            self._copy(self._raw, module)
            self._raw = None

    @staticmethod
    @torch.no_grad()
    def _copy(source: list[Tensor], module: LightningModule) -> None:
        torch._foreach_copy_(list(module.ema_modules.parameters()), source)

    def on_validation_start(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_in(module)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        self._swap_out(module)

    def on_exception(self, trainer: Trainer, module: LightningModule, exception: BaseException) -> None:
        self._swap_out(module)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        assert self._raw is None, "a checkpoint must hold the raw weights"
        if self.average is not None:
            checkpoint["ema"] = self.average.state_dict()

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        self._state = checkpoint.get("ema")


class CountUpdates(Callback):
    """Makes loggers count updates of the generator, whatever accumulates and whoever resumes.

    Lightning counts micro-batches under manual optimisation, and one too many after some resumes.
    """

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class Checkpoints(Checkpoint):
    """`best.ckpt` by a validation metric; `last.ckpt` every so many updates and at every epoch's end.

    A model with a number that is not finite is never written: the last good checkpoint stays.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        monitor: str = "val/loss",
        mode: str = "min",
        every_n_steps: int = 1000,
        every_epoch: bool = True,
    ) -> None:
        if mode not in ("min", "max"):
            raise InputError(f"callbacks.checkpoints.mode={mode} is none of min, max")
        self.folder, self.monitor, self.every_n_steps = Path(folder), monitor, every_n_steps
        self.every_epoch = every_epoch
        self.sign = 1.0 if mode == "min" else -1.0
        self.best: float | None = None
        self.last_saved = -1
        self.is_epoch_end = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def save(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        check_finite(module, trainer.global_step)
        trainer.save_checkpoint(self.folder / name)

    def save_last(self, trainer: Trainer, module: LightningModule) -> None:
        self.save(trainer, module, "last.ckpt")
        self.last_saved = trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        step = trainer.global_step
        is_due = step > 0 and step % self.every_n_steps == 0 and step != self.last_saved
        if is_due and is_between_batches(trainer, module):
            self.save_last(trainer, module)

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if not (self.every_epoch or trainer.should_stop or trainer.fit_loop.done):
            return
        self.is_epoch_end = True
        self.save_last(trainer, module)
        self.is_epoch_end = False

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        if self.is_epoch_end:
            is_whole = trainer.fit_loop.epoch_loop._num_ready_batches_reached()
            leave_epoch(checkpoint["loops"]["fit_loop"], is_whole=is_whole)

    def on_validation_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise InputError(
                f"callbacks.checkpoints.monitor={self.monitor}: not logged; choose one of "
                f"{', '.join(k for k in trainer.callback_metrics if k.startswith('val/'))}"
            )
        value = float(value)
        if self.best is None or self.sign * value < self.sign * self.best:
            self.best = value
            self.save(trainer, module, "best.ckpt")

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.best is None:  # no validation ran
            self.save(trainer, module, "best.ckpt")


def leave_epoch(loops: dict[str, Any], *, is_whole: bool) -> None:
    """Move saved loops from on_train_epoch_end to where training goes on.

    That is the next epoch, or the middle of this one where max_steps cut it short. Lightning would run the
    end of the epoch again, and one more batch.
    """
    for progress in loops["epoch_progress"].values():
        progress["completed"] = progress["processed"] = progress["processed"] - (not is_whole)
    if is_whole:
        batches = loops["epoch_loop.batch_progress"]
        batches["is_last_batch"] = False
        batches["current"] = dict.fromkeys(batches["current"], 0)


def is_between_batches(trainer: Trainer, module: LightningModule) -> bool:
    """Whether what follows is one more training batch on clean gradients: the place to save and to stop.

    A checkpoint from before a validation would resume after it, without its metrics and best.ckpt; one with
    gradients pending would lose them.
    """
    loop = trainer.fit_loop.epoch_loop
    is_pending = loop._should_accumulate() if module.automatic_optimization else module.is_accumulating
    ends_epoch = loop._is_training_done or loop._should_check_val_fx(trainer.fit_loop._data_fetcher)
    return not (is_pending or ends_epoch)


def check_finite(module: LightningModule, step: int) -> None:
    """InputError where a weight or a codebook entry is not finite."""
    norms = torch._foreach_norm([v for v in module.state_dict().values() if v.is_floating_point()])
    if not torch.stack([norm.float() for norm in norms]).sum().isfinite():
        raise InputError(
            f"training diverged before step {step}: weights are not finite; earlier checkpoints are kept; "
            "lower model.optimizer.lr or set trainer.precision=32-true, then resume=auto"
        )


class Interrupted(Exception):  # noqa: N818 - not an error: the way out of the loop after a signal
    """Training stopped at a step boundary because of `signum`; last.ckpt is written."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopOnSignal(Callback):
    """SIGUSR1 (SLURM, before the limit), SIGTERM, Ctrl-C: finish the step, write last.ckpt, leave the loop.

    Lightning's own requeue saves inside the signal handler, in the middle of a step. A signal during
    validation takes effect after it. A second Ctrl-C ends at once.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received: int | None = None
        self.has_saved = False
        self.listen()

    def listen(self) -> None:
        for signum in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: Any) -> None:
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        self.received = signum
        log.info("received %s: stopping after this step", signal.Signals(signum).name)

    def is_asked(self, trainer: Trainer) -> bool:
        """Whether any rank has heard a signal: they may have heard it at different steps."""
        asked = self.received is not None
        return trainer.strategy.reduce_boolean_decision(asked, all=False) if trainer.world_size > 1 else asked

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.listen()  # Lightning has put its own handler of SIGTERM in this one's place

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.is_asked(trainer) and is_between_batches(trainer, module):
            self.checkpoints.save_last(trainer, module)
            self.has_saved = True

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if self.has_saved:  # not in on_train_batch_end: the step's metrics are logged after it
            raise Interrupted(self.received or signal.SIGUSR1)

    def on_train_epoch_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self.is_asked(trainer) and self.checkpoints.last_saved == trainer.global_step:
            raise Interrupted(self.received or signal.SIGUSR1)


class RandomState(Callback):
    """Saves and restores the random states of host and device, for what draws from them (dropout)."""

    def __init__(self) -> None:
        self._state: dict[str, Tensor] | None = None

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        state = {"cpu": torch.get_rng_state()}
        if module.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(module.device)
        checkpoint["random_state"] = state

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        self._state = checkpoint.get("random_state")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._state is None:
            return
        torch.set_rng_state(self._state["cpu"].cpu())
        if "cuda" in self._state and module.device.type == "cuda":
            torch.cuda.set_rng_state(self._state["cuda"].cpu(), module.device)
        self._state = None


class Pictures(Callback):
    """The same validation samples every few validations: the module's `picture` as `samples/step_<n>.png`.

    What the module's `figures` draws, where it has them, goes to `samples/<name>_<n>.png`.
    """

    def __init__(self, folder: str | Path, *, every_n_validations: int = 1, num_samples: int = 8) -> None:
        self.folder = Path(folder)
        self.every_n_validations, self.num_samples = every_n_validations, num_samples
        self.num_validations = 0
        self._batch: dict | None = None

    def state_dict(self) -> dict[str, int]:
        return {"num_validations": self.num_validations}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.num_validations = state["num_validations"]

    def on_validation_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: dict, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx == 0:
            self._batch = {key: value[: self.num_samples] for key, value in batch.items()}

    def on_validation_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or self._batch is None or not trainer.is_global_zero:
            return
        self.num_validations += 1
        if (self.num_validations - 1) % self.every_n_validations:
            return
        rows = module.picture(self._batch)
        orientation = getattr(module, "description", {}).get("facts", {}).get("orientation")
        pictures = {"step": grid(rows, orientation)} if rows else {}
        if hasattr(module, "figures"):
            pictures |= module.figures(self._batch)
        for name, picture in pictures.items():
            path = self.folder / f"{name}_{trainer.global_step:07d}.png"
            save_png(path, picture)
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image("samples" if name == "step" else name, [str(path)])


def save_png(path: Path, picture: Tensor) -> None:
    """(3, H, W) uint8 -> a PNG file, whole or not at all."""
    from PIL import Image

    image = Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())
    with replacing(path) as aside:
        image.save(aside, format="PNG")


class MetricsFile(Logger):
    """metrics.csv, one row per logged update. Lightning's CSVLogger deletes the file of the run it resumes;
    this one drops the rows from after the checkpoint and goes on.

    A new row is appended; the file is written anew, aside, only where a column is new.
    """

    def __init__(self, path: str | Path, *, resumed_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        self.rows: dict[int, dict[str, Any]] = {}
        self.changed: set[int] = set()
        self.columns: list[str] = []  # of the file as it stands
        self.last_row = (-1, 0)  # its step, and where in the file it begins
        if resumed_step is not None and self.path.is_file():
            self.rows = self.read_rows(resumed_step)

    def read_rows(self, resumed_step: int) -> dict[int, dict[str, Any]]:
        """The rows before the checkpoint; a line that a kill cut short is left out."""
        lines = self.path.read_text().splitlines(keepends=True)
        complete = (line for line in lines if line.endswith("\n"))
        rows = {}
        for row in csv.DictReader(complete):
            step = int(row.pop("step"))
            if step < resumed_step:  # rows count from 0: the n-th update is row n - 1
                rows[step] = {key: value for key, value in row.items() if value != ""}
        return rows

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = int(step or 0)
        self.rows.setdefault(step, {}).update(metrics)
        self.changed.add(step)

    @rank_zero_only
    def save(self) -> None:
        """Lightning calls this after every row."""
        if not self.changed:
            return
        columns = set().union(*(self.rows[step] for step in self.changed))
        is_next = min(self.changed) >= self.last_row[0] and self.path.is_file()
        if is_next and columns <= set(self.columns):
            self.append(sorted(self.changed))
        else:
            self.rewrite()
        self.changed.clear()

    def append(self, steps: list[int]) -> None:
        """The rows of `steps`; the file's last row is replaced where it is one of them."""
        with open(self.path, "r+", newline="") as file:
            file.seek(self.last_row[1]) if steps[0] == self.last_row[0] else file.seek(0, 2)
            file.truncate()
            self.write(file, steps)

    def rewrite(self) -> None:
        self.columns = sorted(set().union(*self.rows.values()))
        with replacing(self.path) as aside, open(aside, "w", newline="") as file:
            csv.DictWriter(file, fieldnames=["step", *self.columns]).writeheader()
            self.write(file, sorted(self.rows))

    def write(self, file: TextIO, steps: list[int]) -> None:
        writer = csv.DictWriter(file, fieldnames=["step", *self.columns], restval="")
        for step in steps:
            self.last_row = (step, file.tell())
            writer.writerow({"step": step, **self.rows[step]})

    def finalize(self, status: str) -> None:
        self.save()
