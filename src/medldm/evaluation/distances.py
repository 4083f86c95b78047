"""Computes distances between sets of images in the features of every network, with n and those of real
images.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medldm.evaluation.measure import FEATURE_ROWS, Measured
from medldm.evaluation.tools import entry_of
from medldm.metrics.frechet import frechet_from_features, kernel_distance
from medldm.metrics.manifold import DENSITY_NEIGHBOURS, manifold_scores
from medldm.metrics.permutation import kernel_test
from medldm.metrics.radiomic import complete_rows, radiomic_distance

SHARES = (4, 2)  # the Frechet distance is also taken of a quarter and of half of the images
DISTANCES = {"frd": radiomic_distance}  # of features; any other is the Frechet distance as it is
TESTED_IMAGES = 1000  # of a side at most, in whole subjects: the test holds all pairs of images


class FeatureSets(NamedTuple):
    """Features of generated and of real images, (N, D) each or, for slices, (N, n, D), and the subjects of
    both.
    """

    generated: Tensor
    real: Tensor
    subjects: Sequence[str]
    is_paired: bool = True  # whether the i-th of both belong to one case


def compare_sets(sets: FeatureSets, network: str, kernel: Mapping[str, int], seed: int) -> dict:
    """Frechet and kernel distance, precision, recall, density and coverage, each with both n.

    The Frechet distance, which is biased by n, comes with its values `by_n` for fewer images; the kernel
    distance of paired sets with the `p_value` of a permutation test over subjects.
    """
    entry, num_volumes = entry_of(network), len(sets.generated)
    if entry.frechet_name in DISTANCES:
        sets = FeatureSets(*map(complete_rows, sets[:2]), sets.subjects, False)
    generated, real = sets.generated.flatten(0, -2), sets.real.flatten(0, -2)
    sizes = {"n": len(generated), "n_reference": len(real)}
    if len(generated) > num_volumes:
        sizes["n_volumes"] = num_volumes
    if min(sizes.values()) < 2:
        return {}
    frechet = DISTANCES.get(entry.frechet_name, frechet_from_features)
    by_n = frechet_by_n(generated, real, seed, frechet)
    scores = {entry.frechet_name: {"value": frechet(generated, real), "by_n": by_n, **sizes}}
    if entry.kernel_name:
        distance = kernel_distance(generated, real, seed=seed, **kernel)
        scores[entry.kernel_name] = {
            "value": distance.mean,
            "std_over_subsets": distance.std,
            "subset_size": distance.subset_size,
            "num_subsets": distance.num_subsets,
            **(test_of_sets(sets, seed) if sets.is_paired else {}),
            **sizes,
        }
    if entry.manifold_names and min(len(generated), len(real)) > DENSITY_NEIGHBOURS:
        values = manifold_scores(generated, real)
        names = zip(entry.manifold_names, values, strict=True)
        scores |= {name: {"value": value, **sizes} for name, value in names}
    return scores


def frechet_by_n(
    generated: Tensor, real: Tensor, seed: int, distance: Callable[[Tensor, Tensor], float]
) -> dict[str, float]:
    """The Frechet distance of random subsets of both sets, by their number: it falls as n grows."""
    num, table = min(len(generated), len(real)), {}
    order = torch.Generator().manual_seed(seed)
    for size in (num // share for share in SHARES):
        if size >= 2:
            parts = (x[torch.randperm(len(x), generator=order)[:size]] for x in (generated, real))
            table[str(size)] = distance(*parts)
    return table


def test_of_sets(sets: FeatureSets, seed: int) -> dict[str, float | int]:
    """The permutation test of the kernel distance: whether the sets differ by more than an exchange of
    subjects between them explains.
    """
    names = np.random.default_rng(seed).permutation(np.unique(sets.subjects))
    each = sets.generated.shape[1] if sets.generated.ndim == 3 else 1
    chosen, count = set(), 0
    for name in names:
        count += each * int(np.sum(np.asarray(sets.subjects) == name))
        if count > TESTED_IMAGES and len(chosen) > 1:
            break
        chosen.add(name)
    keep = torch.from_numpy(np.isin(sets.subjects, list(chosen)))
    subjects = np.repeat(np.asarray(sets.subjects)[keep.numpy()], each)
    sides = (x[keep].flatten(0, -2) for x in (sets.generated, sets.real))
    return {"p_value": kernel_test(*sides, subjects, seed=seed), "num_tested_subjects": len(chosen)}


def split_real(subjects: Sequence[str], seed: int) -> np.ndarray:
    """A boolean mask that puts a random half of the subjects on one side."""
    names = np.unique(subjects)
    half = np.random.default_rng(seed).permutation(names)[: len(names) // 2]
    return np.isin(subjects, half)


def distances(
    measured: Measured, subjects: Sequence[str], keep: np.ndarray, kernel: Mapping[str, int], seed: int
) -> dict[str, dict]:
    """Distribution metrics of the images in `keep`, by row.

    `real_halves` is one half of the real subjects against the other: what real images score. At the same n,
    `generated_halves` is the generated images of the first half against the real ones of the other.
    """
    table: dict[str, dict] = {}
    names = np.asarray(subjects)
    side = split_real(names[keep].tolist(), seed)
    first, second = np.flatnonzero(keep)[side], np.flatnonzero(keep)[~side]
    for network, rows in measured.features.items():
        real = rows["real"]
        sets: dict[str, FeatureSets] = {}
        for row in (row for row in FEATURE_ROWS if row in rows):
            on = measured.present[row]  # a row on some of the images meets the real ones of these alone
            made, partners = np.flatnonzero(keep[on]), np.flatnonzero(keep & on)
            sets[row] = FeatureSets(rows[row][made], real[partners], names[partners].tolist())
        if measured.present["generated"].all():
            sets["generated_halves"] = FeatureSets(rows["generated"][first], real[second], (), False)
        sets["real_halves"] = FeatureSets(real[first], real[second], (), False)
        for row, pair in sets.items():
            table.setdefault(row, {}).update(compare_sets(pair, network, kernel, seed))
    return {row: scores for row, scores in table.items() if scores}
