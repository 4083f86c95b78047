"""The one Lightning data module: prepared cases of any dataset, in 2D and 3D, split by subject."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from medldm.attributes import TABLES
from medldm.batch import Batch
from medldm.data.datasets import published_splits
from medldm.data.loading.augment import CenterCrop, RandomCrop, RandomFlip
from medldm.data.loading.dataset import (
    ARRAY_DTYPES,
    CaseDataset,
    EdgeDegradation,
    Item,
    as_is,
    case_items,
    expand,
    single_threaded_worker,
)
from medldm.data.loading.facts import FACTS, typical_volume, unknown_attributes, view_weights
from medldm.data.loading.latents import check_latents
from medldm.data.loading.pairs import OF_SOURCE, PairDataset, check_pairs, pair_items
from medldm.data.loading.record import training_record
from medldm.data.loading.sampler import ResumableSampler
from medldm.data.loading.synthetic import TRAIN_ON, SyntheticImages
from medldm.data.preparation.edges import EdgeDegrade, EdgeRecipe
from medldm.data.prepared import load_index
from medldm.data.splits import SUBSETS, Split, make_splits, read_splits
from medldm.devices import choose_settings
from medldm.errors import InputError
from medldm.files import read_json

log = logging.getLogger(__name__)
CONTOURS = "contours"  # an edge level: the class map's outlines alone
FRACTIONS = {"val": 0.1, "test": 0.1}


class CaseDataModule(pl.LightningDataModule):
    """Train, validation and test batches of a prepared folder.

    `keys` are the arrays read (image, mask, edges, latent): what is not named is never opened. `crop_size`
    cuts a random box in training and the central one in validation; testing sees whole images. `views` keeps
    slices of these views, `balance_views` draws the views equally often. Where `keys` has `source`, an item
    is a pair of images of a subject: with `pairs=random` training sees one ordered pair a subject and epoch,
    with `all` each; evaluation always sees each. `with_cine` adds the CINE frames of the training subjects to
    the items of train where `keys` is the image alone. An item's randomness depends on (seed, epoch, item)
    alone. InputError where the folder is not prepared, or lacks what `keys` asks for.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        batch_size: int,
        keys: Sequence[str] = ("image", "mask", "edges"),
        num_workers: int = 0,
        worker_context: str | None = None,
        pin_memory: bool = False,
        cache: str = "none",
        split: str = "default",
        views: Sequence[str] | None = None,
        balance_views: bool = False,
        latents: str | None = None,
        crop_size: int | Sequence[int] | None = None,
        flip_axes: Sequence[int] = (),
        flip_prob: float = 0.5,
        pairs: str | None = None,
        pair_labels: Sequence[Sequence[str]] | None = None,
        edge_degrade: Mapping[str, Any] | None = None,
        train_fraction: float = 1.0,
        train_on: str = "real",
        synthetic: str | Path | None = None,
        seed: int = 0,
        with_cine: bool = False,
    ) -> None:
        super().__init__()
        self.root, self.batch_size, self.keys, self.seed = Path(root), batch_size, tuple(keys), seed
        self.num_workers, self.worker_context, self.pin_memory = num_workers, worker_context, pin_memory
        self.cache, self.split, self.views, self.balance_views = cache, split, views, balance_views
        self.latents, self.crop_size = latents, crop_size
        self.flip_axes, self.flip_prob = tuple(flip_axes), flip_prob
        self.pairs, self.pair_labels = pairs, pair_labels
        self.is_paired = bool(OF_SOURCE.keys() & set(self.keys))
        self.edge_degrade = dict(edge_degrade) if edge_degrade is not None else None
        self.train_fraction, self.train_on, self.synthetic_dir = train_fraction, train_on, synthetic
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
        self.check_request(index)
        self.subjects = self.read_split(index)
        self.index = index
        if self.synthetic_dir is not None:
            self.synthetic = SyntheticImages(self.synthetic_dir, index["spatial_dims"])
        items = self.items("train")
        if not items or (self.is_paired and not pair_items(index, items, self.pair_labels)):
            self.index = {}
            what = "pair of images of one subject with two labels" if items else "training item"
            raise InputError(f"{self.root}: split '{self.split}' leaves no {what}; choose another data.split")
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
        return read_json(
            self.latents_dir / "latents.json",
            f"run `medldm encode checkpoint=CKPT data.root={self.root}` first",
        )

    @property
    def latents_dir(self) -> Path | None:
        return None if self.latents is None else self.root / "latents" / self.latents

    def check_request(self, index: dict) -> None:
        for key in self.keys:
            if key not in ARRAY_DTYPES:
                raise InputError(f"keys: '{key}' is none of {', '.join(ARRAY_DTYPES)}")
        for key, lowest in (("batch_size", 1), ("num_workers", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
                raise InputError(f"data.{key}={value}: give a whole number, {lowest} or more")
        if self.cache not in ("none", "ram"):
            raise InputError(f"data.cache={self.cache}: choose none or ram")
        if self.train_on not in TRAIN_ON:
            raise InputError(f"data.train_on={self.train_on}: choose {', '.join(TRAIN_ON)}")
        if (self.train_on != "real") != (self.synthetic_dir is not None):
            raise InputError("data.synthetic: name a folder of samples exactly where train_on is not real")
        if not 0 < self.train_fraction <= 1:
            raise InputError(f"data.train_fraction={self.train_fraction}: it must lie in (0, 1]")
        if self.worker_context not in (None, "fork", "spawn", "forkserver"):
            raise InputError(
                f"data.worker_context={self.worker_context}: choose null, fork, spawn or forkserver"
            )
        if not index.get("has_images", True) and {"image", "source", *OF_SOURCE} & set(self.keys):
            raise InputError(
                f"{self.root}: was prepared from class maps alone, to sample from; add the images for this"
            )
        check_pairs(self.pairs, self.pair_labels, self.keys, index.get("label_values") or [])
        if "mask" in self.keys and index.get("num_classes") is None:
            raise InputError(
                f"{self.root}: was prepared without masks; add them, or use a model that needs none"
            )
        bare = [case["id"] for case in index["cases"] if case.get("max_class", 0) is None]
        if "mask" in self.keys and bare:
            raise InputError(
                f"{self.root}: {len(bare)} cases were prepared without a class map ({bare[0]}...), which "
                "this model needs; add the maps, or take these cases away, and prepare again"
            )
        if "edges" in self.keys and not index.get("has_edges", False):
            raise InputError(
                f"{self.root}: was prepared without edges; prepare with data.preprocess.edges.source=image"
            )
        if self.edge_degrade is not None and "edges" not in self.keys:
            raise InputError("data.edge_degrade: this model reads no edges; set data.edge_degrade=null")
        if any("latent" in key for key in self.keys) != (self.latents is not None):
            raise InputError("data.latents: name a latent cache exactly where the model trains on latents")
        if self.latents is not None:
            check_latents(self.latents_dir, self.latent_facts, index)
            if self.flip_axes:
                raise InputError("data.latents: cached latents cannot be flipped; set data.flip_axes=[]")
        self.check_views(index)
        for case in [*index["cases"], *self.frames(index)]:
            path = self.root / case["file"]
            size = path.stat().st_size if path.is_file() else None
            if size is None or size != case.get("file_size", size):
                state = "missing" if size is None else "damaged: its size has changed"
                raise InputError(f"{path}: {state}; run `medldm prepare` again, finished cases are kept")

    def check_views(self, index: dict) -> None:
        names = index.get("view_names") or []
        unknown = [view for view in self.views or () if view not in names]
        if unknown:
            raise InputError(
                f"data.views: the dataset has no view '{unknown[0]}', but {', '.join(names) or 'none'}"
            )
        if self.views is not None and not self.views:
            raise InputError("data.views=[]: name at least one view, or null for all")
        if self.balance_views and len(names) < 2:
            raise InputError("data.balance_views: the dataset has one view only; set it to false")

    def read_split(self, index: dict) -> Split:
        subjects = sorted({case["subject"] for case in index["cases"]})
        path = self.root / "splits.json"
        if not path.is_file() and "preprocess" in index:  # the author's folders have none
            log.warning("%s: not there; subjects are drawn with data.splits' defaults", path)
        splits = (
            read_splits(path)
            if path.is_file()
            else make_splits(
                subjects,
                fractions=FRACTIONS,
                seed=42,
                published=published_splits(index["dataset"], subjects),
            )
        )
        if self.split not in splits:
            raise InputError(f"data.split={self.split}: {path} has {', '.join(splits)}")
        named = {subset: list(splits[self.split].get(subset, ())) for subset in SUBSETS}
        absent = {subject for part in named.values() for subject in part} - set(subjects)
        if absent:
            log.warning("%s: %d subjects of split '%s' are not in the index", path, len(absent), self.split)
        return {subset: [s for s in part if s not in absent] for subset, part in named.items()}

    # ---- items ----

    def items(self, subset: str) -> list[Item]:
        """Items of train, val, test or all, cases in index order, filtered by `views`.

        Those of train are of `train_fraction` of its subjects, with real or synthetic images (`train_on`);
        CINE frames (`with_cine`) come last.
        """
        self.setup()
        wanted = None if subset == "all" else set(self.part_of(subset))
        views = None if self.views is None else {self.index["view_names"].index(view) for view in self.views}
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
        return self.synthetic.choose(items, index["cases"], self.train_on)

    def tell_unknown(self, subset: str, items: Sequence[Item]) -> None:
        """Say once how many images do not state what others of the dataset do."""
        for kind, table in TABLES.items():
            num_unknown = sum(not item.stated(kind) for item in items)
            if not self.index.get(table) or not num_unknown or (subset, kind) in self.told:
                continue
            self.told.add((subset, kind))
            is_left_out = kind == "view" and self.views is not None
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
        """The subjects of a subset; of train the first of a seeded order, so that a larger share holds a
        smaller one.
        """
        subjects = self.subjects[subset]
        if subset != "train" or self.train_fraction == 1:
            return subjects
        order = np.random.default_rng(self.seed).permutation(len(subjects))
        return [subjects[i] for i in order[: max(1, round(self.train_fraction * len(subjects)))]]

    def dataset(
        self, subset: str, *, augment: bool = False, edge_level: float | str | None = None
    ) -> CaseDataset:
        """The items of a subset; `augment` applies the training transforms, `edge_level` degrades edges at
        one level, or leaves the class map's `contours` alone.
        """
        size = self.box_size()
        transforms: list = []
        if size is not None and (augment or subset == "val"):
            cell = self.latent_facts.get("downsampling") if self.latents else None
            transforms.append((RandomCrop if augment else CenterCrop)(size, cell and tuple(cell)))
        if augment and self.flip_axes:
            transforms.append(RandomFlip(self.flip_axes, self.flip_prob))
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
            groups = pair_items(self.index, self.items(subset), self.pair_labels)
            if not (augment and self.pairs == "random"):
                groups = [[pair] for group in groups for pair in group]
            dataset = PairDataset(self.root, self.index, groups, **settings)
        else:
            dataset = CaseDataset(self.root, self.readable, self.items(subset), **settings)
        if self.cache == "ram":
            dataset.preload(share=self.num_workers > 0 and self.worker_context in ("spawn", "forkserver"))
        return dataset

    def box_size(self) -> tuple[int | None, ...] | None:
        """`crop_size` by axis, None for an axis kept whole. InputError where it does not fit every case."""
        self.setup()
        dims = self.index["spatial_dims"]
        if self.crop_size is None:
            return None
        size = (self.crop_size,) * dims if isinstance(self.crop_size, int) else tuple(self.crop_size)
        if len(size) != dims or min((n for n in size if n is not None), default=1) < 1:
            raise InputError(f"data.crop_size={list(size)}: give one number, or {dims} of them, above 0")
        for case in self.readable["cases"]:
            shape = case.get("shape") or self.index["image_size"] or ()
            if any(n is not None and n > m for n, m in zip(size, shape, strict=False)):
                raise InputError(
                    f"data.crop_size={list(size)}: {self.root / case['file']} has {list(shape)} only; take a "
                    "smaller box, or prepare with data.preprocess.min_size or data.image_size to pad it"
                )
        return size

    def image_sizes(self) -> dict[tuple[int, ...], Path]:
        """The grids of the images that training and validation see, each with the file of one of them."""
        dims, box = self.index["spatial_dims"], self.box_size()
        subjects = {*self.part_of("train"), *self.subjects["val"]}
        sizes: dict[tuple[int, ...], Path] = {}
        for case in self.index["cases"]:
            shape = (case.get("shape") or self.index["image_size"] or ())[-dims:]
            if case["subject"] in subjects and len(shape) == dims:
                size = tuple(m if n is None else n for n, m in zip(box or [None] * dims, shape, strict=True))
                sizes.setdefault(size, self.root / case["file"])
        return sizes

    def edge_degradation(self, augment: bool, edge_level: float | str | None) -> EdgeDegradation | None:
        if edge_level is None and not (augment and self.edge_degrade is not None):
            return None
        self.setup()
        if self.index["spatial_dims"] != 2:
            raise InputError("data.edge_degrade: edges exist in 2D only; set it to null")
        check_edge_level(edge_level, self.keys)
        settings = dict(self.edge_degrade or {})
        levels = tuple(settings.pop("level", (0.0, 1.0)))
        ramp_epochs = settings.pop("ramp_epochs", 0)
        stored = self.index.get("preprocess", {}).get("edges") or {}
        try:
            degrade = EdgeDegrade(recipe=EdgeRecipe(**stored), **settings)
        except TypeError as error:
            raise InputError(f"data.edge_degrade: {error}; see EdgeDegrade for its keys") from error
        if edge_level != CONTOURS:
            self.check_redetection(degrade, is_training=edge_level is None)
        if edge_level == CONTOURS:
            return EdgeDegradation(replace(degrade, contours_only_prob=1, full_drop_prob=0), (1.0, 1.0))
        if edge_level is not None:
            return EdgeDegradation(degrade, (edge_level, edge_level))
        return EdgeDegradation(degrade, levels, ramp_epochs)

    def check_redetection(self, degrade: EdgeDegrade, *, is_training: bool) -> None:
        """A detector has nothing to run on where neither images nor rougher edges are read."""
        has_source = "image" in self.keys or self.index.get("num_edge_levels")
        if has_source or not degrade.redetect_prob or degrade.recipe.source == "labels":
            return
        what = f"{self.root}: holds no rougher edges and no image is read, so none are detected again"
        if is_training:
            raise InputError(
                f"data.edge_degrade: {what}; prepare with 'data.preprocess.edges.levels=[{{blur: 1}}]', or "
                "do without by +data.edge_degrade.redetect_prob=0"
            )
        log.warning("edge_level: %s; all other degradations are", what)

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
            batch_size or self.batch_size,
            self.seed,
            shuffle=train,
            rank=trainer.global_rank if trainer is not None else 0,
            world_size=trainer.world_size if trainer is not None else 1,
            equal_shares=equal_shares,
            weights=view_weights(dataset.items) if train and self.balance_views else None,
        )
        workers = {}
        if self.num_workers > 0:
            workers = {
                "persistent_workers": True,
                "multiprocessing_context": self.worker_context,
                "worker_init_fn": single_threaded_worker,
            }
        return CaseLoader(
            dataset,
            expand_here=trainer is None,
            batch_sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=as_is,
            pin_memory=choose_settings(pin_memory=self.pin_memory).pin_memory,
            generator=torch.Generator().manual_seed(self.seed),  # else each pass draws from the global one
            **workers,
        )

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


class CaseLoader(DataLoader):
    """A DataLoader that expands batches on their way out, unless Lightning does it after the transfer."""

    def __init__(self, dataset: CaseDataset, *, expand_here: bool, **settings: Any) -> None:
        super().__init__(dataset, **settings)
        self.expand_here = expand_here

    def __iter__(self) -> Iterator[Batch]:
        batches = super().__iter__()
        return map(expand, batches) if self.expand_here else batches


def check_edge_level(level: float | str | None, keys: Sequence[str]) -> None:
    if level is None:
        return
    if "edges" not in keys:
        raise InputError(f"edge_level={level}: this model reads no edges; set it to null")
    if isinstance(level, str) and level == CONTOURS:
        if "mask" not in keys:
            raise InputError("edge_level=contours: this model reads no class maps; give a number in [0, 1]")
    elif isinstance(level, str) or not 0 <= level <= 1:
        raise InputError(f"edge_level={level}: give a number in [0, 1], or contours")
