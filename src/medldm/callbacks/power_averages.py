"""Stores averages of weights from which one of any length can be made after training. Karras et al. 2024."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.optim.swa_utils import AveragedModel

from medldm.averages import TRACKED, Snapshot, decay_at, write_average
from medldm.errors import InputError


class PowerAverages(Callback):
    """Averages of `module.ema_modules` by powers of training time, stored below the run folder.

    Averages of the lengths TRACKED are updated, each in a copy of the weights, and written every
    `every_n_steps` updates and at the end. At most `keep` files of each stay, and the older they are the
    further apart. A resumed run continues with the averages of its checkpoint.
    """

    def __init__(self, run_dir: Path, *, every_n_steps: int, keep: int = 16) -> None:
        if every_n_steps < 1 or keep < 2:
            raise InputError(
                f"callbacks.post_hoc_ema: every_n_steps={every_n_steps} must be at least 1 and keep={keep} "
                "at least 2"
            )
        self.run_dir, self.every_n_steps, self.keep = run_dir, every_n_steps, keep
        self.averages: dict[float, AveragedModel] = {}
        self.num_updates = self.last_step = self.stored_at = 0
        self._state: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if module.ema_modules is None:
            raise InputError("callbacks.post_hoc_ema: this model keeps no moving average; set it to null")
        self.averages = {length: AveragedModel(module.ema_modules) for length in TRACKED}
        for average in self.averages.values():
            average.requires_grad_(False)
        if self._state is not None:
            self.num_updates = self.stored_at = self._state["num_updates"]
            for length, average in self.averages.items():
                average.module.load_state_dict(self._state["weights"][str(length)])
            self._state = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        self.last_step = trainer.global_step

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if trainer.global_step == self.last_step:
            return  # there was no update, since batches are accumulated
        self.last_step = trainer.global_step
        self.num_updates += 1
        current, buffers = list(module.ema_modules.parameters()), list(module.ema_modules.buffers())
        for length, average in self.averages.items():
            followed = list(average.module.parameters())
            torch._foreach_lerp_(followed, current, 1 - decay_at(self.num_updates, length))
            if buffers:
                torch._foreach_copy_(list(average.module.buffers()), buffers)
        if self.num_updates % self.every_n_steps == 0:
            self.write(trainer)

    def write(self, trainer: Trainer) -> None:
        if trainer.is_global_zero and self.stored_at < self.num_updates:
            for length, average in self.averages.items():
                snapshot = Snapshot(self.num_updates, length)
                write_average(self.run_dir, snapshot, average.module.state_dict(), keep=self.keep)
        self.stored_at = self.num_updates

    def on_train_end(self, trainer: Trainer, module: LightningModule) -> None:
        if self.num_updates:
            self.write(trainer)

    def on_save_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        weights = {str(length): average.module.state_dict() for length, average in self.averages.items()}
        checkpoint["averages"] = {"num_updates": self.num_updates, "weights": weights}

    def on_load_checkpoint(self, trainer: Trainer, module: LightningModule, checkpoint: dict) -> None:
        self._state = checkpoint.get("averages")
