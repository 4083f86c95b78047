"""From a volume to 2D slices: along which axis it is cut, and which way up slices lie.

Slices lie as radiologists look at them, whatever order a file stores its axes in. Axial ones, from feet to
head: rows run to the back, columns to the patient's left. Coronal ones, from back to front: rows run to the
feet, columns to the left. Sagittal ones, from right to left: rows run to the feet, columns to the back.
Between these planes (a heart's short axis): the slices as acquired, in the nearest such arrangement.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from medldm.data.preparation.recipe import Recipe
from medldm.data.raw.grids import edges_of, turned
from medldm.data.raw.image import RawImage
from medldm.errors import InputError

log = logging.getLogger(__name__)
# cut across the left-right, the front-back and the head-feet axis
BODY_PLANES = ("sagittal", "coronal", "axial")
# How much an axis wants to run along R, A and S: as rows and columns of a slice, and from slice to slice.
ALONG_ROWS, ALONG_COLUMNS, ALONG_STACK = np.array([(0, -0.5, -1), (-1, -0.5, 0), (-1, 1, 0.5)])
STRAIGHT = np.cos(np.deg2rad(30))  # axes further off the body's than this make a volume oblique
THICK = 1.5  # slices this much further apart than pixels are the acquired ones


class Cut(NamedTuple):
    """How a volume is cut into slices."""

    order: tuple[int, ...]  # axes of the volume that become (slice, row, column)
    signs: tuple[int, ...]  # -1: mirrored
    plane: str  # axial, coronal, sagittal, oblique, or stored


class Planes(NamedTuple):
    """The slices of a volume, or one picture."""

    array: np.ndarray  # (N, H, W)
    spacing: tuple[float, float]  # mm per pixel (H, W)
    affine: np.ndarray | None  # (slice, row, column) -> RAS, mm; None for a picture
    plane: str
    is_coloured: bool = False  # a picture whose colours were made grey


def as_volume(image: RawImage, path: str) -> RawImage:
    """(X, Y, Z) where the file says where it lies, (H, W) where not. InputError for anything else."""
    array = image.array
    if image.affine is None:
        if array.ndim != 2:
            raise InputError(
                f"{path}: holds shape {array.shape} and does not say how it lies; give one picture (H, W) a "
                "file, or a NIfTI volume"
            )
        return image
    while array.ndim > 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3):
        raise InputError(f"{path}: has {array.ndim} axes {array.shape}; give one volume a file")
    return image._replace(array=array.reshape((*array.shape, 1)[:3]))


def find_cut(image: RawImage, recipe: Recipe, path: str) -> Cut | None:
    """How a volume becomes slices; None for a picture. `slice_axis` is an axis of the body, 0 left-right,
    1 front-back, 2 head-feet; with `slice_orientation: stored` of the array, which is taken as it lies.

    InputError where a single slice is of another plane than the one asked for.
    """
    if image.affine is None:
        return None
    if recipe.slice_orientation == "stored":
        rest = [i for i in range(3) if i != recipe.slice_axis]
        return Cut((recipe.slice_axis, rest[1], rest[0]), (1, 1, 1), "stored")
    edges = edges_of(image.affine)
    directions = (image.affine[:3, :3] / edges).T  # (axis of the array, RAS)
    depth, plane = slicing_axis(image.array.shape, edges, directions, recipe.slice_axis, path)
    first, second = (i for i in range(3) if i != depth)
    rows, columns = max(
        ((second, first), (first, second)),
        key=lambda axes: abs(ALONG_ROWS @ directions[axes[0]]) + abs(ALONG_COLUMNS @ directions[axes[1]]),
    )
    order = (depth, rows, columns)
    wanted = zip((ALONG_STACK, ALONG_ROWS, ALONG_COLUMNS), order, strict=True)
    return Cut(order, tuple(-1 if want @ directions[axis] < 0 else 1 for want, axis in wanted), plane)


def slicing_axis(
    shape: Sequence[int], edges: np.ndarray, directions: np.ndarray, slice_axis: int, path: str
) -> tuple[int, str]:
    """(axis of the array along which slices follow each other, name of their plane)."""
    widest, ordered = int(edges.argmax()), np.sort(edges)
    is_thick = ordered[2] >= THICK * ordered[1]
    single = [i for i in range(3) if shape[i] == 1]
    if np.abs(directions).max(1).min() < STRAIGHT:
        return (single[-1] if single else widest if is_thick else slice_axis), "oblique"
    axes = [int(axis) for axis in np.abs(directions).argmax(1)]  # of the body, all three where it is straight
    depth = axes.index(slice_axis)
    if single and depth not in single:
        raise InputError(
            f"{path}: is a single {BODY_PLANES[axes[single[-1]]]} slice, not {BODY_PLANES[slice_axis]}; set "
            f"data.preprocess.slice_axis={axes[single[-1]]}, or take it out"
        )
    if is_thick and widest != depth and not single:
        log.warning(
            "%s: acquired as %s slices %.3g mm apart and cut across them; data.preprocess.slice_axis=%d "
            "takes them as they are",
            *(path, BODY_PLANES[axes[widest]], edges[widest], axes[widest]),
        )
    return depth, BODY_PLANES[slice_axis]


def cut_planes(image: RawImage, cut: Cut | None) -> Planes:
    if cut is None:
        return Planes(image.array[None], image.spacing or (1.0, 1.0), None, "picture", image.is_coloured)
    array, affine = turned(image.array, image.affine, cut.order, cut.signs)
    return Planes(np.ascontiguousarray(array), tuple(edges_of(affine)[1:].tolist()), affine, cut.plane)
