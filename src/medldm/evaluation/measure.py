"""Every number of every image: paired metrics, edges found again, LPIPS, and features of whole sets."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from medldm.data.edges import EdgeRecipe
from medldm.errors import InputError
from medldm.evaluation.pairs import Pair
from medldm.metrics.adherence import edge_f1
from medldm.metrics.frechet import frechet_from_features, kernel_distance
from medldm.metrics.image import ImageFunction, is_higher_better, to_unit
from medldm.metrics.summary import combine_samples
from medldm.networks.features import FEATURE_NETS, LPIPS, build_features

log = logging.getLogger(__name__)
Images = Sequence[np.ndarray | None]
CHUNK_ELEMENTS = 2**21  # 32 slices of 256 x 256, one volume of 128^3
ROW_ORDER = (
    "generated",
    "generated_mean_of_k",
    "generated_best_of_k",
    "reconstruction",
    "mean_image",
    "random_real",
    "shuffled",
    "real",
)
FEATURE_ROWS = ("generated", "reconstruction", "mean_image")


@dataclass
class Tools:
    """What is measured and with which networks; `missing` says in one line why a metric is not there."""

    functions: Mapping[str, ImageFunction]
    recipe: EdgeRecipe
    view_names: Sequence[str] = ()
    tolerances: Sequence[int] = ()
    networks: dict[str, nn.Module] = field(default_factory=dict)
    lpips: nn.Module | None = None
    missing: dict[str, str] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

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
) -> Tools:
    """Build the networks that can be built; what cannot is noted. An unknown name is an InputError."""
    tools = Tools(functions, recipe, view_names, tolerances)
    dims, channels = len(image_shape) - 1, image_shape[0]
    for name in networks:
        if name not in FEATURE_NETS:
            raise InputError(f"metrics.features: no network {name!r}; choose from {', '.join(FEATURE_NETS)}")
        try:
            tools.networks[name] = build_features(
                name, spatial_dims=dims, image_channels=channels, weights_dir=weights_dir
            )
        except InputError as error:
            tools.missing |= {
                FEATURE_NETS[name].frechet_name: str(error),
                FEATURE_NETS[name].kernel_name: str(error),
            }
    if lpips is not None and dims == 2:
        try:
            tools.lpips = LPIPS(lpips, weights_dir=weights_dir)
        except InputError as error:
            tools.missing["lpips"] = str(error)
    return tools


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
        values["lpips"] = tools.lpips(images, real)
    arrays = {name: value.double().cpu().numpy() for name, value in values.items()}
    return arrays | measure_edges(images, pairs, tools)


def measure_edges(images: Tensor, pairs: Sequence[Pair], tools: Tools) -> dict[str, np.ndarray]:
    """Edges found again in 2D images against those they were made from; nothing where none are stored."""
    if images.ndim != 4 or any(pair.edges is None for pair in pairs):
        return {}
    pictures = zip(images[:, 0].cpu().numpy(), pairs, strict=True)
    found = np.stack([tools.recipe_for(pair)(picture) for picture, pair in pictures])[:, None]
    wanted = np.stack([pair.edges for pair in pairs])
    found, edges = (torch.from_numpy(maps).float() for maps in (found, wanted))
    return {
        f"edge_f1_{tolerance}px": edge_f1(found, edges, tolerance=tolerance).numpy()
        for tolerance in tools.tolerances
    }


class Measured(NamedTuple):
    values: dict[str, dict[str, np.ndarray]]  # row -> metric -> (N,), NaN where there is none
    features: dict[str, dict[str, Tensor]]  # network -> row or "real" -> (N, D)


class Measuring:
    """Collects the numbers of all rows chunk by chunk."""

    def __init__(self, pairs: list[Pair], rows: Mapping[str, Images], tools: Tools) -> None:
        self.pairs, self.rows, self.tools = pairs, rows, tools
        self.values: dict[str, dict[str, np.ndarray]] = {}
        self.features: dict[str, dict[str, list[Tensor]]] = {name: {} for name in tools.networks}

    def tensor(self, arrays: Sequence[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.stack(arrays)).float().to(self.tools.device)

    def store(self, row: str, index: np.ndarray, values: Mapping[str, np.ndarray]) -> None:
        for name, value in values.items():
            table = self.values.setdefault(row, {})
            table.setdefault(name, np.full(len(self.pairs), np.nan))[index] = value

    def store_features(self, row: str, images: Tensor) -> None:
        for name, network in self.tools.networks.items():
            self.features[name].setdefault(row, []).append(network(images).double().cpu())

    @torch.no_grad()
    def add(self, chunk: Chunk) -> None:
        """Measure one chunk in every row."""
        everything = np.arange(chunk.start, chunk.start + len(chunk.pairs))
        real = self.tensor([pair.real for pair in chunk.pairs])
        self.store_features("real", real)
        self.store("real", everything, measure_edges(real, chunk.pairs, self.tools))
        for row, images in self.rows.items():
            index = np.array([i for i in everything if images[i] is not None], dtype=int)
            if not len(index):
                continue
            batch = self.tensor([images[i] for i in index])
            pairs = [self.pairs[i] for i in index]
            self.store(row, index, measure_images(batch, real[index - chunk.start], pairs, self.tools))
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
        values = {row: self.values[row] for row in ROW_ORDER if row in self.values}
        features = {
            name: {row: torch.cat(parts) for row, parts in rows.items()}
            for name, rows in self.features.items()
        }
        return Measured(values, features)


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
    """Frechet and kernel distance of two feature sets, each with both n."""
    entry, sizes = FEATURE_NETS[network], {"n": len(generated), "n_reference": len(real)}
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
            if row in rows and len(rows[row]) == len(rows["real"]):
                scores = compare_sets(rows[row][where], real, network, kernel, seed)
                table.setdefault(row, {}).update(scores)
        halves = compare_sets(real[side], real[~side], network, kernel, seed)
        table.setdefault("real_halves", {}).update(halves)
    return {row: scores for row, scores in table.items() if scores}
