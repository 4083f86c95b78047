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
NUM_CANDIDATES = 16  # training images that an image is compared with at half shifts


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


def shifts(small: Tensor) -> Iterator[Tensor]:
    """Thumbnails (B, C, *s) shifted by up to one of their pixels along every axis, without a border of one
    pixel: (B, C, *(s - 2)).
    """
    axes = range(2, small.ndim)
    for start in itertools.product(range(3), repeat=len(axes)):
        part = small
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


def half_shifted(images: Tensor) -> Iterator[Tensor]:
    """Thumbnails (B, C, *s) of images (B, C, *S) that are moved by half a pixel of the thumbnail along every
    choice of axes but none; between whole pixels of the image by linear interpolation.
    """
    axes, shape = range(2, images.ndim), thumbnail_shape(images.shape[1:])
    for num in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, num):
            moved = images.float()
            for axis in chosen:
                moved = moved_along(moved, axis, images.shape[axis] / shape[axis - 1] / 2)
            yield thumbnails(moved).view(-1, *shape)


def moved_along(x: Tensor, axis: int, distance: float) -> Tensor:
    """What lies `distance` pixels further along an axis, the last value beyond the end."""
    whole, size = int(distance), x.shape[axis]
    places = torch.arange(size, device=x.device) + whole
    near, far = (x.index_select(axis, (places + more).clamp(max=size - 1)) for more in (0, 1))
    return torch.lerp(near, far, distance - whole)


def nearest_correlation(images: Tensor, train: Tensor) -> Tensor:
    """The correlations of `nearest_training`: (B, C, *S) images, thumbnails (N, C, *s) -> (B,) in [-1, 1]."""
    return nearest_training(images, train)[0]


def nearest_training(images: Tensor, train: Tensor) -> tuple[Tensor, Tensor]:
    """(B, C, *S) images and thumbnails (N, C, *s) of training images -> the highest correlation of each of
    the B with one of the N, (B,) in [-1, 1], and which of them it is, (B,) int64.

    It is taken over mirrorings and shifts of up to one pixel of the thumbnail and does not see brightness or
    contrast: a mirrored, shifted, noisy or re-windowed copy of a training image still comes near 1. The
    shifts are whole pixels first, against all of the N, then half ones against the `NUM_CANDIDATES` that
    correlate most, each mirrored as it correlates most. ValueError for thumbnails of fewer than 5 pixels
    a side.
    """
    shape = thumbnail_shape(images.shape[1:])
    if min(shape[1:]) < 5:
        raise ValueError(f"thumbnails of {tuple(shape[1:])} pixels are too small to be shifted")
    inner = train
    for axis in range(2, train.ndim):
        inner = inner.narrow(axis, 1, train.shape[axis] - 2)
    known = standardised_rows(inner)
    widest = max(len(known), NUM_CANDIDATES * known.shape[1])  # values for an image and a mirroring
    parts = images.split(max(1, CHUNK_BYTES // (4 * widest * 2 ** (images.ndim - 2))))
    found = [nearest_of_some(part, inner, known) for part in parts]
    return tuple(torch.cat(values) for values in zip(*found, strict=True))


def nearest_of_some(images: Tensor, inner: Tensor, known: Tensor) -> tuple[Tensor, Tensor]:
    """`nearest_training` of as many images as a table of all training images has place for; `inner` are the
    thumbnails (N, C, *(s - 2)) of these without a border, `known` the same as standardised rows (N, D).
    """
    small = thumbnails(images).view(-1, *thumbnail_shape(images.shape[1:]))
    best, turn = whole_shifts(small, known).max(0)  # (B, N)
    best, index = best.topk(min(NUM_CANDIDATES, len(known)))  # (B, M)
    candidates = turned_alike(inner[index], turn.gather(1, index))
    for half in half_shifted(images):
        for part in shifts(half):
            found = torch.einsum("bmd,bd->bm", candidates, standardised_rows(part))
            best = torch.maximum(best, found)
    found = best.max(1)
    return found.values, index.gather(1, found.indices[:, None])[:, 0]


def whole_shifts(small: Tensor, known: Tensor) -> Tensor:
    """Thumbnails (B, C, *s) and standardised inner parts (N, D) of others -> the highest correlation over
    shifts by whole pixels, for each mirroring (in the order of `mirrored`): (K, B, N).
    """
    table = []
    for turned in mirrored(small, range(2, small.ndim)):
        best = small.new_full((len(small), len(known)), -1.0)
        for part in shifts(turned):
            torch.maximum(best, standardised_rows(part) @ known.T, out=best)
        table.append(best)
    return torch.stack(table)


def turned_alike(parts: Tensor, turn: Tensor) -> Tensor:
    """(B, M, C, *s), each mirrored in the way of this number, (B, M), as standardised rows (B, M, D)."""
    flat = parts.flatten(0, 1)
    rows = torch.stack([standardised_rows(x) for x in mirrored(flat, range(2, flat.ndim))])  # (K, BM, D)
    chosen = rows[turn.flatten(), torch.arange(len(flat), device=rows.device)]
    return chosen.view(*turn.shape, -1)


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
