"""Draws points of a swirl in the plane, the 2D example of Kingma et al. 2021, which needs no files."""

from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from medldm.batch import Batch
from medldm.data.loading.dataset import as_is
from medldm.data.loading.sampler import ResumableSampler
from medldm.errors import InputError

NUM_LEVELS = 256


def swirl(u: np.ndarray, noise: np.ndarray | float = 0.0) -> np.ndarray:
    """Points (N, 2) of the swirl in grid units 0 to 255, of positions u (N,) in [0, 1] along the curve and
    standard normal `noise` (N, 2).
    """
    theta = 3 * np.pi * np.sqrt(u)
    radius = 2 * theta + np.pi
    curve = np.stack([radius * np.cos(theta), radius * np.sin(theta)], axis=1)
    return 4 * (curve + 0.25 * noise + 30)


def distance_to_swirl(points: np.ndarray) -> np.ndarray:
    """The distances (N,) of points (N, 2) to the curve without noise, all in grid units."""
    from scipy.spatial import cKDTree

    return cKDTree(swirl(np.linspace(0, 1, 100_001))).query(points)[0]


def points_to_unit(points: np.ndarray) -> Tensor:
    """Points in grid units 0 to 255, rounded to the grid, to [-1, 1]."""
    levels = np.clip(np.rint(points), 0, NUM_LEVELS - 1)
    return torch.from_numpy(levels * (2 / (NUM_LEVELS - 1)) - 1).float()


def to_grid(x: Tensor) -> np.ndarray:
    """Points in [-1, 1] to grid units 0 to 255."""
    return ((x.double().cpu().numpy() + 1) / 2) * (NUM_LEVELS - 1)


class SwirlPoints(torch.utils.data.Dataset):
    def __init__(self, num_points: int, seed: int) -> None:
        generator = np.random.default_rng(seed)
        u, noise = generator.uniform(size=num_points), generator.normal(size=(num_points, 2))
        self.points = points_to_unit(swirl(u, noise))

    def __len__(self) -> int:
        return len(self.points)

    def __getitems__(self, requests: Sequence[tuple[int, int]]) -> Batch:
        return {"image": self.points[[i for _, i in requests]]}


class SwirlDataModule(pl.LightningDataModule):
    """Gives batches {"image": (B, 2)}, images of two channels without axes of space.

    Training and validation points are different draws.
    """

    def __init__(self, *, num_points: int = 1024, batch_size: int = 512, num_workers: int = 0, seed: int = 0):
        super().__init__()
        if num_points < 1 or batch_size < 1:
            raise InputError(
                f"data.num_points={num_points}, data.batch_size={batch_size}: both must be above 0"
            )
        self.num_points, self.batch_size, self.seed = num_points, batch_size, seed
        self.position = {"epoch": 0, "batch": 0}
        self.train_sampler: ResumableSampler | None = None
        self.facts = dict.fromkeys(("num_classes", "label_names", "num_views", "num_phases")) | {
            "spatial_dims": 0,
            "image_channels": 2,
            "num_labels": 0,
            "image_size": [],
        }

    record = None  # there are no subjects whom a checkpoint could have seen

    def image_sizes(self) -> dict:
        """Points have no sizes that a model could refuse."""
        return {}

    def dataset(self, subset: str, **options) -> SwirlPoints:
        raise InputError("data=swirl: its points are no images; the run's samples/ has the pictures of them")

    def loader(self, offset: int, shuffle: bool) -> DataLoader:
        points = SwirlPoints(self.num_points, self.seed + offset)
        rank = self.trainer.global_rank if self.trainer else 0
        world = self.trainer.world_size if self.trainer else 1
        batch_size = self.batch_size if shuffle else self.num_points
        sampler = ResumableSampler(len(points), batch_size, self.seed, shuffle, rank, world)
        return DataLoader(points, batch_sampler=sampler, collate_fn=as_is)

    def train_dataloader(self) -> DataLoader:
        loader = self.loader(0, shuffle=True)
        self.train_sampler = loader.batch_sampler
        self.train_sampler.set_position(**self.position)
        return loader

    def val_dataloader(self) -> DataLoader:
        return self.loader(1, shuffle=False)

    def state_dict(self) -> dict[str, int]:
        if self.trainer is None or self.train_sampler is None:
            return dict(self.position)
        epoch = self.trainer.current_epoch
        batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        done = batch >= len(self.train_sampler)
        return {"epoch": epoch + 1, "batch": 0} if done else {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.position = {key: int(state_dict[key]) for key in ("epoch", "batch")}
        if self.train_sampler is not None:
            self.train_sampler.set_position(**self.position)
