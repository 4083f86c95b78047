"""Describes samples for provenance.json: everything that decides what is written."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from medldm.data.loading.dataset import CaseDataset
from medldm.fingerprints import digest
from medldm.models.common import TrainedModule
from medldm.sampling import Predictor


def describe_run(
    cfg: DictConfig, module: TrainedModule, predictor: Predictor, precision: str
) -> dict[str, Any]:
    """The part that is about the checkpoint and the settings."""
    conditioner = module.conditioner
    return {
        "checkpoint": str(cfg.checkpoint),
        "checkpoint_sha256": module.checkpoint_sha256,
        "weights": cfg.weights,
        "ema_length": cfg.ema_length,
        "stage": predictor.stage,
        "decoder": describe_decoder(module),
        "condition_channels": None if conditioner is None else conditioner.spade_channels,
        "sampler": describe_sampler(module) if predictor.is_generative else None,
        "condition": list(predictor.keys) if predictor.is_generative else None,
        "attributes": [] if conditioner is None else list(conditioner.attributes),
        "dropped": list(cfg.drop),
        "edge_level": cfg.edge_level,
        "seed": cfg.seed,
        "precision": precision,
        "num_samples": cfg.num_samples,
        "max_slices": cfg.max_slices,
        "windows": [*cfg.windows.size, cfg.windows.overlap] if cfg.windows.size else None,
        "interpolate": [cfg.interpolate.count, cfg.interpolate.time] if cfg.interpolate.count else None,
        "torch": torch.__version__,
    }


def describe_data(cfg: DictConfig, dataset: CaseDataset) -> dict[str, Any]:
    """The part that is about the conditions; each case's file knows its own."""
    data = OmegaConf.to_container(cfg.data, resolve=True)
    names = sorted({dataset.cases[item.case]["id"] for item in dataset.items})
    return {
        "data_root": str(Path(cfg.data.root).resolve()),
        "data_split": data["split"],
        "split": cfg.split,
        "cases": f"{len(names)}, digest {digest(names)}",
        "views": data["views"],
        "edge_degrade": data["edge_degrade"] if cfg.edge_level is not None else None,
    }


def describe_decoder(module: TrainedModule) -> str | None:
    """The kind of decoder: "spade" where it sees the map, else "plain"; None where there is no
    autoencoder.
    """
    if module.image_decoder is None:
        return None
    return "plain" if module.image_decoder.decoder_map_channels is None else "spade"


def describe_sampler(module: TrainedModule) -> dict[str, Any]:
    """The sampler's class and its fields, and the checkpoint that guides it."""
    guides = [guide.checkpoint_sha256 for guide in getattr(module, "guides", ())]
    kind = {"kind": type(module.sampler).__name__, "guide": guides[0] if guides else None}
    return kind | dataclasses.asdict(module.sampler)
