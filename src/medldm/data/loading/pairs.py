"""Ordered pairs of images of one subject with different labels: source -> target of a translation."""

from collections import defaultdict
from collections.abc import Sequence
from itertools import permutations
from typing import Any, NamedTuple

import numpy as np

from medldm.attributes import UNKNOWN
from medldm.batch import Batch
from medldm.data.case import visit_of
from medldm.data.loading.dataset import CaseDataset, Item, array_digests
from medldm.data.loading.sampler import ItemRequest
from medldm.data.raw.grids import REGISTER, difference_of
from medldm.errors import InputError
from medldm.files import safe_name

PAIRINGS = (None, "random", "all")
OF_SOURCE = {"source": "image", "source_latent": "latent"}  # key of a batch -> what is read of the source


class ItemPair(NamedTuple):
    """Two items of one subject, of which the source is translated to the target."""

    source: Item
    target: Item


def check_pairs(pairs: str | None, pair_labels: Any, keys: Sequence[str], label_values: list[str]) -> None:
    """InputError where a model wants pairs and `pairs` gives none, or unknown labels."""
    if pairs not in PAIRINGS:
        raise InputError(f"data.pairs={pairs}: choose null, random or all")
    if pairs is None and OF_SOURCE.keys() & set(keys):
        raise InputError("data.pairs=null: this model translates one image into another; set it to random")
    if pair_labels is not None and not OF_SOURCE.keys() & set(keys):
        raise InputError("data.pair_labels: this model translates nothing; set it to null")
    for pair in pair_labels or ():
        if isinstance(pair, str) or len(pair) != 2 or not set(pair) <= set(label_values):
            known = ", ".join(label_values)
            raise InputError(f"data.pair_labels: {pair} is no [source, target] of two among {known}")


def pair_items(
    index: dict, items: Sequence[Item], pair_labels: Sequence[Sequence[str]] | None
) -> list[list[ItemPair]]:
    """The ordered pairs of every subject that has two images or more, in the order of subjects in the index;
    of a subject who came several times (attribute `visit`) those of each visit.

    `pair_labels` keeps those of (source, target) names. A missing modality leaves out its pairs alone. Slices
    meet the slice of their own place. InputError where two images lie on different grids.
    """
    by_visit: dict[tuple, list[Item]] = defaultdict(list)
    for item in items:
        entry = index["cases"][item.case]
        by_visit[entry["subject"], visit_of(entry)].append(item)
    names = index["label_values"]
    wanted = None if pair_labels is None else {tuple(names.index(name) for name in p) for p in pair_labels}
    check_modalities_stated(index, items)
    groups = []
    for members in by_visit.values():
        if wanted is not None:
            members = [item for item in members if any(item.label in labels for labels in wanted)]
        for place in [members] if index["spatial_dims"] == 3 else places(index, members):
            place = sorted(place, key=lambda item: item.label)
            pairs = [ItemPair(source, target) for source, target in permutations(place, 2)]
            pairs = [p for p in pairs if p.source.label != p.target.label]
            groups.append([p for p in pairs if wanted is None or (p.source.label, p.target.label) in wanted])
    groups = [group for group in groups if group]
    if index["spatial_dims"] == 3:
        check_pair_grids(index, groups)
    return groups


def check_pair_grids(index: dict, groups: Sequence[Sequence[ItemPair]]) -> None:
    """InputError where the voxels of a pair lie at different places."""
    cases = {tuple(sorted((p.source.case, p.target.case))) for group in groups for p in group}
    for pair in sorted(cases):
        source, target = (index["cases"][case] for case in pair)
        difference = difference_of(source, target)
        if difference is not None:
            raise InputError(f"{source['id']} and {target['id']} are no pair: {difference}")


def places(index: dict, members: Sequence[Item]) -> list[list[Item]]:
    """The slices of one subject that show one place: equal in view, phase, grid and number in the stack.

    InputError where a label has a grid to itself while others have another. Folders that were prepared before
    grids were recorded are taken by view, phase and number alone.
    """
    groups: dict[tuple, list[Item]] = defaultdict(list)
    grids: dict[tuple, dict[int, dict[int, Item]]] = defaultdict(lambda: defaultdict(dict))
    for item in members:
        slices = index["cases"][item.case]["slices"]
        grid = slices["grid"][item.row] if "grid" in slices else 0
        stack = (item.view, item.phase)
        groups[(*stack, grid, slices["slice_index"][item.row], slices["num_slices"][item.row])].append(item)
        grids[stack][grid].setdefault(item.label, item)
    for by_grid in grids.values():
        alone = next((items for items in by_grid.values() if len(items) == 1), None)
        for items in by_grid.values():
            if alone is not None and items.keys() - alone.keys():
                first, second = next(iter(alone.values())), next(iter(items.values()))
                entry = index["cases"][first.case]
                sources = entry["slices"]["source"]
                raise InputError(
                    f"{entry['id']}: {sources[first.row]} and {sources[second.row]} are no pair, they lie on "
                    f"different grids; {REGISTER}, then prepare again"
                )
    return list(groups.values())


def check_modalities_stated(index: dict, items: Sequence[Item]) -> None:
    """InputError for an image that could be of any modality: a pair needs to know."""
    unknown = next((item for item in items if item.label == UNKNOWN), None)
    if unknown is not None:
        case = index["cases"][unknown.case]
        raise InputError(
            f"{case['file']}: {case['id']} states no label, so it is of no known modality; fill in its label "
            "(data=folder: the column label of manifest.csv) and prepare again, or take it out"
        )


class PairDataset(CaseDataset):
    """`CaseDataset` whose item i is one pair of `groups[i]`, drawn from (seed, epoch, i) alone.

    A batch's `image`, `latent`, `mask` and `label` are the target's; `source`, `source_latent` and
    `source_label` the source's. Both are cropped and flipped alike.
    """

    def __init__(self, root: Any, index: dict, groups: Sequence[Sequence[ItemPair]], **settings: Any) -> None:
        super().__init__(root, index, [group[0].target for group in groups], **settings)
        self.groups = [tuple(group) for group in groups]
        self.label_values = index["label_values"]

    def __getitems__(self, requests: Sequence[int | ItemRequest]) -> Batch:
        drawn = [request if isinstance(request, tuple) else (0, int(request)) for request in requests]
        pairs = [self.pick(epoch, i) for epoch, i in drawn]
        arrays = [self.load_pair(pair, epoch, i) for pair, (epoch, i) in zip(pairs, drawn, strict=True)]
        batch = self.collate(arrays, [pair.target for pair in pairs])
        batch["source_label"] = batch["label"].new_tensor([self.number("label", p.source) for p in pairs])
        batch["case_id"] = [self.pair_id(pair) for pair in pairs]
        return batch

    def pick(self, epoch: int, i: int) -> ItemPair:
        group = self.groups[i]
        # A stream of its own: transforms draw from (seed, epoch, i).
        return group[int(np.random.default_rng((self.seed, epoch, i, 1)).integers(len(group)))]

    def load_pair(self, pair: ItemPair, epoch: int, i: int) -> dict:
        arrays = {
            key: self.read(OF_SOURCE.get(key, key), pair.source if key in OF_SOURCE else pair.target)
            for key in self.keys
        }
        for key in OF_SOURCE.keys() & arrays.keys():
            of_target = arrays.get(OF_SOURCE[key])
            if of_target is not None and of_target.shape != arrays[key].shape:
                raise InputError(
                    f"{self.path('image', pair.source.case)}: shape {arrays[key].shape[1:]}, its pair has "
                    f"{of_target.shape[1:]}; prepare with data.image_size, from co-registered images"
                )
        return self.augment(arrays, epoch, i)

    def pair_id(self, pair: ItemPair) -> str:
        """`<subject>_<source>_to_<target>`; where there are visits, the cases' own name instead of the
        subject's.
        """
        entry, names = self.cases[pair.target.case], self.label_values
        source, target = names[pair.source.label], names[pair.target.label]
        name = entry["subject"] if visit_of(entry) is None else entry["id"].removesuffix(f"_{target}")
        return safe_name(f"{name}_{source}_to_{target}")

    def as_cases(self) -> "PairDataset":
        """Every pair becomes a case of its own, of the pair's name, on the target's grid: what is written of
        it has a file of its own.
        """
        first, names = len(self.cases), self.label_values
        entries = [
            {
                **self.cases[pair.target.case],
                "id": self.pair_id(pair),
                "source_label": names[pair.source.label],
                "target_label": names[pair.target.label],
                "source_content": array_digests(self.cases[pair.source.case]),
            }
            for pair, *_ in self.groups
        ]
        self.cases = [*self.cases, *entries]
        self.items = [item._replace(case=first + i) for i, item in enumerate(self.items)]
        return self

    def every_item(self) -> list[Item]:
        return [item for group in self.groups for pair in group for item in pair]

    def stored(self) -> list[tuple[str, int]]:
        cases = {item.case for group in self.groups for pair in group for item in pair}
        keys = {OF_SOURCE.get(key, key) for key in self.keys}
        return [(key, case) for case in sorted(cases) for key in sorted(keys)]
