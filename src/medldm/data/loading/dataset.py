"""Prepared cases as batches: HDF5 rows read, cropped, flipped, degraded and stacked in the worker."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from medldm.attributes import TABLES, UNKNOWN, further_attributes, further_entries, names_of, stated_number
from medldm.batch import Batch
from medldm.data.hdf5 import HDF5Reader, open_hdf5
from medldm.data.loading.augment import CenterCrop, RandomCrop
from medldm.data.loading.degradation import EdgeDegradation
from medldm.data.loading.sampler import ItemRequest
from medldm.data.loading.synthetic import SyntheticImages
from medldm.errors import InputError
from medldm.fingerprints import digest
from medldm.progress import tracked

ARRAY_DTYPES = {
    "image": torch.float32,
    "mask": torch.int64,
    "edges": torch.float32,
    "latent": torch.float32,
    "source": torch.float32,
    "source_latent": torch.float32,
}
HAS_CHANNELS = ("latent", "edges_levels")  # of a slice: rows of several channels
CASE_FACTS = (  # of an index entry: what a sample depends on beside arrays
    "view", "phase", "label", "slice_index", "num_slices", "source_label", "target_label", "spacing",
    "affine", "original_affine", "original_shape", "intensity_range",
)  # fmt: skip
Transform = Callable[[dict, np.random.Generator], dict]


class Item(NamedTuple):
    """A slice or a volume of a case, with its attributes by number."""

    case: int  # place in the index
    row: int  # row of the case's HDF5; 0 for a volume
    view: int
    phase: int
    label: int
    slice_position: float  # 0 first, 1 last of its stack; NaN where it has none
    is_synthetic: bool = False  # a generated image under the case's own map
    labels: tuple[int, ...] = ()  # several at once, where the dataset states them so
    further: tuple[tuple[str, float], ...] = ()  # other declared attributes: name, and number or NaN

    def value(self, kind: str) -> float:
        """The number of an attribute; UNKNOWN, or NaN of a scalar, where it is unknown or not there."""
        return (
            getattr(self, kind)
            if kind in (*TABLES, "slice_position")
            else dict(self.further).get(kind, UNKNOWN)
        )

    def stated(self, kind: str) -> tuple[int, ...]:
        """The numbers of an attribute, several of a label; nothing where it is unknown."""
        if kind == "label" and self.labels:
            return self.labels
        value = self.value(kind)
        return () if value == UNKNOWN or math.isnan(value) else (value,)


def case_items(index: dict, case: int) -> list[Item]:
    """All items of one case: its slices in 2D, itself in 3D."""
    entry = index["cases"][case]
    if index["spatial_dims"] == 3:
        numbers = (entry.get(kind, UNKNOWN) for kind in TABLES)
        further = further_numbers(index, entry, 0)
        return [Item(case, 0, *numbers, math.nan, labels=tuple(entry.get("labels", ())), further=further)]
    slices, count = entry["slices"], entry["num_slices"]
    columns = (slices.get(name, [UNKNOWN] * count) for name in (*TABLES, "slice_index", "num_slices"))
    findings = slices.get("labels", [()] * count)
    return [
        Item(
            *(case, row, view, phase, label),
            slice_position=place / (depth - 1) if depth > 1 else math.nan,
            labels=tuple(findings[row]),
            further=further_numbers(index, entry, row),
        )
        for row, (view, phase, label, place, depth) in enumerate(zip(*columns, strict=True))
    ]


def further_numbers(index: dict, entry: dict, row: int) -> tuple[tuple[str, float], ...]:
    """The declared attributes beyond view, phase and label of one image, from the slice or the whole case."""
    slices, stated = entry.get("slices", {}), entry.get("attributes") or {}
    return tuple(
        (name, stated_number(declared, slices[name][row] if name in slices else stated.get(name)))
        for name, declared in further_entries(index).items()
    )


def array_digests(entry: dict) -> dict[str, str]:
    """Digests of a case's arrays from its entry of the index; {} where an older medldm prepared it."""
    return entry.get("content") or {}


class CaseDataset(Dataset):
    """`dataset.__getitems__([(epoch, item), ...])` is a whole batch in the stored dtypes (half floats and
    bytes, a quarter of the traffic between processes and to the device), which `expand` turns into a `Batch`;
    `dataset[item]` is an expanded batch of one, of epoch 0.

    Nothing is opened here: files open on first use in whichever process reads them.
    """

    def __init__(
        self,
        root: Path,
        index: dict,
        items: Sequence[Item],
        *,
        keys: Sequence[str],
        seed: int = 0,
        transforms: Sequence[Transform] = (),
        edge_degradation: EdgeDegradation | None = None,
        latents_dir: Path | None = None,
        synthetic: SyntheticImages | None = None,
    ) -> None:
        self.root, self.items, self.keys, self.seed = root, list(items), tuple(keys), seed
        self.cases, self.spatial_dims = index["cases"], index["spatial_dims"]
        self.orientation, self.view_names = index.get("orientation"), index.get("view_names") or []
        self.transforms, self.edge_degradation, self.latents_dir = (
            tuple(transforms),
            edge_degradation,
            latents_dir,
        )
        self.synthetic = synthetic
        # Rougher edges, as prepared, for degradation without images.
        has_levels = edge_degradation is not None and "image" not in keys and index.get("num_edge_levels")
        self.stored_keys = (*self.keys, "edges_levels") if has_levels else self.keys
        self.cached: dict[tuple[str, int], Tensor] = {}
        self.further = further_attributes(index)
        self.names: dict[str, list[str]] = {kind: names_of(index, kind) for kind in (*TABLES, *self.further)}
        self.conditions: tuple[str, ...] = ()  # attributes that a model is told of
        self.num_findings = len(self.names["label"]) if index.get("multi_label") else 0
        self.numbering: dict[str, Sequence[int]] = {}  # kind -> the model's number for each of the data's

    @property
    def is_cropped(self) -> bool:
        """Whether items are parts of what is stored, so that a volume is not read as a whole."""
        return any(isinstance(transform, RandomCrop | CenterCrop) for transform in self.transforms)

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, request: int | ItemRequest) -> Batch:
        return expand(self.__getitems__([request]))

    def __getitems__(self, requests: Sequence[int | ItemRequest]) -> Batch:
        pairs = [request if isinstance(request, tuple) else (0, int(request)) for request in requests]
        return self.collate([self.load(epoch, i) for epoch, i in pairs], [self.items[i] for _, i in pairs])

    def as_cases(self) -> "CaseDataset":
        """This dataset, with pairs made cases of their own: whatever is written into one file is one case."""
        return self

    def path(self, key: str, case: int) -> Path:
        if key == "latent":
            return self.latents_dir / f"{self.cases[case]['id']}.h5"
        return self.root / self.cases[case]["file"]

    def made_from(self, case: int) -> dict[str, str] | None:
        """Digests of the arrays that items of a case are read from, by key, and of the facts beside them;
        None where an older medldm prepared the case.
        """
        entry = self.cases[case]
        content = array_digests(entry)
        if not content:
            return None
        arrays = {key: content[key] for key in self.stored_keys if key in content}
        if "source_content" in entry:
            arrays["source"] = entry["source_content"].get("image", "")
        slices = entry.get("slices", {})
        facts = [[entry.get(name), slices.get(name)] for name in CASE_FACTS]
        told = (name for name in self.conditions if name in self.further)
        facts += [[name, (entry.get("attributes") or {}).get(name), slices.get(name)] for name in told]
        return arrays | {"facts": digest(facts)}

    def reader(self, key: str, case: int) -> HDF5Reader:
        """The open file of an array. InputError where it is not the one that the index speaks of: prepared
        anew since, or latents of another image.
        """
        reader, entry = open_hdf5(self.path(key, case)), self.cases[case]
        if key == "latent":
            stated, expected = reader.stamps.get("image_digest"), array_digests(entry).get("image")
            mend = "run `medldm encode` again"
        else:
            stated, expected = reader.stamps.get("fingerprint"), entry.get("fingerprint")
            mend = "run `medldm prepare` to its end, then start again"
        if None not in (stated, expected) and stated != expected:
            raise InputError(f"{reader.path}: was made from other data than index.json says; {mend}")
        if key != "latent" and (self.spatial_dims == 2 or not self.is_cropped):
            reader.check_content(key, array_digests(entry).get(key))
        if key == "latent":
            reader.check_content("latents", reader.stamps.get("latents_digest"))
        return reader

    def read(self, key: str, item: Item) -> np.ndarray:
        """(C, *S) in the stored dtype; C counts the levels of `edges_levels`."""
        if key == "image" and item.is_synthetic:
            return self.synthetic.read(self.cases[item.case], item.row)
        if (key, item.case) in self.cached:
            rows = self.cached[key, item.case].numpy()
            if self.spatial_dims == 3 and key != "latent":
                return rows
            return rows[item.row] if key in HAS_CHANNELS else rows[item.row][None]
        reader = self.reader(key, item.case)
        if key == "latent":
            return reader.read_row("latents", item.row)
        if self.spatial_dims == 3:
            return reader.mapped(key)
        return reader.read_row(key, item.row) if key in HAS_CHANNELS else reader.read_row(key, item.row)[None]

    def load(self, epoch: int, i: int) -> dict:
        """The arrays of one item; its randomness depends on (seed, epoch, i) alone."""
        return self.augment({key: self.read(key, self.items[i]) for key in self.stored_keys}, epoch, i)

    def augment(self, arrays: dict, epoch: int, i: int) -> dict:
        if self.transforms or self.edge_degradation is not None:
            generator = np.random.default_rng((self.seed, epoch, i))
            for transform in self.transforms:
                arrays = transform(arrays, generator)
            if self.edge_degradation is not None:
                arrays = self.edge_degradation(arrays, epoch, generator, self.view_name(i))
        return arrays

    def view_name(self, i: int) -> str | None:
        view = self.items[i].view
        return self.view_names[view] if 0 <= view < len(self.view_names) else None

    def collate(self, arrays: Sequence[dict], items: Sequence[Item]) -> Batch:
        """The batch of these items, whose arrays stay in their stored dtypes."""
        batch: Batch = {key: self.stack(key, [a[key] for a in arrays], items) for key in self.keys}
        for kind in TABLES:
            batch[kind] = torch.tensor([self.number(kind, item) for item in items], dtype=torch.int64)
        for kind, attribute in self.further.items():
            numbers = [self.number(kind, item) for item in items]
            batch[kind] = torch.tensor(numbers, dtype=torch.float32 if attribute.is_scalar else torch.int64)
        if self.num_findings:
            batch["labels"] = self.multi_hot(items)
        batch["slice_position"] = torch.tensor([item.slice_position for item in items], dtype=torch.float32)
        batch["case_index"] = torch.tensor([item.case for item in items], dtype=torch.int64)
        batch["row"] = torch.tensor([item.row for item in items], dtype=torch.int64)
        batch["case_id"] = [self.item_id(item) for item in items]
        if self.edge_degradation is not None:
            batch["edge_level"] = torch.tensor([a["edge_level"] for a in arrays], dtype=torch.float32)
        if self.spatial_dims == 3:
            cases = [self.cases[item.case] for item in items]
            batch["spacing"] = torch.tensor([case["spacing"] for case in cases], dtype=torch.float32)
            batch["affine"] = torch.tensor([case["affine"] for case in cases], dtype=torch.float64)
        return batch

    def every_item(self) -> list[Item]:
        """All that batches may hold, the sources of pairs included."""
        return self.items

    def number(self, kind: str, item: Item) -> float:
        """An attribute of an item as the model numbers it."""
        own = item.value(kind)
        return own if own == UNKNOWN else self.renumbered(kind, own)

    def renumbered(self, kind: str, own: float) -> float:
        return self.numbering[kind][int(own)] if kind in self.numbering else own

    def multi_hot(self, items: Sequence[Item]) -> Tensor:
        """(B, K): 1 at each of the labels that an image has; zeros where none is known."""
        hot = torch.zeros(len(items), self.num_findings)
        for row, item in zip(hot, items, strict=True):
            row[[self.renumbered("label", own) for own in item.stated("label")]] = 1
        return hot

    def item_id(self, item: Item) -> str:
        """`<case>_<row>` for a slice, `<case>` for a volume: as in `records.read_images`."""
        name = self.cases[item.case]["id"]
        return name if self.spatial_dims == 3 else f"{name}_{item.row:03d}"

    def stack(self, key: str, arrays: Sequence[np.ndarray], items: Sequence[Item]) -> Tensor:
        """(B, C, *S) in the stored dtype, written straight into shared memory inside a worker."""
        shape = arrays[0].shape
        for array, item in zip(arrays, items, strict=True):
            if array.shape != shape:
                raise InputError(
                    f"{self.path(key, item.case)}: {key} has shape {array.shape[1:]}, another of its "
                    f"batch {shape[1:]}; "
                    "set data.crop_size, or data.batch_size=1, or prepare with one data.image_size"
                )
        widest = np.result_type(*(array.dtype for array in arrays))  # of 8-bit and 16-bit maps
        out = empty_batch((len(arrays), *shape), torch.from_numpy(np.empty(0, widest)).dtype)
        target = out.numpy()
        for i, array in enumerate(arrays):
            target[i] = array
        return out

    def preload(self, share: bool) -> None:
        """Hold every array in memory in its stored dtype; `share` puts it where spawned workers find it."""
        for key, case in tracked(self.stored(), "reading into memory", transient=True):
            reader = self.reader(key, case)
            rows = torch.from_numpy(np.ascontiguousarray(reader.read("latents" if key == "latent" else key)))
            self.cached[key, case] = rows.share_memory_() if share else rows

    def stored(self) -> list[tuple[str, int]]:
        """(key, case) of everything that an epoch may read."""
        return [
            (key, case) for case in sorted({item.case for item in self.items}) for key in self.stored_keys
        ]


def expand(batch: Batch) -> Batch:
    """Arrays in the dtypes that `Batch` promises, on whatever device they are. Idempotent."""
    return {key: x.to(ARRAY_DTYPES[key]) if key in ARRAY_DTYPES else x for key, x in batch.items()}


def empty_batch(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    if get_worker_info() is None:
        return torch.empty(shape, dtype=dtype)
    # As torch's own default_collate does: otherwise the queue copies the batch once more.
    count = int(np.prod(shape))
    storage = torch.UntypedStorage._new_shared(count * dtype.itemsize)
    return torch.empty(0, dtype=dtype).set_(storage, 0, shape)


def as_is(batch: Any) -> Any:
    """The collate function: `CaseDataset.__getitems__` has stacked already."""
    return batch


def single_threaded_worker(worker: int) -> None:
    cv2.setNumThreads(0)
