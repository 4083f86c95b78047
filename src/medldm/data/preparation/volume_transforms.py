"""The deterministic part of 3D preparation, MONAI's dictionary transforms, and its inverse."""

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import (
    Compose,
    CropForegroundd,
    DivisiblePadd,
    Orientationd,
    ResizeWithPadOrCropd,
    Spacingd,
    SpatialPadd,
    Transform,
)
from scipy import ndimage

from medldm.data.preparation.intensity import remove_artifacts, scale_to_unit
from medldm.data.preparation.recipe import FROM_BACKGROUND, Recipe
from medldm.data.raw.grids import body_axis
from medldm.errors import InputError

log = logging.getLogger(__name__)
FOREGROUND_SHARE = 0.005  # of the intensity range: a voxel above it is no background
SPLINE = {"linear": "bilinear", "bspline": 3}  # MONAI's name, or SciPy's order


class Volume(NamedTuple):
    """A prepared 3D case: arrays on the common grid and what is needed to put results back."""

    image: np.ndarray  # (1, D, H, W) float32 in [-1, 1], axes in the order of `orientation`
    mask: np.ndarray | None  # (1, D, H, W) integer
    affine: np.ndarray  # 4x4 of the prepared grid
    spacing: tuple[float, ...]
    intensity_range: tuple[float, float]
    box: tuple[list[int], list[int]]  # start (negative: padding) and end in the oriented, resampled volume
    original_affine: np.ndarray
    original_shape: tuple[int, ...]
    body: np.ndarray | None = None  # (X, Y, Z) bool of the raw volume, where what lies outside was emptied
    outside: float | None = None  # the raw value that it got

    def record(self) -> dict[str, Any]:
        """What `restore_volume` needs, as an index entry has it."""
        return {
            "affine": self.affine.tolist(),
            "original_affine": self.original_affine.tolist(),
            "original_shape": list(self.original_shape),
            "intensity_range": list(self.intensity_range),
        }


# ---- raw -> prepared ----


def prepare_volume(
    image: np.ndarray,
    mask: np.ndarray | None,
    affine: np.ndarray,
    recipe: Recipe,
    *,
    foreground: np.ndarray | None = None,
    body: np.ndarray | None = None,
) -> Volume:
    """Clean, scale, orient, resample, crop to the foreground and pad one raw volume (X, Y, Z).

    `foreground` is the raw volume, on the same grid, whose content decides the box (the image itself where
    it is None); `body` is not zero where the patient is. Intensity limits come from the raw volume, before
    resampling, or from the box where the recipe says so. Masks are resampled to the nearest class.
    """
    shape, rule = image.shape, recipe.intensity
    kept = None if body is None or not recipe.mask_out else body != 0
    outside = None if kept is None else float(image.min())
    image = clean(image, body, affine, recipe)
    low, high = rule.volume_range(image)
    fill = -1.0 if rule.region == "volume" else float(image.min())
    arrays = {"image": scale_to_unit(image, low, high, clip=rule.clip) if rule.region == "volume" else image}
    if mask is not None:
        arrays["mask"] = mask
    if recipe.crop_foreground:
        arrays["foreground"] = find_foreground(image if foreground is None else foreground, recipe)
    item = with_affine(arrays, affine)
    with warnings.catch_warnings():  # of scale_extent: places are right, see the tests
        warnings.filterwarnings("ignore", "align_corners")
        resampled = Compose(onto_grid(list(item), recipe, shape, affine))(item)
    grid_affine = resampled["image"].affine.numpy().copy()
    item = Compose(onto_box(list(item), recipe, fill))(resampled)
    x = item["image"].as_tensor().numpy()
    if rule.region == "box":
        low, high = rule.volume_range(x)
        x = scale_to_unit(x, low, high, clip=rule.clip)
    final_affine = item["image"].affine.numpy().astype(np.float64)
    return Volume(
        np.clip(x, -1, 1) if rule.clip else x,
        None if mask is None else item["mask"].as_tensor().numpy().astype(mask.dtype),
        final_affine,
        tuple(np.linalg.norm(final_affine[:3, :3], axis=0).tolist()),
        (low, high),
        box_within(grid_affine, final_affine, item["image"].shape[1:]),
        np.asarray(affine, np.float64),
        shape,
        kept,
        outside,
    )


def with_affine(arrays: dict[str, np.ndarray], affine: np.ndarray) -> dict[str, MetaTensor]:
    """Arrays (X, Y, Z) of one grid as MONAI's float32 tensors (1, X, Y, Z), which know where they lie."""
    return {
        key: MetaTensor(torch.from_numpy(np.asarray(x, np.float32))[None], affine=torch.from_numpy(affine))
        for key, x in arrays.items()
    }


def box_within(grid: np.ndarray, affine: np.ndarray, shape: Sequence[int]) -> tuple[list[int], list[int]]:
    """First and last voxel (start, end) of a box in the grid that it was cut from, by the affines of both."""
    start = np.rint(np.linalg.solve(grid[:3, :3], affine[:3, 3] - grid[:3, 3])).astype(int)
    return start.tolist(), (start + shape).tolist()


def clean(image: np.ndarray, body: np.ndarray | None, affine: np.ndarray, recipe: Recipe) -> np.ndarray:
    """The image with its least value outside the body, where the recipe asks for it, and in a constant
    background that is to be cropped away.
    """
    if recipe.mask_out and body is not None:
        image = np.where(body != 0, image, image.min())
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    image = remove_artifacts(image, spacing) if recipe.remove_artifacts else image
    return lower_background(image, recipe) if recipe.crop_foreground else image


def background_of(image: np.ndarray) -> float | None:
    """The value that the eight corners share, as those of skull-stripped or padded volumes do, else None."""
    corners = image[np.ix_(*[(0, -1)] * 3)]
    return float(corners[0, 0, 0]) if (corners == corners[0, 0, 0]).all() else None


def lower_background(image: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Z-scored images have their background, 0, in the middle of their values: it becomes the least of them,
    and so -1, with a warning.
    """
    background = background_of(image)
    low, high = recipe.intensity.volume_range(image)
    if background is None or background <= low + FOREGROUND_SHARE * (high - low):
        return image
    inside = image != background
    log.warning(
        "the background %g lies within the values %g to %g, as in z-scored images; it becomes the least",
        background,
        image.min(),
        image.max(),
    )
    return np.where(inside, image, image.min())


def find_foreground(image: np.ndarray, recipe: Recipe) -> np.ndarray:
    """Where there is something: what is so already (bool), values above `foreground_above`, or what differs
    from a constant background.
    """
    inside = image
    if image.dtype != bool:
        low, high = recipe.intensity.volume_range(image)
        least, background = FOREGROUND_SHARE * (high - low), background_of(image)
        threshold = recipe.foreground_above
        if threshold == FROM_BACKGROUND:
            inside = image > 0 if background is None else image != background
        elif threshold is None and background is not None and background > low + least:
            inside = np.abs(image - background) > least
        else:
            inside = image > (low + least if threshold is None else threshold)
    if not inside.any():
        raise InputError("data.preprocess.crop_foreground: a volume is empty; set it to false, or remove it")
    return inside


def onto_grid(keys: list[str], recipe: Recipe, shape: Sequence[int], affine: np.ndarray) -> list[Transform]:
    """Axes along `orientation`, voxels of `spacing` mm, or in-plane squares of `in_plane_size` voxels.

    The latter pads to a square by its edge and scales all three axes alike: voxels keep their proportions.
    """
    steps: list[Transform] = [Orientationd(keys, axcodes=recipe.orientation, labels=None)]
    modes = [SPLINE[recipe.interpolation] if key == "image" else "nearest" for key in keys]
    if recipe.spacing is not None:
        steps.append(Spacingd(keys, pixdim=recipe.spacing, mode=modes, padding_mode="border"))
    if recipe.in_plane_size is not None:
        raw = axis_order(affine, recipe.orientation)
        depth = body_axis(recipe.orientation)
        side = max(shape[raw[i]] for i in range(3) if i != depth)
        square = [-1 if i == depth else side for i in range(3)]
        sizes = np.linalg.norm(affine[:3, :3], axis=0)[raw] * (side / recipe.in_plane_size)
        for key in keys:
            steps.append(SpatialPadd([key], square, mode="edge" if key == "image" else "constant"))
        steps.append(
            Spacingd(keys, pixdim=tuple(sizes), mode=modes, padding_mode="border", scale_extent=True)
        )
    return steps


def axis_order(affine: np.ndarray, orientation: str) -> list[int]:
    """Which raw axis each axis of `orientation` is."""
    import nibabel

    pairs = ("RL", "AP", "SI")
    letters = nibabel.aff2axcodes(affine)
    return [
        next(i for i, letter in enumerate(letters) if any({letter, code} <= set(pair) for pair in pairs))
        for code in orientation
    ]


def onto_box(keys: list[str], recipe: Recipe, fill: float) -> list[Transform]:
    """Cut the empty border, then crop or pad about the centre; an axis without a size is padded to its
    `min_size` and to a multiple.
    """
    steps: list[Transform] = []
    if recipe.crop_foreground:
        steps.append(CropForegroundd(keys, source_key="foreground", allow_smaller=True))
    size = recipe.image_size or (None,) * 3
    depth = body_axis(recipe.orientation)
    if recipe.in_plane_size is not None and recipe.image_size is None:
        size = tuple(None if i == depth else recipe.in_plane_size for i in range(3))
    least = tuple(m or -1 if n is None else -1 for n, m in zip(size, recipe.min_size or size, strict=True))
    multiples = tuple(recipe.divisible_by if n is None else 1 for n in size)
    for key in keys:
        value = fill if key == "image" else 0
        if any(n is not None for n in size):
            steps.append(
                ResizeWithPadOrCropd([key], tuple(-1 if n is None else n for n in size), value=value)
            )
        if max(least) > 0:
            steps.append(SpatialPadd([key], least, value=value))
        if max(multiples) > 1:
            steps.append(DivisiblePadd([key], k=multiples, value=value))
    return steps


# ---- prepared -> raw ----


def restore_volume(array: np.ndarray, record: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """A prepared volume ([1,] D, H, W) in [-1, 1] on the grid and in the units of its source: (X, Y, Z)
    float32 and the source's affine.

    `record` is the case's entry in index.json, or `Volume.record()`. Voxels of the source outside the
    prepared box get the lower intensity limit. Where preparation only turned, cropped and padded, voxels
    move without change; where it resampled, values are interpolated linearly.
    """
    x = np.asarray(array, np.float32)
    x = x[0] if x.ndim == 4 else x
    affine = np.asarray(record["original_affine"], np.float64)
    shape = tuple(record["original_shape"])
    low, high = record["intensity_range"]
    to_prepared = np.linalg.solve(np.asarray(record["affine"], np.float64), affine)
    on_source = (move_voxels if is_exact(to_prepared, shape) else interpolate_onto)(x, to_prepared, shape)
    return (on_source + 1) * np.float32((high - low) / 2) + np.float32(low), affine


def is_exact(to_prepared: np.ndarray, shape: Sequence[int]) -> bool:
    """Whether voxels of the source are voxels of the prepared grid, turned and shifted, to a hundredth at the
    far corner. A voxel that spans two or more of the prepared ones is none of them.
    """
    nearest = np.rint(to_prepared)
    turns = np.array_equal(np.abs(nearest[:3, :3]).sum(0), [1, 1, 1])
    return turns and bool(np.abs((to_prepared - nearest) @ [*shape, 1]).max() < 1e-2)


def move_voxels(x: np.ndarray, to_prepared: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Turn, mirror and shift `x` by whole voxels into an array of `shape`; -1 elsewhere."""
    matrix = np.rint(to_prepared).astype(int)
    order = [int(np.flatnonzero(matrix[:3, j])[0]) for j in range(3)]  # prepared axis of each raw axis
    signs = [int(matrix[order[j], j]) for j in range(3)]
    x = x.transpose(order)
    out = np.full(shape, -1, np.float32)
    source, target = [], []
    for j, (sign, shift) in enumerate(zip(signs, matrix[order, 3], strict=True)):
        start = -shift if sign > 0 else shift - x.shape[j] + 1  # raw index of the first voxel
        first, last = max(start, 0), min(start + x.shape[j], shape[j])
        target.append(slice(first, max(first, last)))
        source.append(slice(first - start, max(first, last) - start))
    flipped = np.flip(x, [j for j in range(3) if signs[j] < 0])
    out[tuple(target)] = flipped[tuple(source)]
    return out


def interpolate_onto(x: np.ndarray, to_prepared: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`x` at the voxels of the source, linearly; -1 beyond the outer faces of its voxels."""
    matrix, offset = to_prepared[:3, :3], to_prepared[:3, 3]
    values = ndimage.affine_transform(x, matrix, offset, shape, order=1, mode="nearest")
    ones = np.ones(x.shape, np.uint8)
    inside = ndimage.affine_transform(ones, matrix, offset, shape, order=0, mode="grid-constant")
    return np.where(inside > 0, values, np.float32(-1))
