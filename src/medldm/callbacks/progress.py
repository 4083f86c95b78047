"""The progress bar on the terminal."""

from typing import Any

from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import RichProgressBar


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
