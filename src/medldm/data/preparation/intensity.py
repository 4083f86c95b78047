"""Which raw values become -1 and 1, and what is cleaned before. NumPy and SciPy, without torch."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medldm.errors import InputError

INTENSITY_MODES = ("volume_percentile", "slice_minmax", "window", "bit_depth")
BIT_DEPTHS = (8, 10, 12, 14, 16)
INVERSIONS = ("declared", "auto", "none")


@dataclass(frozen=True)
class Intensity:
    """Which raw values become -1 and 1.

    volume_percentile: the 0.5 and 99.5 percentiles of the whole volume; slice_minmax: extremes of each
    resized slice (the published system; sensitive to outliers); window: fixed values, such as HU of CT;
    bit_depth: 0 and the largest number of 8, 10, 12, 14 or 16 bits, the fewest that hold the picture
    (radiographs: 8-bit pictures become value / 255, and 12 bits in a 16-bit file do not turn out dark).
    """

    mode: str = "volume_percentile"
    percentiles: tuple[float, float] = (0.5, 99.5)
    window: tuple[float, float] | None = None
    region: str = "volume"  # 3D: volume, or box: what is left after cropping and padding, as ALDM has it
    clip: bool = True  # 3D: false keeps values beyond the limits, outside [-1, 1]

    def __post_init__(self) -> None:
        if self.region not in ("volume", "box"):
            raise InputError(f"data.preprocess.intensity.region={self.region}: choose from volume, box")
        if self.mode not in INTENSITY_MODES:
            raise InputError(
                f"data.preprocess.intensity.mode={self.mode}: choose from {', '.join(INTENSITY_MODES)}"
            )
        if self.mode == "window" and (self.window is None or not self.window[0] < self.window[1]):
            raise InputError(
                f"data.preprocess.intensity.window={self.window}: give [low, high], for instance [-1000, "
                "1000]"
            )
        low, high = self.percentiles
        if not 0 <= low < high <= 100:
            raise InputError(
                f"data.preprocess.intensity.percentiles={list(self.percentiles)}: give 0 <= low < high <= 100"
            )

    def volume_range(self, volume: np.ndarray) -> tuple[float, float]:
        """(low, high) of a raw volume; slice_minmax decides per slice instead."""
        if self.mode == "window":
            return float(self.window[0]), float(self.window[1])
        if self.mode == "slice_minmax":
            return float(volume.min()), float(volume.max())
        if self.mode == "bit_depth":
            return 0.0, full_scale(volume)
        low, high = np.percentile(volume, self.percentiles)
        if low == high:  # nearly empty volume: the percentiles fall on the background
            low, high = volume.min(), volume.max()
        return float(low), float(high)


def full_scale(x: np.ndarray) -> float:
    """The largest value that the bit depth of a picture could hold."""
    if x.min() < 0 or x.max() >= 2 ** BIT_DEPTHS[-1]:
        raise InputError(
            f"data.preprocess.intensity.mode=bit_depth: values from {x.min():g} to {x.max():g} are no "
            "picture of up to 16 bits; choose volume_percentile, or window"
        )
    return float(next(2**bits - 1 for bits in BIT_DEPTHS if x.max() < 2**bits))


def looks_inverted(x: np.ndarray) -> bool:
    """Whether a chest X-ray (H, W) seems to show air bright: its upper corners, which are air, against its
    middle.

    Median of the two upper corners (a tenth of each side) above that of the central column, where spine and
    heart are.
    """
    height, width = x.shape
    h, w = max(1, height // 10), max(1, width // 10)
    corners = np.concatenate([x[:h, :w].ravel(), x[:h, -w:].ravel()])
    middle = x[height // 4 : 3 * height // 4, 9 * width // 20 : 11 * width // 20]
    return bool(np.median(corners) > np.median(middle))


def scale_to_unit(x: np.ndarray, low: float, high: float, clip: bool = True) -> np.ndarray:
    """Map [low, high] to [-1, 1], float32, and clip there. A constant image becomes -1, the background."""
    if not high > low:
        return np.full(x.shape, -1, np.float32)
    x = (x.astype(np.float32) - low) * (2 / (high - low)) - 1
    return np.clip(x, -1, 1) if clip else x


def remove_artifacts(
    x: np.ndarray, spacing: Sequence[float], sigma: float = 7.0, threshold: float = -800.0
) -> np.ndarray:
    """CT (X, Y, Z) in HU with its least value outside the patient: table, clothes and tubes vanish.

    The patient is the largest connected part where the volume, smoothed by a Gaussian of `sigma` mm, exceeds
    `threshold`: the published recipe of Med-LSDM for AutoPET.
    """
    from scipy import ndimage

    labels, count = ndimage.label(
        ndimage.gaussian_filter(x.astype(np.float32), [sigma / s for s in spacing]) > threshold
    )
    if count == 0:
        return x
    largest = 1 + int(np.argmax(np.bincount(labels.ravel())[1:]))
    return np.where(labels == largest, x, x.min())
