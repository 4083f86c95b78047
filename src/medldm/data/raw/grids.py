"""Compares where the voxels of two images lie in the scanner, and brings arrays from one grid onto the other.

An affine (4, 4) maps voxel indices to RAS coordinates in mm. This module imports NumPy and SciPy alone, so
that processes which prepare 2D images start at once.
"""

import logging
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from medldm.data.case import visit_of
from medldm.data.raw.image import RawImage
from medldm.errors import InputError

log = logging.getLogger(__name__)
# Two grids are the same where no corner lies further apart than this share of the smallest voxel edge.
# Headers that state one position as sform and as qform, or in float32, differ by thousandths of it; a shift
# by half a voxel is a real one.
SAME_GRID = 0.1
COVERED = 0.99  # of an image: there is a warning where its map covers less
REGISTER = "register them first (ANTs, elastix or FSL's flirt, say) and resample both onto one grid"


def as_3d(shape: Sequence[int]) -> tuple[int, ...]:
    return (*shape, 1, 1, 1)[:3]


def distance(shape: Sequence[int], affine: np.ndarray, other: np.ndarray) -> float:
    """The largest distance in mm between the corner voxels of a grid under two affines."""
    corners = np.stack(np.meshgrid(*[(0, n - 1) for n in as_3d(shape)], (1,), indexing="ij"), -1)
    return float(np.linalg.norm(corners.reshape(-1, 4) @ (affine - other).T, axis=1).max())


def edges_of(affine: np.ndarray) -> np.ndarray:
    """The length in mm of a voxel along each axis."""
    return np.linalg.norm(np.asarray(affine)[:3, :3], axis=0)


def is_same_grid(
    shape: Sequence[int], affine: np.ndarray, other_shape: Sequence[int], other: np.ndarray
) -> bool:
    """Whether every voxel of one grid lies where the voxel of the same index of the other does."""
    return as_3d(shape) == as_3d(other_shape) and bool(
        distance(shape, np.asarray(affine), np.asarray(other)) <= SAME_GRID * edges_of(affine).min()
    )


def turned(
    array: np.ndarray, affine: np.ndarray, order: Sequence[int], signs: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """The array whose axis i is axis `order[i]` of a volume, mirrored where `signs[i]` is -1, and its affine.
    No voxel changes its value or its place.
    """
    matrix = np.zeros((4, 4))  # from new indices to old ones
    matrix[3, 3] = 1
    for i, (axis, sign) in enumerate(zip(order, signs, strict=True)):
        matrix[axis, i] = sign
        matrix[axis, 3] = 0 if sign > 0 else array.shape[axis] - 1
    flipped = np.flip(array.transpose(order), [i for i, sign in enumerate(signs) if sign < 0])
    return flipped, affine @ matrix


def turned_onto(array: np.ndarray, affine: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A volume with its axes in the order and directions that come closest to those of the affine `other`."""
    from nibabel import io_orientation

    onto = io_orientation(np.linalg.solve(other, affine))  # of each axis: (axis of `other`, sign)
    order = [int(np.flatnonzero(onto[:, 0] == i)[0]) for i in range(3)]
    return turned(array, affine, order, [int(onto[axis, 1]) for axis in order])


# ---- maps and their images ----


def on_grid_of(image: RawImage, other: RawImage, path: str, rule: str, mend: str | None = None) -> np.ndarray:
    """The array of the map `other` on the grid of `image`. Where both are one grid whose axes have another
    order or direction, the array is transposed and mirrored.

    For another grid, the `rule` decides: "resample" takes the nearest voxel in the scanner, "trust" takes the
    voxels as they are stored where shapes are equal, and "same" is an InputError, whose mend is `mend`, or by
    default these two rules. A map that does not overlap its image is an InputError, too.
    """
    shape = image.array.shape
    if image.affine is None or other.affine is None:
        return on_picture(image, other, path)
    array = other.array.reshape(as_3d(other.array.shape))
    if is_same_grid(shape, image.affine, array.shape, other.affine):
        return array.reshape(shape)
    if rule == "trust" and other.array.shape == shape:
        return other.array
    array, affine = turned_onto(array, other.affine, image.affine)
    if is_same_grid(shape, image.affine, array.shape, affine):
        return array.reshape(shape)
    if rule == "resample":
        return resampled(image, array, affine, path).reshape(shape)
    is_alike = other.array.shape == shape
    difference = f"its shape is {other.array.shape} for an image of shape {shape}"
    if is_alike:
        difference = f"{distance(shape, image.affine, affine):.3g} mm apart"
    resample = "set data.preprocess.mask_grid=resample to bring it there"
    trust = ", or =trust to take its voxels as they lie" if is_alike else ""
    raise InputError(
        f"{path}: lies on another grid than its image ({difference}); {mend or resample + trust}"
    )


def on_picture(image: RawImage, other: RawImage, path: str) -> np.ndarray:
    """The array of `other` where at least one of the two has no affine. InputError where shapes differ or
    only one has an affine: then nothing says which pixel belongs to which.
    """
    if image.affine is not None or other.affine is not None:
        raise InputError(
            f"{path}: only one of image and map says where it lies (one is NIfTI, one a picture); save both "
            "in one format"
        )
    if image.array.shape != other.array.shape:
        raise InputError(
            f"{path}: mask of shape {other.array.shape} for an image of shape {image.array.shape}; "
            "resample one onto the other's grid"
        )
    return other.array


def resampled(image: RawImage, array: np.ndarray, affine: np.ndarray, path: str) -> np.ndarray:
    """The nearest voxel of a map at every voxel of the image, 0 outside it. InputError where they do not
    overlap; a warning where the map covers only a part of the image.
    """
    from scipy import ndimage

    to_map = np.linalg.solve(affine, image.affine)
    place = {"matrix": to_map[:3, :3], "offset": to_map[:3, 3], "output_shape": as_3d(image.array.shape)}
    nearest = {"order": 0, "mode": "grid-constant"}
    share = float(ndimage.affine_transform(np.ones(array.shape, np.uint8), **place, **nearest).mean())
    if share == 0:
        apart = np.linalg.norm(center(image.array.shape, image.affine) - center(array.shape, affine))
        raise InputError(
            f"{path}: lies beside its image (no overlap, centres {apart:.0f} mm apart), so all would be "
            "background; correct its origin, or set data.preprocess.mask_grid=trust where shapes are equal"
        )
    if share < COVERED:
        log.warning("%s: covers %.0f%% of its image; the rest becomes background", path, 100 * share)
    out = ndimage.affine_transform(array, **place, **nearest)
    if array.any() and not out.any():
        log.warning("%s: everything labelled lies outside of its image", path)
    return out


def center(shape: Sequence[int], affine: np.ndarray) -> np.ndarray:
    """The centre of a grid in RAS coordinates, mm."""
    return affine[:3, :3] @ ((np.array(as_3d(shape)) - 1) / 2) + affine[:3, 3]


# ---- images of one subject ----


def difference_of(source: Mapping[str, Any], target: Mapping[str, Any]) -> str | None:
    """Why two volumes of a subject cannot be a pair, with the mend: by their entries in index.json, their
    prepared voxels do not lie at the same positions. None where they do, or where index.json does not say.
    """
    if not {"affine", "shape"} <= source.keys() & target.keys():
        return None
    shape, other_shape = source["shape"], target["shape"]
    if is_same_grid(shape, source["affine"], other_shape, target["affine"]):
        return None
    raw = [
        (
            entry.get("original_shape", entry["shape"]),
            np.asarray(entry.get("original_affine", entry["affine"])),
        )
        for entry in (source, target)
    ]
    if is_same_grid(*raw[0], *raw[1]):
        return (
            "both come from one grid but were cropped to different boxes; name one file as `foreground` of "
            "both, or set "
            "data.preprocess.crop_foreground=false, and prepare again"
        )
    voxels = " and ".join(f"{tuple(n)} with the affine {a[:3].round(3).tolist()}" for n, a in raw)
    return f"grids of {voxels}; {REGISTER}, then prepare again"


def warn_of_grids(cases: Sequence[Mapping[str, Any]]) -> None:
    """Logs one warning where subjects have images of different labels on different grids."""
    members: dict[tuple, list] = defaultdict(list)
    for entry in cases:
        members[entry["subject"], visit_of(entry)].append(entry)
    apart = [
        subject
        for (subject, _), entries in members.items()
        if any(
            a.get("label") != b.get("label") and difference_of(a, b) is not None
            for a, b in combinations(entries, 2)
        )
    ]
    if apart:
        log.warning(
            "%d of %d subjects (%s first) have images of different labels on different grids. They can be "
            "used as single images, but not as pairs; for translation %s",
            *(len(apart), len(members), apart[0], REGISTER),
        )


def body_axis(orientation: str) -> int:
    """The axis of a volume in this orientation that runs along the body, from feet to head or back."""
    return next(i for i, letter in enumerate(orientation) if letter in "SI")
