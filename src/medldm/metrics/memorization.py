"""Whether generated images repeat training images: distance to the nearest one, beside that of real held-out
images.

A model that memorises lies nearer to its training set than new real images do.
"""

from collections.abc import Sequence

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


def memorized_share(generated: Sequence[float], real: Sequence[float], quantile: float = 0.05) -> float:
    """Share of the generated images nearer to the training set than the `quantile` of real held-out ones.

    Equal to `quantile` in the mean where generated and real images are distributed alike.
    """
    made, held_out = (torch.as_tensor(values, dtype=torch.float64) for values in (generated, real))
    return (made < held_out.quantile(quantile)).double().mean().item()
