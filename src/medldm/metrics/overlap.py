"""Dice of class maps, class by class, the background left out."""

import math

import torch
from torch import Tensor


def dice(found: Tensor, wanted: Tensor, num_classes: int) -> Tensor:
    """2 |A and B| / (|A| + |B|) per image and foreground class: (B, 1, *S) int maps -> (B, K - 1) float64.

    NaN where neither map has the class, 0 where only one has.
    """
    counts = []
    for both in (found, wanted):
        counts.append(class_counts(both, torch.ones_like(both, dtype=torch.bool), num_classes))
    overlap = class_counts(found, found == wanted, num_classes)
    total = counts[0] + counts[1]
    return (2 * overlap / total.clamp(min=1)).where(total > 0, math.nan)


def class_counts(maps: Tensor, where: Tensor, num_classes: int) -> Tensor:
    """Voxels of every foreground class among those in `where`: (B, K - 1) float64. One pass, no one-hot."""
    offsets = torch.arange(len(maps), device=maps.device).view(-1, *[1] * (maps.ndim - 1)) * num_classes
    places = (maps.long() + offsets)[where]
    counts = torch.bincount(places, minlength=num_classes * len(maps))
    return counts.view(len(maps), num_classes)[:, 1:].double()
