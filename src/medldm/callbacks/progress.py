"""How far a training has come."""

import logging
from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import Callback, RichProgressBar

from medldm.progress import Pace

log = logging.getLogger(__name__)


class ProgressBar(RichProgressBar):
    """Lightning's bar, with numbers that change only when they are logged, and without a last epoch where
    none is set. Lightning's own reads the loss after every batch, and each time the host waits for the
    device; of trainings whose end is a number of updates, max_epochs=-1, it says "Epoch 0/-2".
    """

    shown: dict[str, Any] | None = None

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        is_due = not trainer.training or trainer.global_step % trainer.log_every_n_steps == 0
        if is_due or self.shown is None:
            self.shown = super().get_metrics(trainer, module)
        return self.shown

    def _get_train_description(self, current_epoch: int) -> str:
        text = super()._get_train_description(current_epoch)
        # As many characters as before: the bars of training and validation stay aligned.
        return text.replace("/-2", "   ") if self.trainer.max_epochs == -1 else text


class ProgressLines(Callback):
    """A line of the log once a minute, where no bar can be drawn: the update, of how many, the losses that
    the bar would show, and the time that is left at the rate so far, validation included.

    A line waits for the next update at which losses are logged, so that the host waits for the device no
    more often than it does anyway.
    """

    def __init__(self) -> None:
        self.lines: Pace | None = None

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.is_global_zero:
            num_batches = trainer.estimated_stepping_batches
            self.lines = Pace("update", None if num_batches in (-1, float("inf")) else int(num_batches))
            self.lines.begin(trainer.global_step)

    def on_train_batch_end(
        self, trainer: Trainer, module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self.lines is None or trainer.global_step % trainer.log_every_n_steps or not self.lines.due():
            return
        shown = ((name, float(value)) for name, value in trainer.progress_bar_metrics.items())
        losses = "".join(f", {name} {value:.4g}" for name, value in shown)
        log.info("%s", self.lines.line(trainer.global_step, f", epoch {trainer.current_epoch}{losses}"))
