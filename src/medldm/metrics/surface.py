"""Distances between the surfaces of a class in two maps, in 2D and 3D alike."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import ndimage


class SurfaceScores(NamedTuple):
    """Of each foreground class, (K - 1,) float64 in the unit of the spacing."""

    hd95: np.ndarray
    mean: np.ndarray


def surface_distances(
    found: np.ndarray, wanted: np.ndarray, num_classes: int, spacing: Sequence[float] | None = None
) -> SurfaceScores:
    """95th percentile of the Hausdorff distance, and mean surface distance, of two class maps (*S).

    The surface of a class are its voxels with a face (in 2D an edge) on the outside; the border of the image
    is outside. HD95 is the larger of the two directed 95th percentiles, the mean is over the surface voxels
    of both maps. `spacing` are the sizes of a voxel along the axes, 1 where it is None. NaN where neither map
    has the class; the diagonal of the image, the largest distance there can be, where only one has it.
    """
    sizes = np.ones(found.ndim) if spacing is None else np.asarray(spacing, float)
    diagonal = float(np.linalg.norm((np.array(found.shape) - 1) * sizes))
    table = np.full((2, num_classes - 1), math.nan)
    for k in range(1, num_classes):
        a, b = found == k, wanted == k
        if a.any() != b.any():
            table[:, k - 1] = diagonal
        elif a.any():
            there, back = directed_distances(a, b, sizes)
            table[0, k - 1] = max(np.percentile(there, 95), np.percentile(back, 95))
            table[1, k - 1] = np.concatenate([there, back]).mean()
    return SurfaceScores(*table)


def directed_distances(a: np.ndarray, b: np.ndarray, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of every surface voxel of `a` to the surface of `b`, and the other way; both hold something."""
    box = ndimage.find_objects((a | b).astype(np.uint8))[0]
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in (a[box], b[box])]
    to_other = [ndimage.distance_transform_edt(~edge, sampling=sizes) for edge in reversed(edges)]
    return to_other[0][edges[0]], to_other[1][edges[1]]
