"""What makes a run restartable: checkpoints, their place in the loop, signals and random states."""

import logging
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import Checkpoint
from torch import Tensor

from medldm.devices import random_state, restore_random_state
from medldm.errors import InputError
from medldm.files import replacing
from medldm.ranks import all_reduce, any_rank, host_group, is_divided, parts

log = logging.getLogger(__name__)
EXIT_REQUEUE = 85  # slurm/job.sbatch requeues a job that ends with this status


class CountUpdates(Callback):
    """Makes loggers count updates of the generator, whatever accumulates and whoever resumes.

    Lightning counts micro-batches under manual optimisation, and one too many after some resumes.
    """

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        trainer.fit_loop.epoch_loop._batches_that_stepped = trainer.global_step


class Checkpoints(Checkpoint):
    """`best.ckpt` is the best by a validation metric; `last.ckpt` is written every so many updates and at the
    end of every epoch.

    With `keep_best` above 1, that many of the best validations stay as `step_<n>_<value>.ckpt`; `best.ckpt`
    is then another name of the best of them, which takes no room where the file system has hard links. With
    `keep_last` above 1, that many of the last stay as `last_<n>.ckpt`. A model with a number that is not
    finite is never written: the last good checkpoint stays.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        monitor: str = "val/loss",
        mode: str = "min",
        every_n_steps: int = 1000,
        every_epoch: bool = True,
        keep_best: int = 1,
        keep_last: int = 1,
    ) -> None:
        if keep_last < 1:
            raise InputError(f"callbacks.checkpoints.keep_last={keep_last}: give 1 or more")
        if keep_best < 1:
            raise InputError(f"callbacks.checkpoints.keep_best={keep_best}: give 1 or more")
        if mode not in ("min", "max"):
            raise InputError(f"callbacks.checkpoints.mode={mode} is none of min, max")
        self.folder, self.monitor, self.every_n_steps = Path(folder), monitor, every_n_steps
        self.every_epoch = every_epoch
        self.sign = 1.0 if mode == "min" else -1.0
        self.best: float | None = None
        self.keep_best, self.keep_last = keep_best, keep_last
        self.kept: list[tuple[float, str]] = []  # value and file, the best first; empty where one is kept
        self.last_saved = -1
        self.is_epoch_end = False

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best} | ({"kept": self.kept} if self.keep_best > 1 else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]
        self.kept = [(value, name) for value, name in state.get("kept", ())]

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """After a restart the folder holds what the list says: files of later steps are made again."""
        self.kept = [(value, name) for value, name in self.kept if (self.folder / name).is_file()]
        if self.keep_best > 1 and trainer.is_global_zero:
            self.remove_others()
        if self.keep_last > 1 and trainer.is_global_zero:
            self.remove_last(trainer.global_step)

    def remove_last(self, step: int) -> None:
        """Remove the `last_<n>.ckpt` beyond `keep_last`, and those after `step`, which are made again."""
        files = (path for path in self.folder.glob("last_*.ckpt") if path.stem[5:].isdigit())
        numbered = {int(path.stem[5:]): path for path in files}
        kept = sorted(number for number in numbered if number <= step)[-self.keep_last :]
        for number in numbered.keys() - set(kept):
            numbered[number].unlink(missing_ok=True)

    def remove_others(self) -> None:
        names = {name for _, name in self.kept}
        for path in self.folder.glob("step_*.ckpt"):
            if path.name not in names:
                path.unlink(missing_ok=True)

    def save(self, trainer: Trainer, module: LightningModule, name: str) -> None:
        check_finite(module, trainer.global_step)
        trainer.save_checkpoint(self.folder / name)

    def save_last(self, trainer: Trainer, module: LightningModule) -> None:
        self.save(trainer, module, "last.ckpt")
        self.last_saved = step = trainer.global_step
        if self.keep_last > 1 and trainer.is_global_zero:
            link(self.folder / "last.ckpt", self.folder / f"last_{step:07d}.ckpt")
            self.remove_last(step)

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
        self.keep(trainer, module, float(value))

    def keep(self, trainer: Trainer, module: LightningModule, value: float) -> None:
        """Save the model if it is among the best. A value that is not a number never is."""
        if math.isnan(value):
            log.warning("%s is not a number at step %d: not kept as best", self.monitor, trainer.global_step)
            return
        is_best = self.best is None or self.sign * value < self.sign * self.best
        self.best = value if is_best else self.best
        if self.keep_best == 1:
            if is_best:
                self.save(trainer, module, "best.ckpt")
            return
        name = f"step_{trainer.global_step:07d}_{value:.6g}.ckpt"
        ranked = sorted([*self.kept, (value, name)], key=lambda entry: self.sign * entry[0])
        self.kept = ranked[: self.keep_best]
        if (value, name) not in self.kept:
            return
        self.save(trainer, module, name)
        if trainer.is_global_zero:
            if is_best:
                link(self.folder / name, self.folder / "best.ckpt")
            self.remove_others()

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.best is None:  # no validation ran
            self.save(trainer, module, "best.ckpt")


def link(path: Path, other: Path) -> None:
    """`other` becomes another name of `path`, or a copy where there are no hard links."""
    with replacing(other) as aside:
        try:
            os.link(path, aside)
        except OSError:
            shutil.copyfile(path, aside)


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
    values = [v for v in module.state_dict().values() if v.is_floating_point()]
    total = torch.stack([norm.float() for norm in torch._foreach_norm(parts(values))]).sum()
    if any(map(is_divided, values)):
        total = all_reduce(total)
    if not total.isfinite():
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
    """On SIGUSR1, which SLURM sends before the time limit, on SIGTERM and on Ctrl-C: finish the step, write
    last.ckpt and leave the loop.

    Lightning's own requeue saves inside the signal handler, in the middle of a step. A signal during
    validation takes effect after it. A second Ctrl-C ends at once.
    """

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.received: int | None = None
        self.has_saved = False
        self.group: Any = None  # of processes, where asking each other must not wait for a device
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
        return any_rank(self.received is not None, self.group)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.group = host_group()
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
        checkpoint["random_state"] = random_state(module.device)

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        self._state = checkpoint.get("random_state")

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._state is None:
            return
        restore_random_state(self._state, module.device)
        self._state = None
