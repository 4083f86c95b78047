"""What configs/data/*.yaml says of loading, as one value."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medldm.data.loading.synthetic import TRAIN_ON
from medldm.errors import InputError


@dataclass(frozen=True)
class LoaderSettings:
    """The keys of `data` that loading reads; `prepare` reads the others."""

    batch_size: int  # items of each process
    num_workers: int = 0
    worker_context: str | None = None  # fork, spawn or forkserver; None is the system's own
    pin_memory: bool = False
    cache: str = "none"  # or ram: every array is read once
    split: str = "default"  # a name in splits.json
    views: Sequence[str] | None = None  # slices of these views alone
    balance_views: bool = False  # training draws every view equally often
    latents: str | None = None  # name of a cache of `medldm encode`
    crop_size: int | Sequence[int | None] | None = (
        None  # training cuts a random box, validation the central one
    )
    flip_axes: Sequence[int] = ()  # spatial axes that training mirrors with `flip_prob`
    flip_prob: float = 0.5
    pairs: str | None = None  # random: training sees one ordered pair of a subject in an epoch; all: each
    pair_labels: Sequence[Sequence[str]] | None = None  # [source, target] labels; None: every ordered pair
    edge_degrade: Mapping[str, Any] | None = None  # arguments of `EdgeDegrade`, with level and ramp_epochs
    train_fraction: float = 1.0  # of the training subjects
    train_on: str = "real"  # real, synthetic or both
    synthetic: str | Path | None = None  # folder of samples that stand in for real images

    def check(self) -> None:
        """InputError names a value that makes no sense, whatever the data are."""
        for key, lowest in (("batch_size", 1), ("num_workers", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise InputError(f"data.{key}={value}: give a whole number, {lowest} or more")
        choices = {
            "cache": ("none", "ram"),
            "train_on": TRAIN_ON,
            "worker_context": (None, "fork", "spawn", "forkserver"),
        }
        for key, known in choices.items():
            if getattr(self, key) not in known:
                words = ", ".join("null" if word is None else word for word in known)
                raise InputError(f"data.{key}={getattr(self, key)}: choose {words}")
        if (self.train_on != "real") != (self.synthetic is not None):
            raise InputError("data.synthetic: name a folder of samples exactly where train_on is not real")
        if not 0 < self.train_fraction <= 1:
            raise InputError(f"data.train_fraction={self.train_fraction}: it must lie in (0, 1]")
