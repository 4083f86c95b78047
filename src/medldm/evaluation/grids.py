"""Volumes of other programs on the grid of their reference: moved by whole voxels, or prepared as it was."""

import warnings
from collections.abc import Mapping, Sequence

import numpy as np

from medldm.data.hdf5 import BODY, open_hdf5
from medldm.data.preparation.intensity import remove_artifacts, scale_to_unit
from medldm.data.preparation.recipe import Recipe
from medldm.data.records import ImageRecord
from medldm.errors import InputError
from medldm.evaluation.stored import load

FRINGE = 2  # voxels over which an interpolation reaches


def voxels_to(image: np.ndarray, affine: np.ndarray, to: np.ndarray, shape: Sequence[int]) -> tuple | None:
    """`image` on the grid (`to`, `shape`) with -1 beyond it, and where it has voxels there (bool). None where
    voxels of one grid are not voxels of the other, turned and shifted.
    """
    from medldm.data.preparation.volume_transforms import (  # MONAI, which 2D does without
        is_exact,
        move_voxels,
    )

    matrix = np.linalg.solve(np.asarray(affine, np.float64), np.asarray(to, np.float64))
    if not is_exact(matrix, tuple(shape)):
        return None
    inside = move_voxels(np.ones(image.shape, np.float32), matrix, tuple(shape)) > 0
    return move_voxels(image, matrix, tuple(shape)), inside


def prepared_like(
    x: np.ndarray, inside: np.ndarray, attributes: Mapping, shape: Sequence[int], recipe: Recipe
) -> tuple[np.ndarray, np.ndarray]:
    """A volume on the source's grid, in [-1, 1], resampled and cut as its reference was; and where it has
    voxels, or the source has none either.
    """
    import torch
    from monai.data import MetaTensor
    from monai.transforms import Compose

    from medldm.data.preparation.volume_transforms import onto_grid

    source = np.asarray(attributes["original_affine"], np.float64)
    item = {
        key: MetaTensor(
            torch.from_numpy(np.asarray(array, np.float32))[None], affine=torch.from_numpy(source)
        )
        for key, array in (("image", x), ("missing", ~inside))
    }
    with warnings.catch_warnings():  # as in `prepare_volume`
        warnings.filterwarnings("ignore", "align_corners")
        item = Compose(onto_grid(list(item), recipe, x.shape, source))(item)
    affine = item["image"].affine.numpy()
    moved = [
        voxels_to(item[key].as_tensor().numpy()[0], affine, attributes["affine"], shape)
        for key in ("image", "missing")
    ]
    if moved[0] is None:
        raise InputError(
            "reference: index.json does not describe how its cases were made; prepare them again"
        )
    return moved[0][0], moved[1][0] <= 0


def on_grid_of_reference(
    x: np.ndarray, affine: np.ndarray, real: ImageRecord, recipe: Recipe | None
) -> tuple[np.ndarray, np.ndarray] | None:
    """A volume, -1 to 1 and beyond, on the grid of its reference, and where it has voxels there (or the
    source has none either). None where it lies on neither the prepared nor the source's grid.

    What lies on the source's grid is cleaned, clipped, resampled and cut as its reference was.
    """
    shape, attributes = tuple(real.image.shape[1:]), real.attributes
    placed = voxels_to(clipped(x, recipe), affine, attributes["affine"], shape)
    if "original_affine" not in attributes:
        return placed
    source = tuple(int(n) for n in attributes["original_shape"])
    has_body = recipe is not None and recipe.mask_out and "body_file" in attributes
    is_cleaned = recipe is not None and (recipe.remove_artifacts or has_body)
    if placed is not None and not is_cleaned:
        whole = np.ones(source, np.float32)
        known = voxels_to(whole, attributes["original_affine"], attributes["affine"], shape)
        return placed if known is None else (placed[0], placed[1] | ~known[1])
    on_source = voxels_to(x, affine, attributes["original_affine"], source)
    if on_source is None or recipe is None:
        return placed
    moved, has_voxels = on_source
    if has_body:
        moved = without_surroundings(moved, attributes)
    if recipe.remove_artifacts:
        moved = without_artifacts(moved, attributes)
    y, inside = prepared_like(clipped(moved, recipe), has_voxels, attributes, shape, recipe)
    return (without_fringe(y, load(real.image)[0]) if recipe.crop_foreground else y), inside


def clipped(x: np.ndarray, recipe: Recipe | None) -> np.ndarray:
    """`x` within [-1, 1], where a recipe clips before it resamples."""
    is_cut = recipe is not None and recipe.intensity.clip and recipe.intensity.region == "volume"
    return np.clip(x, -1, 1) if is_cut else x


def without_surroundings(x: np.ndarray, attributes: Mapping) -> np.ndarray:
    """A volume on its source's grid with nothing outside the body mask that the reference was emptied by, and
    there the value of the reference.
    """
    reader = open_hdf5(attributes["body_file"])
    outside = np.float32(reader.dataset(BODY).attrs["outside"])
    return np.where(reader.read(BODY), x, scale_to_unit(outside, *attributes["intensity_range"], clip=False))


def without_artifacts(x: np.ndarray, attributes: Mapping) -> np.ndarray:
    """A CT on its source's grid with nothing beside the patient, found in HU as it was for the reference."""
    low, high = attributes["intensity_range"]
    spacing = np.linalg.norm(np.asarray(attributes["original_affine"])[:3, :3], axis=0)
    hounsfield = low + (x + 1) * ((high - low) / 2)
    return scale_to_unit(remove_artifacts(hounsfield, spacing), low, high, clip=False)


def without_fringe(x: np.ndarray, real: np.ndarray) -> np.ndarray:
    """`x` without what interpolation spread over the box that the reference was cut to, then padded."""
    x, filled = x.copy(), real > real.min()
    for axis in range(x.ndim):
        planes = np.flatnonzero(filled.any(tuple(k for k in range(x.ndim) if k != axis)))
        if len(planes):
            along = np.moveaxis(x, axis, 0)
            along[max(0, planes[0] - FRINGE) : planes[0]] = -1
            along[planes[-1] + 1 : planes[-1] + 1 + FRINGE] = -1
    return x


def stored_as(x: np.ndarray, recipe: Recipe | None) -> np.ndarray:
    """As a prepared case of this recipe is stored, so that equal images are equal."""
    if recipe is None:
        return x
    x = np.clip(x, -1, 1) if recipe.intensity.clip else x
    return x.astype(recipe.dtype).astype(np.float32)
