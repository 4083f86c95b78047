"""Samples as pictures over the epochs."""

from pathlib import Path
from typing import Any

import numpy as np
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from medldm.errors import InputError
from medldm.files import write_nifti
from medldm.plots import grid, save_gif, save_png, sweep


class Pictures(Callback):
    """The same validation samples every few validations: the module's `picture` as `samples/step_<n>.png`,
    and what its `figures` draws as `samples/<name>_<n>.png`.

    Where the samples are volumes, the first of them is written whole every `volumes_every_n_validations`
    validations: as `volume_<n>.nii.gz`, in [-1, 1], with the rows of the picture along its fourth axis, and
    as `sweep_<n>.gif`, which runs through its axial slices with the rows side by side. Loggers that take
    videos get the latter. It is a GIF and no MP4: a GIF keeps all 256 grey levels, and the only MP4 encoder
    that comes with OpenCV (`mp4v`) makes files that browsers do not play.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        every_n_validations: int = 1,
        num_samples: int = 8,
        volumes_every_n_validations: int | None = None,
    ) -> None:
        for key, every in (("", every_n_validations), ("volumes_", volumes_every_n_validations)):
            if every is not None and every < 1:
                raise InputError(f"callbacks.pictures.{key}every_n_validations={every}: give 1 or more")
        self.folder = Path(folder)
        self.volumes_every_n_validations = volumes_every_n_validations
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
        due = [every is not None and self.num_validations % every == 0 for every in self.periods]
        self.num_validations += 1
        if not any(due):
            return
        rows = module.picture(self._batch)
        orientation = module.description.get("facts", {}).get("orientation")
        if due[0]:
            self.write_pictures(trainer, module, rows, orientation)
        if due[1]:
            self.write_volume(trainer, rows, orientation)

    @property
    def periods(self) -> tuple[int, int | None]:
        return self.every_n_validations, self.volumes_every_n_validations

    def write_pictures(
        self, trainer: Trainer, module: LightningModule, rows: list[Tensor], orientation: str | None
    ) -> None:
        pictures = {"step": grid(rows, orientation)} if rows else {}
        pictures |= module.figures(self._batch)
        for name, picture in pictures.items():
            path = self.folder / f"{name}_{trainer.global_step:07d}.png"
            save_png(path, picture)
            for logger in trainer.loggers:
                if hasattr(logger, "log_image"):
                    logger.log_image("samples" if name == "step" else name, [str(path)])

    def write_volume(self, trainer: Trainer, rows: list[Tensor], orientation: str | None) -> None:
        volumes = np.stack([row[0, 0].float().cpu().numpy() for row in rows], axis=-1)  # (*S, rows)
        affine = centred(self._batch["affine"][0].cpu().numpy(), volumes.shape[:3])
        write_nifti(self.folder / f"volume_{trainer.global_step:07d}.nii.gz", volumes, affine)
        path = self.folder / f"sweep_{trainer.global_step:07d}.gif"
        save_gif(path, sweep(rows, orientation))
        for logger in trainer.loggers:
            if hasattr(logger, "log_video"):
                logger.log_video("sweep", [str(path)], format=["gif"])


def centred(affine: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The axes and voxel sizes of an affine with the middle of a window at 0: where a window was cut is not
    known to its batch.
    """
    out = affine.copy()
    out[:3, 3] = -out[:3, :3] @ ((np.array(shape) - 1) / 2)
    return out
