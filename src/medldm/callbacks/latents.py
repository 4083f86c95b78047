"""The statistics that a second stage's latents are normalised with."""

import logging
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from medldm.progress import tracked

log = logging.getLogger(__name__)


class LatentStatistics(Callback):
    """Before the first step: mean and deviation of the latents over the training set of `datamodule`, of its
    windows where it is cut.

    Every rank encodes its part on its own device, and all share the sums. A model without a first stage, or
    whose checkpoint brings the statistics along, is left alone.
    """

    def __init__(self, datamodule: Any) -> None:
        self.datamodule = datamodule

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        if not module.needs_latent_statistics:
            return
        dataset = self.datamodule.dataset("train", augment=self.datamodule.has_windows)
        batches = self.datamodule.loader(dataset, equal_shares=False)
        is_shown = trainer.is_global_zero
        shown = tracked(batches, "latent statistics", transient=True) if is_shown else batches
        module.fit_first_stage(shown)
        if is_shown:
            stage = module.first_stage
            log.info("latent mean %s, deviation %s", stage.shift.tolist(), stage.scale.tolist())
