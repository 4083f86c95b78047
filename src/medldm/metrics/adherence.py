"""Does the image show what was asked for? Edges found again in it against the edges it was conditioned on."""

import math

import torch.nn.functional as F
from torch import Tensor


def dilate(edges: Tensor, tolerance: int) -> Tensor:
    """Pixels within `tolerance` (Chebyshev distance) of an edge: (B, 1, *S) {0, 1} -> same."""
    pool = {2: F.max_pool2d, 3: F.max_pool3d}[edges.ndim - 2]
    return pool(edges, 2 * tolerance + 1, stride=1, padding=tolerance)


def edge_f1(found: Tensor, wanted: Tensor, *, tolerance: int) -> Tensor:
    """F1 of edge pixels matched within `tolerance` pixels, per image: (B, 1, *S) {0, 1} twice -> (B,).

    Precision is the share of found pixels near a wanted one, recall the share of wanted pixels near a found
    one. NaN where neither map has an edge, 0 where only one has.
    """
    found, wanted = found.float(), wanted.float()
    num_found, num_wanted = found.flatten(1).sum(1).double(), wanted.flatten(1).sum(1).double()
    precision = (found * dilate(wanted, tolerance)).flatten(1).sum(1) / num_found.clamp(min=1)
    recall = (wanted * dilate(found, tolerance)).flatten(1).sum(1) / num_wanted.clamp(min=1)
    f1 = 2 * precision * recall / (precision + recall).clamp(min=1e-12)
    return f1.where(num_found + num_wanted > 0, math.nan)


def definition(tolerance: int, wanted: str = "the conditioning edges") -> str:
    return (
        f"F1 of edges detected again on the image (the data set's recipe) against {wanted}, "
        f"matched within {tolerance} px (Chebyshev)"
    )
