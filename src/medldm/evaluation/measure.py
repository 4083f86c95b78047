"""Every number of every image: paired metrics, edges found again, LPIPS, Dice; and features of whole sets."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medldm.errors import InputError
from medldm.evaluation.pairs import Pair
from medldm.evaluation.regions import region_masks
from medldm.evaluation.slices import slicewise
from medldm.evaluation.stored import Image, load
from medldm.evaluation.tools import Tools
from medldm.metrics.adherence import edge_f1
from medldm.metrics.catalogue import IMAGE_METRICS, find_metric
from medldm.metrics.image import to_unit
from medldm.metrics.memorization import (
    mirrored,
    nearest_correlation,
    nearest_distance,
    thumbnail_shape,
    thumbnails,
)
from medldm.metrics.overlap import dice
from medldm.metrics.summary import combine_samples
from medldm.metrics.surface import surface_distances

Images = Sequence[Image | None]
VALUES_AT_ONCE = 2**20  # 16 slices of 256 x 256, one volume
ROW_ORDER = (
    "generated",
    "generated_mean_of_k",
    "generated_best_of_k",
    "reconstruction",
    "spade",
    "regression",
    "identity",
    "mean_image",
    "random_real",
    "shuffled",
    "real",
)
FEATURE_ROWS = ("generated", "reconstruction", "mean_image")


class Chunk(NamedTuple):
    """Consecutive pairs of one shape."""

    start: int
    pairs: list[Pair]


def chunks(pairs: list[Pair]) -> Iterator[Chunk]:
    start = 0
    while start < len(pairs):
        shape = pairs[start].real.shape
        limit = start + max(1, VALUES_AT_ONCE // int(np.prod(shape)))
        stop = start + 1
        while stop < min(limit, len(pairs)) and pairs[stop].real.shape == shape:
            stop += 1
        yield Chunk(start, pairs[start:stop])
        start = stop


def measure_images(
    images: Tensor, real: Tensor, pairs: Sequence[Pair], tools: Tools
) -> dict[str, np.ndarray]:
    """Every per-image metric of (B, C, *S) in [-1, 1] against the real images; each (B,)."""
    x_hat, x = to_unit(images), to_unit(real)
    values = {name: function(x_hat, x) for name, function in tools.functions.items()}
    if tools.lpips is not None:
        lpips = tools.lpips if tools.axial_axis is None else slicewise(tools.lpips, tools.axial_axis)
        values[tools.lpips_name] = lpips(images, real)
    arrays = {name: value.double().cpu().numpy() for name, value in values.items()}
    arrays |= measure_regions(x_hat, x, pairs, tools)
    return arrays | measure_edges(images, pairs, tools) | measure_dice(images, pairs, tools)


def measure_regions(x_hat: Tensor, x: Tensor, pairs: Sequence[Pair], tools: Tools) -> dict[str, np.ndarray]:
    """The same metrics within a part of the image, `<metric>_<region>`; images in [0, 1]."""
    values = {}
    for region in tools.regions:
        inside = region_masks(region, pairs, x)
        for name in tools.functions:
            scores = IMAGE_METRICS[name].function(x_hat, x, region=inside)
            values[f"{name}_{region}"] = scores.double().cpu().numpy()
    return values


def measure_dice(images: Tensor, pairs: Sequence[Pair], tools: Tools) -> dict[str, np.ndarray]:
    """Dice, and distances between surfaces, of the map that a segmenter finds in the images and the map they
    were made from.
    """
    if tools.segmenter is None:
        return {}
    masks = [load(pair.mask) for pair in pairs]
    if any(mask is None for mask in masks):
        raise InputError(
            f"segmenter: '{pairs[0].id}' has no map to compare with; give a reference with masks"
        )
    wanted = torch.from_numpy(np.stack(masks).astype(np.int64))
    names = tools.segmenter.class_names
    if int(wanted.max()) > len(names):
        raise InputError(
            f"segmenter: '{pairs[0].id}' has class {int(wanted.max())}, the segmenter knows {len(names)}"
        )
    found = tools.segmenter.segment(images).cpu()
    scores = {"dice": dice(found, wanted, len(names) + 1).numpy()}  # (B, K - 1)
    surfaces = [
        surface_distances(a[0], b[0], len(names) + 1, voxel_size(pair, a.ndim - 1))
        for a, b, pair in zip(found.numpy(), wanted.numpy(), pairs, strict=True)
    ]
    scores["hd95"] = np.stack([each.hd95 for each in surfaces])
    scores["surface_distance"] = np.stack([each.mean for each in surfaces])
    return {name: values for family in scores for name, values in by_class(family, scores[family], names)}


def voxel_size(pair: Pair, spatial_dims: int) -> np.ndarray | None:
    """In mm along the axes of the image; None where it is not known."""
    spacing = pair.attributes.get("spacing")
    return None if spacing is None or np.size(spacing) != spatial_dims else np.ravel(spacing).astype(float)


def by_class(family: str, scores: np.ndarray, names: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The mean over classes of (B, K - 1) scores, then each class; an image without any class has no mean."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield f"{family}_mean", np.nanmean(scores, axis=1)
    yield from ((f"{family}_{name}", scores[:, k]) for k, name in enumerate(names))


def measure_nearest(
    images: Tensor, tools: Tools, features: Mapping[str, Tensor] | None = None
) -> dict[str, np.ndarray]:
    """How near each image is to the nearest training image of its shape; nothing where none is known.
    `features` are those of the images by network, where they were taken already.
    """
    train = tools.train_thumbnails.get(tuple(images.shape[1:]))
    if train is None:
        return {}
    small = thumbnails(images).cpu()
    distance = nearest_distance(small, train) / 2  # on [0, 1]
    values = {"nearest_train_rmse": distance.double().numpy()}
    shape = thumbnail_shape(images.shape[1:])
    if min(shape[1:]) >= 5:
        correlation = nearest_correlation(images.cpu(), train.view(-1, *shape))
        values["nearest_train_correlation"] = correlation.double().numpy()
    known = {name: kept.get(tuple(images.shape[1:])) for name, kept in tools.train_embeddings.items()}
    if known.get("perceptual") is not None:
        axes = [axis for axis in range(2, images.ndim) if axis - 2 != tools.axial_axis]
        embedded = [tools.embed(x).cpu() for x in mirrored(images, axes)]
        values["nearest_train_perceptual"] = nearest_squared(embedded, known["perceptual"])
    if known.get("inception") is not None:
        given = (features or {}).get(tools.inception_key)
        embedded = tools.embed_by_inception(images, given).cpu()
        values["nearest_train_inception"] = nearest_squared([embedded], known["inception"])
    return values


def nearest_squared(embedded: Sequence[Tensor], train: Tensor) -> np.ndarray:
    """The least squared distance of (B, D), over several of them, to one of (N, D)."""
    nearest = torch.stack([nearest_distance(x, train) for x in embedded]).amin(0)
    return (nearest**2 * train.shape[1]).double().numpy()


def measure_edges(images: Tensor, pairs: Sequence[Pair], tools: Tools) -> dict[str, np.ndarray]:
    """Edges found again in 2D images against those they were made from, or, where no image was made from any,
    against those of the real images, under another name; NaN where none are stored.
    """
    wanted = [pair.edges if tools.edges_given else pair.real_edges for pair in pairs]
    index = [i for i, edges in enumerate(wanted) if edges is not None]
    if images.ndim != 4 or not index:
        return {}
    pictures = images[:, 0].cpu().numpy()
    found = np.stack([tools.recipe_for(pairs[i])(pictures[i]) for i in index])[:, None]
    given = np.stack([load(wanted[i]) for i in index])
    found, given = (torch.from_numpy(maps).float() for maps in (found, given))
    table = {}
    for tolerance in tools.tolerances:
        values = np.full(len(pairs), np.nan)
        values[index] = edge_f1(found, given, tolerance=tolerance).numpy()
        table[f"edge_f1_{'' if tools.edges_given else 'real_'}{tolerance}px"] = values
    return table


class Measured(NamedTuple):
    """All numbers of an evaluation, before means are taken."""

    values: dict[str, dict[str, np.ndarray]]  # row -> metric -> (N,), NaN where there is none
    features: dict[str, dict[str, Tensor]]  # set -> row or "real" -> (M, D), (M, n, D) of slices
    present: dict[str, np.ndarray]  # row -> (N,) bool: the M images that it is on
    constant: dict[str, list[str]]  # generated, real -> names of images that are flat


class Measuring:
    """Collects the numbers of all rows chunk by chunk."""

    def __init__(self, pairs: list[Pair], rows: Mapping[str, Images], tools: Tools) -> None:
        self.pairs, self.rows, self.tools = pairs, rows, tools
        self.values: dict[str, dict[str, np.ndarray]] = {}
        self.present: dict[str, np.ndarray] = {}
        self.constant: dict[str, list[str]] = {"generated": [], "real": []}
        self.features: dict[str, dict[str, list[Tensor]]] = {name: {} for name in tools.networks}

    def tensor(self, arrays: Sequence[Image]) -> Tensor:
        stacked = np.stack([load(array) for array in arrays])
        return torch.from_numpy(stacked).float().to(self.tools.device)

    def store(self, row: str, index: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        self.present.setdefault(row, np.zeros(len(self.pairs), bool))[index] = True
        for name, value in values.items():
            table = self.values.setdefault(row, {})
            table.setdefault(name, np.full(len(self.pairs), np.nan))[index] = value

    def note_constant(self, row: str, images: Tensor, pairs: Sequence[Pair]) -> None:
        flat = images.flatten(1)
        is_flat = (flat.amax(1) == flat.amin(1)).tolist()
        self.constant[row] += [pair.id for pair, yes in zip(pairs, is_flat, strict=True) if yes]

    def store_features(self, row: str, images: Tensor) -> dict[str, Tensor]:
        """The features by network, which are kept as well."""
        found = {name: network(images) for name, network in self.tools.networks.items()}
        for name, features in found.items():
            self.features[name].setdefault(row, []).append(features.double().cpu())
        return found

    @torch.no_grad()
    def add(self, chunk: Chunk) -> None:
        """Measure one chunk in every row."""
        everything = np.arange(chunk.start, chunk.start + len(chunk.pairs))
        real = self.tensor([pair.real for pair in chunk.pairs])
        self.note_constant("real", real, chunk.pairs)
        features = self.store_features("real", real)
        self.store("real", everything, measure_edges(real, chunk.pairs, self.tools))
        self.store("real", everything, measure_dice(real, chunk.pairs, self.tools))
        self.store("real", everything, measure_nearest(real, self.tools, features))
        for row, images in self.rows.items():
            index = np.array([i for i in everything if images[i] is not None], dtype=int)
            if not len(index):
                continue
            batch = self.tensor([images[i] for i in index])
            pairs = [self.pairs[i] for i in index]
            self.store(row, index, measure_images(batch, real[index - chunk.start], pairs, self.tools))
            features = self.store_features(row, batch) if row in FEATURE_ROWS else {}
            if row == "generated":
                self.note_constant(row, batch, pairs)
                self.store(row, index, measure_nearest(batch, self.tools, features))
        self.add_samples(chunk, everything, real)

    def add_samples(self, chunk: Chunk, index: np.ndarray, real: Tensor) -> None:
        """Mean and best over the K samples of a condition, and how far they lie apart."""
        num_samples = len(chunk.pairs[0].generated)
        if num_samples == 1:
            return
        samples = [self.tensor([pair.generated[k] for pair in chunk.pairs]) for k in range(num_samples)]
        measured = [measure_images(sample, real, chunk.pairs, self.tools) for sample in samples]
        for name in measured[0]:
            values = np.stack([values[name] for values in measured])
            mean, best = combine_samples(values, bool(find_metric(name).higher_is_better))
            self.store("generated_mean_of_k", index, {name: mean})
            self.store("generated_best_of_k", index, {name: best})
        self.store("generated_mean_of_k", index, {"diversity_rmse": diversity(samples)})

    def result(self) -> Measured:
        values = {row: self.values[row] for row in ROW_ORDER if self.values.get(row)}
        features: dict[str, dict[str, Tensor]] = {}
        for key, rows in self.features.items():
            sizes = self.tools.feature_sizes(key)
            for row, parts in rows.items():
                for name, part in zip(sizes, torch.cat(parts).split(list(sizes.values()), -1), strict=True):
                    features.setdefault(name, {})[row] = part
        return Measured(values, features, self.present, self.constant)


def diversity(samples: Sequence[Tensor]) -> np.ndarray:
    """Mean pairwise RMSE on [0, 1] between the samples of a condition: (B,)."""
    stack = torch.stack([to_unit(sample).flatten(1) for sample in samples])  # (K, B, prod)
    first, second = torch.triu_indices(len(stack), len(stack), offset=1)
    return ((stack[first] - stack[second]) ** 2).mean(2).sqrt().mean(0).cpu().numpy()


def measure(
    pairs: list[Pair], rows: Mapping[str, Images], tools: Tools, advance: Callable[[int], None]
) -> Measured:
    """Measure every pair in every row; `advance(n)` is told of each n finished images."""
    measuring = Measuring(pairs, rows, tools)
    for chunk in chunks(pairs):
        measuring.add(chunk)
        advance(len(chunk.pairs))
    return measuring.result()
