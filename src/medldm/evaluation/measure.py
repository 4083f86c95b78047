"""Every number of every image: paired metrics, edges found again, LPIPS, and features of whole sets."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medldm.data.preparation.edges import EdgeRecipe
from medldm.errors import InputError
from medldm.evaluation.pairs import Pair
from medldm.evaluation.regions import check_regions, region_masks
from medldm.evaluation.slices import SliceFeatures, slicewise
from medldm.evaluation.stored import Image, load
from medldm.metrics.adherence import edge_f1
from medldm.metrics.frechet import frechet_from_features, kernel_distance
from medldm.metrics.image import REGION_METRICS, SLICE_METRICS, ImageFunction, is_higher_better, to_unit
from medldm.metrics.memorization import nearest_distance, thumbnails
from medldm.metrics.overlap import dice
from medldm.metrics.summary import combine_samples
from medldm.networks.features import (
    FEATURE_NETS,
    FEATURE_SETS,
    LPIPS,
    FeatureNet,
    build_features,
    check_fid_features,
    feature_sets,
)

log = logging.getLogger(__name__)
Images = Sequence[Image | None]
CHUNK_ELEMENTS = 2**21  # 32 slices of 256 x 256, one volume of 128^3
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


class Segmenter(NamedTuple):
    """A trained segmenter: `segment` (B, C, *S) in [-1, 1] -> (B, 1, *S) class map."""

    segment: Callable[[Tensor], Tensor]
    class_names: Sequence[str]  # of the foreground


@dataclass
class Tools:
    """What is measured and with which networks; `missing` says in one line why a metric is not there.

    `axial_axis` is None for 2D images.
    """

    functions: Mapping[str, ImageFunction]
    recipe: EdgeRecipe
    view_names: Sequence[str] = ()
    tolerances: Sequence[int] = ()
    edges_given: bool = True  # whether images were made from edges that are known
    networks: dict[str, nn.Module] = field(default_factory=dict)
    fid_features: Sequence[int] = (2048,)  # the sets of features that a pass of Inception gives
    lpips: nn.Module | None = None
    segmenter: Segmenter | None = None
    axial_axis: int | None = None
    regions: Sequence[str] = ()
    train_thumbnails: Mapping[tuple[int, ...], Tensor] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def lpips_name(self) -> str:
        return "lpips" if self.axial_axis is None else "lpips" + BY_SLICE

    def feature_sizes(self, key: str) -> dict[str, int]:
        """The number of features of every set that a pass of a network gives, side by side."""
        names = sets_of(key, self.fid_features)
        sizes = self.fid_features if len(names) > 1 else [self.networks[key].num_features]
        return dict(zip(names, sizes, strict=True))

    def recipe_for(self, pair: Pair) -> EdgeRecipe:
        """The edge recipe of the view that the image shows."""
        view = pair.attributes.get("view")
        named = view is not None and int(view) < len(self.view_names)
        return self.recipe.for_view(self.view_names[int(view)] if named else None)

    def to(self, device: torch.device) -> "Tools":
        self.device = device
        for network in (*self.networks.values(), *([self.lpips] if self.lpips else [])):
            network.to(device)
        return self


def build_tools(
    functions: Mapping[str, ImageFunction],
    *,
    recipe: EdgeRecipe,
    view_names: Sequence[str],
    tolerances: Sequence[int],
    networks: Sequence[str],
    lpips: str | None,
    weights_dir: Path | None,
    image_shape: tuple[int, ...],
    axial_axis: int | None = None,
    num_slices: int = 0,
    segmenter: Segmenter | None = None,
    regions: Sequence[str] = (),
    fid_features: Sequence[int] = (2048,),
) -> Tools:
    """Build the networks that can be built; what cannot is noted. An unknown name is an InputError.

    Volumes have an `axial_axis`: 2D networks and metrics then see axial slices, `num_slices` of each volume
    where features are taken.
    """
    bound = bind_slices(functions, axial_axis)
    tools = Tools(bound, recipe, view_names, tolerances, segmenter=segmenter)
    tools.axial_axis, tools.regions = axial_axis, check_regions(regions, functions)
    tools.fid_features = check_fid_features(fid_features, networks)
    channels = image_shape[0]
    for name in networks:
        if name not in FEATURE_NETS:
            raise InputError(f"metrics.features: no network {name!r}; choose from {', '.join(FEATURE_NETS)}")
        by_slice = axial_axis is not None and 3 not in FEATURE_NETS[name].spatial_dims
        key, dims = (name + BY_SLICE, 2) if by_slice else (name, len(image_shape) - 1)
        options = {"fid_features": tools.fid_features} if name == "inception" else {}
        try:
            network = build_features(
                name, spatial_dims=dims, image_channels=channels, weights_dir=weights_dir, **options
            )
        except InputError as error:
            for entry in map(entry_of, sets_of(key, tools.fid_features)):
                tools.missing |= {entry.frechet_name: str(error), entry.kernel_name: str(error)}
            continue
        tools.networks[key] = SliceFeatures(network, axial_axis, num_slices) if by_slice else network
    if lpips is not None:
        try:
            tools.lpips = LPIPS(lpips, weights_dir=weights_dir)
        except InputError as error:
            tools.missing[tools.lpips_name] = str(error)
    return tools


BY_SLICE = "_slices"  # a 2D network that sees the axial slices of volumes


def sets_of(key: str, fid_features: Sequence[int]) -> list[str]:
    """The sets of features that a pass of a network in use gives, by key, side by side."""
    name = key.removesuffix(BY_SLICE)
    return [found + key.removeprefix(name) for found in feature_sets(name, fid_features)]


def entry_of(key: str) -> FeatureNet:
    """The entry of a set of features; the names of its distances end in `_slices` where it is of slices."""
    entry = FEATURE_SETS[key.removesuffix(BY_SLICE)]
    if not key.endswith(BY_SLICE):
        return entry
    names = {part: getattr(entry, part) + BY_SLICE for part in ("frechet_name", "kernel_name")}
    return entry._replace(description=f"{entry.description}; of axial slices", **names)


def bind_slices(functions: Mapping[str, ImageFunction], axial_axis: int | None) -> dict[str, ImageFunction]:
    """The functions, those of slices bound to the axis of the volumes."""
    sliced = [name for name in functions if name in SLICE_METRICS]
    if sliced and axial_axis is None:
        raise InputError(f"metrics.image: {sliced[0]} takes volumes, these images are 2D")
    return {
        name: slicewise(function, axial_axis) if name in sliced else function
        for name, function in functions.items()
    }


class Chunk(NamedTuple):
    """Consecutive pairs of one shape."""

    start: int
    pairs: list[Pair]


def chunks(pairs: list[Pair]) -> Iterator[Chunk]:
    start = 0
    while start < len(pairs):
        shape = pairs[start].real.shape
        limit = start + max(1, CHUNK_ELEMENTS // int(np.prod(shape)))
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
            scores = REGION_METRICS[name](x_hat, x, region=inside)
            values[f"{name}_{region}"] = scores.double().cpu().numpy()
    return values


def measure_dice(images: Tensor, pairs: Sequence[Pair], tools: Tools) -> dict[str, np.ndarray]:
    """Dice of the map that a segmenter finds in the images against the map they were made from."""
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
    scores = dice(tools.segmenter.segment(images).cpu(), wanted, len(names) + 1).numpy()  # (B, K - 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an image without any class has no mean
        mean = np.nanmean(scores, axis=1)
    return {"dice_mean": mean} | {f"dice_{name}": scores[:, k] for k, name in enumerate(names)}


def measure_nearest(images: Tensor, tools: Tools) -> dict[str, np.ndarray]:
    """Distance of each image to the nearest training image of its shape; nothing where none is known."""
    train = tools.train_thumbnails.get(tuple(images.shape[1:]))
    if train is None:
        return {}
    distance = nearest_distance(thumbnails(images).cpu(), train) / 2  # on [0, 1]
    return {"nearest_train_rmse": distance.double().numpy()}


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
    given = np.stack([wanted[i] for i in index])
    found, given = (torch.from_numpy(maps).float() for maps in (found, given))
    table = {}
    for tolerance in tools.tolerances:
        values = np.full(len(pairs), np.nan)
        values[index] = edge_f1(found, given, tolerance=tolerance).numpy()
        table[f"edge_f1_{'' if tools.edges_given else 'real_'}{tolerance}px"] = values
    return table


class Measured(NamedTuple):
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

    def store_features(self, row: str, images: Tensor) -> None:
        for name, network in self.tools.networks.items():
            self.features[name].setdefault(row, []).append(network(images).double().cpu())

    @torch.no_grad()
    def add(self, chunk: Chunk) -> None:
        """Measure one chunk in every row."""
        everything = np.arange(chunk.start, chunk.start + len(chunk.pairs))
        real = self.tensor([pair.real for pair in chunk.pairs])
        self.note_constant("real", real, chunk.pairs)
        self.store_features("real", real)
        self.store("real", everything, measure_edges(real, chunk.pairs, self.tools))
        self.store("real", everything, measure_dice(real, chunk.pairs, self.tools))
        self.store("real", everything, measure_nearest(real, self.tools))
        for row, images in self.rows.items():
            index = np.array([i for i in everything if images[i] is not None], dtype=int)
            if not len(index):
                continue
            batch = self.tensor([images[i] for i in index])
            pairs = [self.pairs[i] for i in index]
            self.store(row, index, measure_images(batch, real[index - chunk.start], pairs, self.tools))
            if row == "generated":
                self.note_constant(row, batch, pairs)
                self.store(row, index, measure_nearest(batch, self.tools))
            if row in FEATURE_ROWS:
                self.store_features(row, batch)
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
            mean, best = combine_samples(values, is_higher_better(name))
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


def compare_sets(generated: Tensor, real: Tensor, network: str, kernel: Mapping[str, int], seed: int) -> dict:
    """Frechet and kernel distance of two feature sets (N, D), or (N, n, D) of slices, each with both n."""
    entry, num_volumes = entry_of(network), len(generated)
    generated, real = generated.flatten(0, -2), real.flatten(0, -2)
    sizes = {"n": len(generated), "n_reference": len(real)}
    if len(generated) > num_volumes:
        sizes["n_volumes"] = num_volumes
    if min(sizes.values()) < 2:
        return {}
    distance = kernel_distance(generated, real, seed=seed, **kernel)
    return {
        entry.frechet_name: {"value": frechet_from_features(generated, real), **sizes},
        entry.kernel_name: {
            "value": distance.mean,
            "std_over_subsets": distance.std,
            "subset_size": distance.subset_size,
            "num_subsets": distance.num_subsets,
            **sizes,
        },
    }


def split_real(subjects: Sequence[str], seed: int) -> np.ndarray:
    """A boolean mask that puts a random half of the subjects on one side."""
    names = np.unique(subjects)
    half = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
    return np.isin(subjects, half)


def distances(
    measured: Measured, subjects: Sequence[str], keep: np.ndarray, kernel: Mapping[str, int], seed: int
) -> dict[str, dict]:
    """Distribution metrics of the images in `keep`, by row.

    `real_halves` is one half of the real subjects against the other: what real images score, at half the n.
    """
    table: dict[str, dict] = {}
    where = torch.from_numpy(np.flatnonzero(keep))
    side = torch.from_numpy(split_real(np.asarray(subjects)[keep].tolist(), seed))
    for network, rows in measured.features.items():
        real = rows["real"][where]
        for row in FEATURE_ROWS:
            if row in rows:
                on = measured.present[row]  # a row on some of the images meets the real ones of these alone
                made, partners = (torch.from_numpy(np.flatnonzero(part)) for part in (keep[on], keep & on))
                scores = compare_sets(rows[row][made], rows["real"][partners], network, kernel, seed)
                table.setdefault(row, {}).update(scores)
        halves = compare_sets(real[side], real[~side], network, kernel, seed)
        table.setdefault("real_halves", {}).update(halves)
    return {row: scores for row, scores in table.items() if scores}
