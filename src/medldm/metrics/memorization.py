"""Whether generated images repeat training images: distance to the nearest one, beside that of real held-out
images.

A model that memorises lies nearer to its training set than new real images do.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

POOLED = {2: 32, 3: 16}  # edge of the thumbnails: small shifts and noise hide no copy
CHUNK_BYTES = 2**28


def thumbnails(images: Tensor) -> Tensor:
    """(B, C, *S) -> (B, C * 32 * 32) or (B, C * 16^3) float32 block means; axes that are shorter stay."""
    spatial_dims = images.ndim - 2
    size = [min(s, POOLED[spatial_dims]) for s in images.shape[2:]]
    pool = {2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}[spatial_dims]
    return pool(images.float(), size).flatten(1)


def nearest_distance(images: Tensor, train: Tensor) -> Tensor:
    """(B, D) and (N, D) thumbnails -> (B,) float32 RMSE to the nearest of the N."""
    rows = max(1, CHUNK_BYTES // (4 * len(images)))
    # The exact form: the product form of cdist loses copies to rounding.
    distances = [
        torch.cdist(images, part, compute_mode="donot_use_mm_for_euclid_dist").amin(1)
        for part in train.split(rows)
    ]
    return torch.stack(distances).amin(0) / images.shape[1] ** 0.5


def thumbnail_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape (C, *s) of the thumbnail of an image (C, *S)."""
    return shape[0], *(min(s, POOLED[len(shape) - 1]) for s in shape[1:])


def placings(small: Tensor) -> Iterator[Tensor]:
    """Thumbnails (B, C, *s) mirrored along every choice of axes and shifted by up to one of their pixels,
    without a border of one pixel: (B, C, *(s - 2)).
    """
    axes = range(2, small.ndim)
    for turned in mirrored(small, axes):
        for start in itertools.product(range(3), repeat=len(axes)):
            part = turned
            for axis, first in zip(axes, start, strict=True):
                part = part.narrow(axis, first, small.shape[axis] - 2)
            yield part


def mirrored(images: Tensor, axes: Sequence[int]) -> Iterator[Tensor]:
    """The images as they are and mirrored along every choice of these axes."""
    for num in range(len(axes) + 1):
        for flipped in itertools.combinations(axes, num):
            yield images.flip(flipped) if flipped else images


def standardised_rows(x: Tensor) -> Tensor:
    """(B, ...) -> (B, D) of mean 0 and length 1; a constant row becomes 0."""
    flat = x.flatten(1).float()
    centred = flat - flat.mean(1, keepdim=True)
    return F.normalize(centred, eps=1e-6)


def nearest_correlation(images: Tensor, train: Tensor) -> Tensor:
    """The correlations of `nearest_training`: (B, C, *s) and (N, C, *s) thumbnails -> (B,) in [-1, 1]."""
    return nearest_training(images, train)[0]


def nearest_training(images: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, *s) and (N, C, *s) thumbnails -> the highest correlation of each of the B with one of the N,
    (B,) in [-1, 1], and which of them it is, (B,) int64.

    It is taken over mirrorings and small shifts and does not see brightness or contrast: a mirrored, shifted,
    noisy or re-windowed copy of a training image still comes near 1. ValueError for sides below 5 pixels.
    """
    if min(images.shape[2:]) < 5:
        raise ValueError(f"thumbnails of {tuple(images.shape[2:])} pixels are too small to be shifted")
    inner = train
    for axis in range(2, train.ndim):
        inner = inner.narrow(axis, 1, train.shape[axis] - 2)
    known = standardised_rows(inner)
    rows = max(1, CHUNK_BYTES // (4 * len(images)))
    best = images.new_full((len(images),), -1.0, dtype=torch.float32)
    index = torch.zeros(len(images), dtype=torch.int64, device=images.device)
    for placed in placings(images):
        made = standardised_rows(placed)
        for number, part in enumerate(known.split(rows)):
            found = (made @ part.T).max(1)
            index = torch.where(found.values > best, found.indices + number * rows, index)
            best = torch.maximum(best, found.values)
    return best, index


class Audit(NamedTuple):
    """How many of `num_images` correlate with a training image more than all `num_real` held-out ones do.

    An image that is drawn as those were does so by chance at `false_positive_rate`.
    """

    num_copies: int
    num_images: int
    num_real: int
    threshold: float
    false_positive_rate: float


def audit_copies(generated: Sequence[float], real: Sequence[float]) -> Audit:
    """From the correlations with the nearest training image (`nearest_correlation`) of both."""
    made, held_out = (torch.as_tensor(values, dtype=torch.float64) for values in (generated, real))
    threshold = float(held_out.max())
    num = int((made > threshold).sum())
    return Audit(num, len(made), len(held_out), threshold, 1 / (len(held_out) + 1))


def memorized_share(generated: Sequence[float], real: Sequence[float], quantile: float = 0.05) -> float:
    """Share of the generated images nearer to the training set than the `quantile` of real held-out ones.

    Equal to `quantile` in the mean where generated and real images are distributed alike.
    """
    made, held_out = (torch.as_tensor(values, dtype=torch.float64) for values in (generated, real))
    return (made < held_out.quantile(quantile)).double().mean().item()
