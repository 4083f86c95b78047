"""Checkpoints that describe themselves: one file rebuilds its model, and is written whole or not at all.

Under the key "medldm" a checkpoint holds plain data: the stage, the resolved model config, facts of the data
and, for a second stage, the first stage's own description. It loads under `weights_only=True`, strictly.
"""

import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from hydra.utils import get_class
from lightning_fabric.plugins import TorchCheckpointIO
from pytorch_lightning import LightningModule

from medldm.errors import InputError
from medldm.files import replacing

FORMAT = 1


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, made safe against a crash at any moment."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options: Any = None) -> None:
        with replacing(Path(path)) as aside:
            torch.save(checkpoint, aside)

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(path, map_location or "cpu")


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a medldm checkpoint; InputError for a missing, damaged or foreign file."""
    with open(existing(path), "rb") as file:
        return read_content(file, path, map_location)


def read_hashed(path: str | Path) -> tuple[dict[str, Any], str]:
    """`read_checkpoint` and the file's sha256, of one and the same file: a training that goes on may put
    another in its place meanwhile.
    """
    with open(existing(path), "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return read_content(file, path, "cpu"), sha256


def existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; give the path of a .ckpt that `medldm train` wrote")
    return Path(path)


def read_content(file: BinaryIO, path: str | Path, map_location: Any) -> dict[str, Any]:
    try:
        content = torch.load(file, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError, OSError, KeyError) as error:
        raise InputError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); take another one of the run"
        ) from error
    if not isinstance(content, Mapping) or "medldm" not in content:
        raise InputError(f"{path}: not a medldm checkpoint; give one that `medldm train` wrote")
    return content


def encoder_sha256(description: Mapping[str, Any], sha256: str) -> str:
    """Of the checkpoint that the encoder of a stage came with: a translator that leaves its autoencoder alone
    has the autoencoder's. `sha256` is that of the stage's own file.
    """
    is_shared = (
        description["stage"] == "translation"
        and not get_class(description["model"]["objective"]["_target_"]).trains_autoencoder
    )
    return description["first_stage"]["sha256"] if is_shared else sha256


def latents_name(path: str | Path) -> str:
    """The cache of the encoder in a checkpoint."""
    content, sha256 = read_hashed(path)
    return encoder_sha256(content["medldm"], sha256)[:12]


def describe(
    model: Mapping[str, Any],
    facts: Mapping[str, Any],
    module: LightningModule,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Plain data from which `medldm.build` makes the module again, and `data`, the record of what it was
    trained on (`medldm.held_out`).
    """
    description = {
        "format": FORMAT,
        "stage": model["kind"],
        "model": dict(model),
        "facts": dict(facts),
        "data": data,
    }
    for stage in ("first_stage", "map_stage"):
        if getattr(module, f"{stage}_description", None):
            description[stage] = getattr(module, f"{stage}_description")
    return description
