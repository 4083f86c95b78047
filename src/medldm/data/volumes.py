"""The deterministic part of 3D preparation: MONAI's dictionary transforms, and what puts a result back."""

from collections.abc import Sequence
from typing import NamedTuple

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
    Transform,
)

from medldm.data.transforms import FILL, Intensity, to_unit

BACKGROUND = -0.99  # an image in [-1, 1] is empty up to here


class Volume(NamedTuple):
    """A prepared 3D case: arrays on the common grid and what is needed to put results back."""

    image: np.ndarray  # (1, D, H, W) float32 in [-1, 1], axes in the order of `orientation`
    mask: np.ndarray | None  # (1, D, H, W) integer
    affine: np.ndarray  # 4x4 of the prepared grid
    spacing: tuple[float, ...]
    intensity_range: tuple[float, float]
    box: tuple[list[int], list[int]]  # start (negative: padding) and end in the oriented, resampled volume


def prepare_volume(
    image: np.ndarray,
    mask: np.ndarray | None,
    affine: np.ndarray,
    *,
    orientation: str,
    spacing: Sequence[float] | None,
    crop_foreground: bool,
    image_size: Sequence[int] | None,
    divisible_by: int,
    intensity: Intensity,
) -> Volume:
    """Orient, resample, scale, crop to the foreground and pad one raw volume (X, Y, Z).

    Intensity limits come from the raw volume, before resampling. `image_size` crops or pads about the centre;
    without it the axes are padded to a multiple of `divisible_by`. Masks are resampled to the nearest class.
    """
    low, high = intensity.volume_range(image)
    arrays = {"image": to_unit(image, low, high)} | ({} if mask is None else {"mask": mask})
    item = {
        key: MetaTensor(torch.from_numpy(np.asarray(x, np.float32))[None], affine=torch.from_numpy(affine))
        for key, x in arrays.items()
    }
    resampled = Compose(to_grid(list(item), orientation, spacing))(item)
    grid_affine = resampled["image"].affine.numpy().copy()
    item = Compose(to_box(list(item), crop_foreground, image_size, divisible_by))(resampled)
    final_affine = item["image"].affine.numpy().astype(np.float64)
    offset = np.linalg.solve(grid_affine[:3, :3], final_affine[:3, 3] - grid_affine[:3, 3])
    start = np.rint(offset).astype(int)
    return Volume(
        np.clip(item["image"].as_tensor().numpy(), -1, 1),
        None if mask is None else item["mask"].as_tensor().numpy().astype(mask.dtype),
        final_affine,
        tuple(np.linalg.norm(final_affine[:3, :3], axis=0).tolist()),
        (low, high),
        (start.tolist(), (start + item["image"].shape[1:]).tolist()),
    )


def to_grid(keys: list[str], orientation: str, spacing: Sequence[float] | None) -> list[Transform]:
    """Axes along `orientation`, voxels of `spacing` mm: linear for images, nearest for classes."""
    turn = Orientationd(keys, axcodes=orientation, labels=None)
    if spacing is None:
        return [turn]
    modes = ["nearest" if key == "mask" else "bilinear" for key in keys]
    return [turn, Spacingd(keys, pixdim=tuple(spacing), mode=modes, padding_mode="border")]


def to_box(
    keys: list[str], crop_foreground: bool, image_size: Sequence[int] | None, divisible_by: int
) -> list[Transform]:
    """Cut the empty border, then crop or pad about the centre."""
    steps: list[Transform] = []
    if crop_foreground:
        steps.append(
            CropForegroundd(keys, source_key="image", select_fn=lambda x: x > BACKGROUND, allow_smaller=True)
        )
    for key in keys:
        if image_size is not None:
            steps.append(ResizeWithPadOrCropd([key], spatial_size=tuple(image_size), value=FILL[key]))
        elif divisible_by > 1:
            steps.append(DivisiblePadd([key], k=divisible_by, value=FILL[key]))
    return steps
