"""The one Lightning data module: prepared cases of any dataset, in 2D and 3D, split by subject."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from medldm.attributes import TABLES
from medldm.batch import Batch
from medldm.data.loading.augment import CenterCrop, RandomCrop, RandomFlip
from medldm.data.loading.boxes import box_size, image_sizes
from medldm.data.loading.checks import check_files, check_keys, check_prepared
from medldm.data.loading.dataset import (
    CaseDataset,
    Item,
    case_items,
    expand,
)
from medldm.data.loading.degradation import EdgeDegradation, make_degradation
from medldm.data.loading.facts import FACTS, typical_volume, unknown_attributes, view_weights
from medldm.data.loading.latents import check_latents
from medldm.data.loading.loader import make_loader
from medldm.data.loading.pairs import OF_SOURCE, PairDataset, pair_items
from medldm.data.loading.record import training_record
from medldm.data.loading.sampler import ResumableSampler
from medldm.data.loading.settings import LoaderSettings
from medldm.data.loading.subjects import read_subjects, share_of
from medldm.data.loading.synthetic import SyntheticImages
from medldm.data.prepared import load_index
from medldm.data.splits import Split
from medldm.errors import InputError
from medldm.schemas import Latents, read_checked

log = logging.getLogger(__name__)


class CaseDataModule(pl.LightningDataModule):
    """Train, validation and test batches of a prepared folder.

    `keys` are the arrays read (image, mask, edges, latent): what is not named is never opened. `settings` are
    those of `LoaderSettings`. Where `keys` has `source`, an item is a pair of images of a subject. In
    validation and test every item, and every pair, is seen once and in order; testing sees whole images.
    `with_cine` adds the CINE frames of the training subjects to the items of train where `keys` is the image
    alone. An item's randomness depends on (seed, epoch, item) alone. InputError where the folder is not
    prepared, or lacks what `keys` asks for.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        keys: Sequence[str] = ("image", "mask", "edges"),
        seed: int = 0,
        with_cine: bool = False,
        **settings: Any,
    ) -> None:
        super().__init__()
        self.root, self.keys, self.seed = Path(root), tuple(keys), seed
        self.settings = LoaderSettings(**settings)
        self.is_paired = bool(OF_SOURCE.keys() & set(self.keys))
        self.synthetic: SyntheticImages | None = None
        self.with_cine = with_cine and self.keys == ("image",)
        self.index: dict = {}
        self.told: set[tuple[str, str]] = set()
        self.subjects: Split = {}
        self.position = {"epoch": 0, "batch": 0}
        self.train_sampler: ResumableSampler | None = None

    # ---- facts ----

    def setup(self, stage: str | None = None) -> None:
        """Read the index and the split and check that both fit what is asked for. Opens no image."""
        if self.index:
            return
        index = load_index(self.root)
        self.settings.check()
        check_keys(self.keys, self.settings)
        check_prepared(self.root, index, self.keys, self.settings)
        if self.settings.latents is not None:
            check_latents(self.latents_dir, self.latent_facts, index)
        check_files(self.root, [*index["cases"], *self.frames(index)])
        self.subjects = read_subjects(self.root, index, self.settings.split)
        self.index = index
        if self.settings.synthetic is not None:
            self.synthetic = SyntheticImages(self.settings.synthetic, index["spatial_dims"])
        items = self.items("train")
        if not items or (self.is_paired and not pair_items(index, items, self.settings.pair_labels)):
            self.index = {}
            what = "pair of images of one subject with two labels" if items else "training item"
            raise InputError(
                f"{self.root}: split '{self.settings.split}' leaves no {what}; choose another data.split"
            )
        if self.frames(index):
            num_frames = sum(item.case >= len(index["cases"]) for item in items)
            log.info("%s: %d of %d training slices are of CINE frames", self.root, num_frames, len(items))

    def frames(self, index: dict) -> list[dict]:
        """The entries of CINE frames that training reads."""
        return index.get("cine", []) if self.with_cine else []

    @property
    def readable(self) -> dict:
        """The index with CINE frames behind the cases, where training reads them."""
        frames = self.frames(self.index)
        return self.index | {"cases": [*self.index["cases"], *frames]} if frames else self.index

    @property
    def facts(self) -> dict:
        """What the model is built from: spatial_dims, image_channels, num_classes (None without masks),
        num_views, num_phases, num_labels, their names, and image_size; `unknown_attributes` names those that
        some training image does not state.
        """
        self.setup()
        facts = {name: self.index.get(name) for name in FACTS} | typical_volume(self.index)
        facts["image_channels"] = self.index.get("image_channels", 1)
        return facts | {"unknown_attributes": self.unstated("train")}

    def unstated(self, subset: str) -> list[str]:
        """The attributes that some image of a subset does not state."""
        return unknown_attributes(self.items(subset))

    @property
    def record(self) -> dict:
        """What a checkpoint keeps of these data: see `medldm.held_out`."""
        return training_record(self)

    @property
    def latent_facts(self) -> dict:
        """The `latents.json` of the cache in use: checkpoint_sha256, downsampling..."""
        return read_checked(
            self.latents_dir / "latents.json",
            Latents,
            f"run `medldm encode checkpoint=CKPT data.root={self.root}` first",
        )

    @property
    def latents_dir(self) -> Path | None:
        return None if self.settings.latents is None else self.root / "latents" / self.settings.latents

    # ---- items ----

    def items(self, subset: str) -> list[Item]:
        """Items of train, val, test or all, cases in index order, filtered by `views`.

        Those of train are of `train_fraction` of its subjects, with real or synthetic images (`train_on`);
        CINE frames (`with_cine`) come last.
        """
        self.setup()
        wanted = None if subset == "all" else set(self.part_of(subset))
        views = (
            None
            if self.settings.views is None
            else {self.index["view_names"].index(view) for view in self.settings.views}
        )
        index = self.readable
        everything = [
            item
            for case, entry in enumerate(index["cases"])
            if (wanted is None or entry["subject"] in wanted) and (subset == "train" or not entry.get("cine"))
            for item in case_items(index, case)
        ]
        items = [item for item in everything if views is None or item.view in views]
        self.tell_unknown(subset, everything)
        if subset != "train" or self.synthetic is None:
            return items
        return self.synthetic.choose(items, index["cases"], self.settings.train_on)

    def tell_unknown(self, subset: str, items: Sequence[Item]) -> None:
        """Say once how many images do not state what others of the dataset do."""
        for kind, table in TABLES.items():
            num_unknown = sum(not item.stated(kind) for item in items)
            if not self.index.get(table) or not num_unknown or (subset, kind) in self.told:
                continue
            self.told.add((subset, kind))
            is_left_out = kind == "view" and self.settings.views is not None
            log.warning(
                "%s: %d of %d images of %s state no %s; they are %s",
                self.root,
                num_unknown,
                len(items),
                subset,
                kind,
                "left out by data.views" if is_left_out else "unknown, of no class",
            )

    def part_of(self, subset: str) -> list[str]:
        """The subjects of a subset; of train the share that `train_fraction` asks for."""
        subjects = self.subjects[subset]
        return subjects if subset != "train" else share_of(subjects, self.settings.train_fraction, self.seed)

    def dataset(
        self, subset: str, *, augment: bool = False, edge_level: float | str | None = None
    ) -> CaseDataset:
        """The items of a subset; `augment` applies the training transforms, `edge_level` degrades edges at
        one level, or leaves the class map's `contours` alone.
        """
        size = self.box_size()
        transforms: list = []
        if size is not None and (augment or subset == "val"):
            cell = self.latent_facts.get("downsampling") if self.settings.latents else None
            transforms.append((RandomCrop if augment else CenterCrop)(size, cell and tuple(cell)))
        if augment and self.settings.flip_axes:
            transforms.append(RandomFlip(self.settings.flip_axes, self.settings.flip_prob))
        settings = {
            "keys": self.keys,
            "seed": self.seed,
            "transforms": transforms,
            "edge_degradation": self.edge_degradation(augment, edge_level),
            "latents_dir": self.latents_dir,
            "synthetic": self.synthetic,
        }
        dataset: CaseDataset
        if self.is_paired:
            groups = pair_items(self.index, self.items(subset), self.settings.pair_labels)
            if not (augment and self.settings.pairs == "random"):
                groups = [[pair] for group in groups for pair in group]
            dataset = PairDataset(self.root, self.index, groups, **settings)
        else:
            dataset = CaseDataset(self.root, self.readable, self.items(subset), **settings)
        if self.settings.cache == "ram":
            dataset.preload(
                share=self.settings.num_workers > 0
                and self.settings.worker_context in ("spawn", "forkserver")
            )
        return dataset

    def box_size(self) -> tuple[int | None, ...] | None:
        """`crop_size` by axis, None for an axis kept whole. InputError where it does not fit every case."""
        self.setup()
        return box_size(self.root, self.readable, self.settings.crop_size)

    @property
    def has_windows(self) -> bool:
        """Whether training sees random boxes of the images instead of whole ones."""
        return self.settings.crop_size is not None

    def image_sizes(self) -> dict[tuple[int, ...], Path]:
        """The grids of the images that training and validation see, each with the file of one of them."""
        box, subjects = self.box_size(), {*self.part_of("train"), *self.subjects["val"]}
        return image_sizes(self.root, self.index, box, subjects)

    def edge_degradation(self, augment: bool, edge_level: float | str | None) -> EdgeDegradation | None:
        settings = self.settings.edge_degrade
        if edge_level is None and not (augment and settings is not None):
            return None
        self.setup()
        return make_degradation(self.root, self.index, self.keys, settings or {}, edge_level)

    # ---- loaders ----

    def loader(
        self,
        dataset: CaseDataset,
        *,
        train: bool = False,
        batch_size: int | None = None,
        equal_shares: bool = True,
    ) -> DataLoader:
        """This rank's batches of a dataset: shuffled and resumable in training, in order and complete
        otherwise.

        `equal_shares`: see `ResumableSampler`.
        """
        trainer = self.trainer
        sampler = ResumableSampler(
            len(dataset),
            batch_size or self.settings.batch_size,
            self.seed,
            shuffle=train,
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=trainer.world_size if trainer is not None else 1,
            equal_shares=equal_shares,
            weights=view_weights(dataset.items) if train and self.settings.balance_views else None,
        )
        return make_loader(dataset, sampler, self.settings, seed=self.seed, expand_here=trainer is None)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Lightning moves the compact batch to the device; here it gets its dtypes."""
        return expand(batch)

    def train_dataloader(self) -> DataLoader:
        loader = self.loader(self.dataset("train", augment=True), train=True)
        self.train_sampler = loader.batch_sampler
        self.train_sampler.set_position(**self.position)
        return loader

    def eval_dataloader(self, subset: str) -> DataLoader | list:
        dataset = self.dataset(subset)
        return self.loader(dataset) if len(dataset) else []

    def val_dataloader(self) -> DataLoader | list:
        return self.eval_dataloader("val")

    def test_dataloader(self) -> DataLoader | list:
        return self.eval_dataloader("test")

    def predict_dataloader(self) -> DataLoader | list:
        return self.eval_dataloader("test")

    # ---- resuming ----

    def set_position(self, epoch: int, batch: int) -> None:
        """Training continues after `batch` batches of `epoch`."""
        self.position = {"epoch": epoch, "batch": batch}
        if self.train_sampler is not None:
            self.train_sampler.set_position(epoch, batch)

    def state_dict(self) -> dict[str, int]:
        """Batches of the current epoch that have been trained on."""
        if self.trainer is None or self.train_sampler is None:
            return dict(self.position)
        epoch = self.trainer.current_epoch
        batch = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        return (
            {"epoch": epoch, "batch": batch}
            if batch < min(len(self.train_sampler), self.trainer.num_training_batches)
            else {"epoch": epoch + 1, "batch": 0}
        )

    def load_state_dict(self, state_dict: Mapping[str, int]) -> None:
        self.set_position(int(state_dict["epoch"]), int(state_dict["batch"]))
