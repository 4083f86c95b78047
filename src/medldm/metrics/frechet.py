"""Distances between two sets of images in a feature space: Frechet (FID where the net is Inception) and KID.

Heusel et al. 2017 and Binkowski et al. 2018. Both work on (N, D) features, 2D or 3D alike.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from medldm.errors import InputError


class Moments(NamedTuple):
    """Streaming float64 sums of features: `total` (D,), `outer` (D, D), `count` ()."""

    total: Tensor
    outer: Tensor
    count: Tensor

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (D, D)."""
        return (self.outer - self.count * torch.outer(self.mean, self.mean)) / (self.count - 1)


def accumulate(features: Tensor) -> Moments:
    """(N, D) features -> their float64 sums."""
    x = features.double()
    return Moments(x.sum(0), x.T @ x, torch.tensor(len(x), device=x.device))


def factorise(covariance: Tensor) -> Tensor:
    """A (D, R) with A A^T = covariance; directions without variance are dropped, so R <= rank."""
    values, vectors = torch.linalg.eigh(covariance)
    keep = values > values.max() * len(values) * torch.finfo(values.dtype).eps
    return vectors[:, keep] * values[keep].sqrt()


def centred_factor(features: Tensor) -> Tensor:
    """A (D, N) with A A^T = covariance of (N, D) features: no eigenvalues needed where N < D."""
    x = features.double()
    return ((x - x.mean(0)) / (len(x) - 1) ** 0.5).T


def distance_from_factors(mean1: Tensor, factor1: Tensor, mean2: Tensor, factor2: Tensor) -> Tensor:
    """|mu1 - mu2|^2 + tr(C1 + C2 - 2 (C1 C2)^{1/2}); tr (C1 C2)^{1/2} is the nuclear norm of A1^T A2.

    Nothing here takes the square root of a non-symmetric or singular matrix, so n < D is no special case.
    """
    cross = torch.linalg.svdvals(factor1.T @ factor2).sum()
    distance = (mean1 - mean2).square().sum() + factor1.square().sum() + factor2.square().sum() - 2 * cross
    return distance.clamp(min=0)


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> Tensor:
    """Frechet distance of two Gaussians, float64."""
    factor1, factor2 = factorise(covariance1.double()), factorise(covariance2.double())
    return distance_from_factors(mean1.double(), factor1, mean2.double(), factor2)


def feature_factor(features: Tensor) -> Tensor:
    num, size = features.shape
    return centred_factor(features) if num < size else factorise(accumulate(features).covariance)


def frechet_from_features(features1: Tensor, features2: Tensor) -> float:
    """Frechet distance of two feature sets (N1, D) and (N2, D); raises ValueError below two rows."""
    if min(len(features1), len(features2)) < 2:
        raise ValueError(f"a covariance needs two images or more, not {len(features1)} and {len(features2)}")
    means = [features.double().mean(0) for features in (features1, features2)]
    factors = [feature_factor(features) for features in (features1, features2)]
    return float(distance_from_factors(means[0], factors[0], means[1], factors[1]))


def polynomial_kernel(x: Tensor, y: Tensor | None = None) -> Tensor:
    """(x.y / D + 1)^3 of every row of (N, D) with every row of (M, D), float64; with itself without `y`."""
    x = x.double()
    return (x @ (x if y is None else y.double()).T / x.shape[1] + 1) ** 3


def polynomial_mmd(x: Tensor, y: Tensor) -> Tensor:
    """Unbiased MMD^2 with the kernel (x.y / D + 1)^3, float64; may be slightly negative."""
    kxx, kyy, kxy = polynomial_kernel(x), polynomial_kernel(y), polynomial_kernel(x, y)
    m, n = len(x), len(y)
    within_x = (kxx.sum() - kxx.diagonal().sum()) / (m * (m - 1))
    within_y = (kyy.sum() - kyy.diagonal().sum()) / (n * (n - 1))
    return within_x + within_y - 2 * kxy.mean()


class KernelDistance(NamedTuple):
    """KID over subsets; `std` is over subsets, None where one estimate used every image."""

    mean: float
    std: float | None
    subset_size: int
    num_subsets: int


def kernel_distance(
    features1: Tensor, features2: Tensor, *, num_subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """KID of two feature sets (N, D). Sets no larger than `subset_size` are compared whole, once."""
    sizes = len(features1), len(features2)
    if min(sizes) < 2:
        raise ValueError(f"KID needs two images or more, not {sizes[0]} and {sizes[1]}")
    if max(sizes) <= subset_size:
        return KernelDistance(float(polynomial_mmd(features1, features2)), None, min(sizes), 1)
    size = min(subset_size, *sizes)
    generator = torch.Generator().manual_seed(seed)

    def subset(features: Tensor) -> Tensor:
        return features[torch.randperm(len(features), generator=generator)[:size]]

    values = torch.stack([polynomial_mmd(subset(features1), subset(features2)) for _ in range(num_subsets)])
    return KernelDistance(float(values.mean()), float(values.std(unbiased=False)), size, num_subsets)


class FrechetDistance(Metric):
    """Frechet distance of generated and real images in the feature space of `extractor`.

    `extractor`: (B, C, *S) in [-1, 1] -> (B, num_features). Call the number FID only where
    the extractor is Inception with the weights everyone uses (`networks.features`).
    """

    full_state_update = False

    def __init__(self, extractor: nn.Module, *, num_features: int) -> None:
        super().__init__()
        self.extractor = extractor.eval().requires_grad_(False)
        for side in ("generated", "reference"):
            for name, shape in (("total", (num_features,)), ("outer", (num_features, num_features))):
                self.add_state(
                    f"{side}_{name}", torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum"
                )
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, generated: Tensor, reference: Tensor) -> None:
        self.accumulate_side("generated", generated)
        self.accumulate_side("reference", reference)

    @torch.no_grad()
    def accumulate_side(self, side: str, images: Tensor) -> None:
        """Add images to the `generated` or the `reference` side alone; the sides may differ in number."""
        moments = accumulate(self.extractor(images))
        for name, value in moments._asdict().items():
            key = f"{side}_{name}"
            setattr(self, key, getattr(self, key) + value)

    def moments(self, side: str) -> Moments:
        return Moments(*(getattr(self, f"{side}_{name}") for name in Moments._fields))

    def compute(self) -> Tensor:
        sides = [self.moments("generated"), self.moments("reference")]
        if min(int(side.count) for side in sides) < 2:
            raise InputError(f"frechet: n = {[int(s.count) for s in sides]}; two images a side are the least")
        return frechet_distance(sides[0].mean, sides[0].covariance, sides[1].mean, sides[1].covariance)
