"""Samples as pictures over the epochs."""

from pathlib import Path
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer

from medldm.plots import grid, save_png


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
