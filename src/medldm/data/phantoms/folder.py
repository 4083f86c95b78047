"""Draws torsos in HU with a class map, in the layout `images/` and `masks/` of `data=folder`."""

from pathlib import Path

import numpy as np
from scipy import ndimage

from medldm.data.phantoms.files import Progress, check_picture_request, save_nifti


def write_folder(
    root: str | Path, *, num_subjects: int, seed: int = 0, image_size: int = 64,
    num_slices: tuple[int, int] = (40, 56), progress: Progress = lambda: None,
) -> Path:  # fmt: skip
    """Writes 3D torsos in HU with `images/` and `masks/` (1 lung, 2 liver, 3 heart, 4 spine). Returns the
    root.

    There are at most `num_slices` axial slices. Their size in pixels varies a little about `image_size`, and
    the spacing varies, too.
    """
    root = Path(root)
    check_picture_request(num_subjects, image_size)
    for number in range(1, num_subjects + 1):
        generator = np.random.default_rng((seed, number))
        image, mask, spacing = torso(generator, image_size, tuple(num_slices))
        affine = np.diag([-spacing[0], -spacing[1], spacing[2], 1.0])
        name = f"subject_{number:03d}.nii.gz"
        save_nifti(root / "images" / name, image, spacing, affine)
        save_nifti(root / "masks" / name, mask, spacing, affine)
        progress()
    return root


def torso(
    g: np.random.Generator, image_size: int, num_slices: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Draws (X, Y, Z) int16 in HU, its class map uint8, and the spacing in mm."""
    width = round(image_size * g.uniform(0.92, 1.08))
    shape = (width, round(width * g.uniform(0.8, 0.95)), int(g.integers(num_slices[0], num_slices[1] + 1)))
    spacing = (380 / width, 380 / width, 320 / shape[2])
    x, y, z = np.meshgrid(
        *((np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, spacing, strict=True)),
        indexing="ij",
        sparse=True,
    )
    hu, mask = np.full(shape, -1000.0, np.float32), np.zeros(shape, np.uint8)

    def organ(
        center: tuple, radii: tuple, value: float, label: int | None = None, within: np.ndarray | None = None
    ) -> np.ndarray:
        """Paints an ellipsoid in mm, whose sizes vary by a few per cent, where `within` is true."""
        centers, sizes = np.array(center) + g.normal(0, 3, 3), np.array(radii) * g.uniform(0.92, 1.08, 3)
        r = sum(((axis - c) / s) ** 2 for axis, c, s in zip((x, y, z), centers, sizes, strict=True))
        inside = r < 1 if within is None else (r < 1) & within
        hu[inside] = value * g.uniform(0.95, 1.05)
        if label is not None:
            mask[inside] = label
        return inside

    body = organ((0, 0, 0), (165, 118, 400), -95)
    muscle = organ((0, 0, 0), (148, 102, 390), 55, within=body)
    for side in (-1, 1):
        organ((side * 68, -5, 45), (52, 76, 110), -820, 1, muscle)
    organ((-52, -2, -85), (80, 74, 62), 105, 2, muscle)
    organ((22, -32, 20), (45, 38, 46), 160, 3, muscle)
    organ((0, 74, 0), (21, 19, 400), 420, 4, muscle)
    hu = ndimage.gaussian_filter(hu, 0.5) + g.normal(0, 12, shape).astype(np.float32)
    return np.rint(hu).astype(np.int16), mask, spacing
