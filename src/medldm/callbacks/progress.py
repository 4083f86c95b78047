"""The progress bar on the terminal."""

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar


class ProgressBar(RichProgressBar):
    """Lightning's bar, with numbers that change only when they are logged. Lightning's own reads the loss
    after every batch, and each time the host waits for the device.
    """

    shown: dict[str, Any] | None = None

    def get_metrics(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        is_due = not trainer.training or trainer.global_step % trainer.log_every_n_steps == 0
        if is_due or self.shown is None:
            self.shown = super().get_metrics(trainer, module)
        return self.shown
