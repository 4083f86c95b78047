"""Precision, recall, density and coverage, which tell whether two sets of images cover the same manifold.

Precision and recall: Kynkaanniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative
Models". Density and coverage: Naeem et al. 2020, "Reliable Fidelity and Diversity Metrics for Generative
Models". A set's manifold is the union of balls around its points, each as wide as the distance to the
point's k-th nearest neighbour in the set. All functions take (N, D) features.
"""

from typing import NamedTuple

import torch
from torch import Tensor

PRECISION_NEIGHBOURS = 3  # k of Kynkaanniemi et al.
DENSITY_NEIGHBOURS = 5  # k of Naeem et al.
BLOCK_ROWS = 1024  # of the matrix of distances at once


class ManifoldScores(NamedTuple):
    """Shares in [0, 1], but for `density`, which may exceed 1.

    precision: of the generated images, those within a ball of a real one. recall: of the real images, those
    within a ball of a generated one. density: in how many balls of real images a generated one lies, over k.
    coverage: of the real images, those whose ball holds a generated one.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def radii(features: Tensor, k: int) -> Tensor:
    """Distance of each of N features to its k-th nearest other one: (N,)."""
    # The nearest is the feature itself.
    blocks = [
        torch.cdist(rows, features).kthvalue(k + 1, dim=1).values for rows in features.split(BLOCK_ROWS)
    ]
    return torch.cat(blocks)


def share_within(points: Tensor, centres: Tensor, radius: Tensor) -> float:
    """Share of the points that lie within the ball of at least one centre."""
    inside = [
        (torch.cdist(rows, centres) <= radius).any(1).double().sum() for rows in points.split(BLOCK_ROWS)
    ]
    return float(sum(inside) / len(points))


def density_and_coverage(generated: Tensor, real: Tensor, k: int) -> tuple[float, float]:
    radius = radii(real, k)
    count, covered = real.new_zeros(()), torch.zeros_like(radius, dtype=torch.bool)
    for rows in generated.split(BLOCK_ROWS):
        inside = torch.cdist(rows, real) <= radius
        count += inside.sum()
        covered |= inside.any(0)
    return float(count / (k * len(generated))), float(covered.double().mean())


def expected_coverage(num_real: int, num_generated: int, k: int = DENSITY_NEIGHBOURS) -> float:
    """Mean coverage where both sets are of one distribution, whatever it is (Naeem et al. 2020).

    It is 1 less the chance that the k nearest of a real image's N - 1 + M neighbours are real themselves.
    """
    chance = 1.0
    for i in range(k):
        chance *= (num_real - 1 - i) / (num_real + num_generated - 1 - i)
    return 1 - chance


def manifold_scores(generated: Tensor, real: Tensor) -> ManifoldScores:
    """All four scores; ValueError where a set has no more images than neighbours are asked for."""
    if min(len(generated), len(real)) <= DENSITY_NEIGHBOURS:
        raise ValueError(
            f"precision and recall need more than {DENSITY_NEIGHBOURS} images a side, "
            f"not {len(generated)} and {len(real)}"
        )
    made, true = generated.double(), real.double()
    precision = share_within(made, true, radii(true, PRECISION_NEIGHBOURS))
    recall = share_within(true, made, radii(made, PRECISION_NEIGHBOURS))
    return ManifoldScores(precision, recall, *density_and_coverage(made, true, DENSITY_NEIGHBOURS))
