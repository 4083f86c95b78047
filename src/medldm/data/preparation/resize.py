"""Where the pixels of a slice land on the prepared grid. NumPy, OpenCV and SciPy, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medldm.errors import InputError

RESIZE_MODES = ("stretch", "pad_square", "spacing_crop")


@dataclass(frozen=True)
class Resize:
    """Where the pixels of a slice land on the (H, W) grid.

    stretch: fill the grid, aspect ratio not kept (the published system). pad_square: keep the aspect ratio in
    mm and pad. spacing_crop: resample to `spacing` mm, then crop or pad about the centre. `antialias`
    averages when shrinking; without it image and class map go through SciPy's splines (cubic, nearest), as in
    the published code. `clip_overshoot` keeps the cubic kernel within the input's range.
    """

    mode: str = "stretch"
    spacing: float = 1.0
    antialias: bool = True
    clip_overshoot: bool = True

    def __post_init__(self) -> None:
        if self.mode not in RESIZE_MODES:
            raise InputError(
                f"data.preprocess.resize.mode={self.mode}: choose from {', '.join(RESIZE_MODES)}"
            )
        if self.spacing <= 0:
            raise InputError(f"data.preprocess.resize.spacing={self.spacing}: give millimetres above 0")

    def content_size(
        self, shape: Sequence[int], spacing: Sequence[float], size: Sequence[int]
    ) -> tuple[int, int]:
        """(H, W) of the whole resampled slice, before cropping or padding to `size`."""
        if self.mode == "stretch":
            return size[0], size[1]
        extent = [n * s for n, s in zip(shape, spacing, strict=True)]  # mm
        scale = 1 / self.spacing
        if self.mode == "pad_square":
            scale = min(n / e for n, e in zip(size, extent, strict=True))
        return max(1, round(extent[0] * scale)), max(1, round(extent[1] * scale))

    def image(self, x: np.ndarray, spacing: Sequence[float], size: Sequence[int], fill: float) -> np.ndarray:
        """Resize (H, W) float32 to `size`."""
        content = self.content_size(x.shape, spacing, size)
        resized = resize_image(x, content, self.antialias)
        if self.clip_overshoot:
            resized = np.clip(resized, x.min(), x.max())
        return center_fit(resized, size, fill)

    def label(self, x: np.ndarray, spacing: Sequence[float], size: Sequence[int]) -> np.ndarray:
        """Resize an integer (H, W) class map to `size` by the nearest pixel."""
        import cv2

        content = self.content_size(x.shape, spacing, size)
        if self.antialias:
            resized = cv2.resize(x, content[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
        else:
            resized = zoomed(x, content, order=0)
        return center_fit(resized, size, 0)

    def spacing_after(
        self, shape: Sequence[int], spacing: Sequence[float], size: Sequence[int]
    ) -> tuple[float, float]:
        content = self.content_size(shape, spacing, size)
        return spacing[0] * shape[0] / content[0], spacing[1] * shape[1] / content[1]


def resize_image(x: np.ndarray, size: Sequence[int], antialias: bool) -> np.ndarray:
    """Cubic where an axis grows, area average where it shrinks (one axis at a time when they differ)."""
    import cv2

    if tuple(x.shape) == tuple(size):
        return x
    if not antialias:
        return zoomed(x, size, order=3)
    shrunk = (min(size[0], x.shape[0]), min(size[1], x.shape[1]))
    if shrunk != x.shape:
        x = cv2.resize(x, shrunk[::-1], interpolation=cv2.INTER_AREA)
    return x if shrunk == tuple(size) else cv2.resize(x, (size[1], size[0]), interpolation=cv2.INTER_CUBIC)


def zoomed(x: np.ndarray, size: Sequence[int], order: int) -> np.ndarray:
    """SciPy's spline from corner pixel to corner pixel."""
    from scipy import ndimage

    return ndimage.zoom(x, [m / n for m, n in zip(size, x.shape, strict=True)], order=order)


def center_fit(x: np.ndarray, size: Sequence[int], fill: float) -> np.ndarray:
    """Crop or pad the axes of `x` about their centres to `size`."""
    out = np.full(size, fill, x.dtype)
    source, target = [], []
    for n, m in zip(x.shape, size, strict=True):
        kept = min(n, m)
        source.append(slice((n - kept) // 2, (n - kept) // 2 + kept))
        target.append(slice((m - kept) // 2, (m - kept) // 2 + kept))
    out[tuple(target)] = x[tuple(source)]
    return out
