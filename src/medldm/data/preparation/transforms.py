"""From raw arrays to the prepared grid and range, and the random crops and flips of training.

NumPy, OpenCV and SciPy, without torch, so that `prepare` workers of 2D data start at once. Volumes are in
volumes.py.
"""

import logging
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medldm.errors import InputError

log = logging.getLogger(__name__)
RESIZE_MODES = ("stretch", "pad_square", "spacing_crop")
INTENSITY_MODES = ("volume_percentile", "slice_minmax", "window", "bit_depth")
BIT_DEPTHS = (8, 10, 12, 14, 16)
NUM_CLASSES = 2**16  # that a stored map can number
INVERSIONS = ("declared", "auto", "none")


@dataclass(frozen=True)
class Resize:
    """Where the pixels of a slice land on the (H, W) grid.

    stretch: fill the grid, aspect ratio not kept (the published system). pad_square: keep the aspect ratio in
    mm and pad. spacing_crop: resample to `spacing` mm, then crop or pad about the centre. `antialias`
    averages when shrinking; without it image and class map go through SciPy's splines (cubic, nearest), as in
    the author's code. `clip_overshoot` keeps the cubic kernel within the input's range.
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


def to_unit(x: np.ndarray, low: float, high: float, clip: bool = True) -> np.ndarray:
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


def exact(x: np.ndarray, dtype: type | str, what: str) -> np.ndarray:
    """`x` as `dtype`, every value kept. InputError that names `what` where one would change."""
    x = np.asarray(x)
    with np.errstate(invalid="ignore", over="ignore"):
        cast = x.astype(dtype)
    if not np.array_equal(cast, x):
        limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else np.finfo(dtype)
        raise InputError(
            f"{what}: values from {x.min():g} to {x.max():g} do not fit {np.dtype(dtype)} "
            f"({limits.min:g} to {limits.max:g})"
        )
    return cast


def within(x: np.ndarray, dtype: type | str, what: str) -> np.ndarray:
    """`x` rounded to the floating `dtype`. InputError that names `what` where values leave its range."""
    limit = float(np.finfo(dtype).max)
    if x.size and float(np.abs(x).max()) > limit:
        raise InputError(f"{what}: values up to {np.abs(x).max():g} do not fit {np.dtype(dtype)} ({limit:g})")
    return x.astype(dtype)


def as_classes(x: np.ndarray, what: str) -> np.ndarray:
    """Class numbers in the smallest of uint8 and uint16 that holds them. InputError where neither does."""
    return exact(x, np.uint8 if x.size == 0 or x.max() < 256 else np.uint16, what)


def axial_axis(orientation: str) -> int:
    """Which axis of a volume in this orientation runs along the body."""
    return next(i for i, letter in enumerate(orientation) if letter in "SI")


def finite(x: np.ndarray, path: str | Path) -> np.ndarray:
    """float32 with NaN, infinity and what float32 cannot hold replaced by the least finite value, and a
    warning that counts them.
    """
    with np.errstate(over="ignore"):  # counted below
        x = np.asarray(x, np.float32)
    good = np.isfinite(x)
    if good.all():
        return x
    if not good.any():
        raise InputError(f"{path}: holds no finite value; remove its case")
    log.warning(
        "%s: %d values are not finite in float32; they become %g",
        *(path, x.size - int(good.sum()), x[good].min()),
    )
    return np.where(good, x, x[good].min())


@dataclass(frozen=True)
class Labels:
    """Known classes: `names[i]` belongs to class i; `mapping` sends raw label values to classes."""

    names: tuple[str, ...] | None = None
    mapping: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        for value in (self.mapping or {}).values():
            if value not in range(NUM_CLASSES):
                raise InputError(
                    f"data.preprocess.labels.mapping: {value} is no class; give whole numbers from 0 to "
                    f"{NUM_CLASSES - 1}"
                )

    def __call__(self, mask: np.ndarray, path: str | Path) -> np.ndarray:
        """Raw labels -> uint8 or uint16 classes; InputError on a value that is negative, fractional, not
        finite or unknown.
        """
        if not np.issubdtype(mask.dtype, np.integer):
            if not np.isfinite(mask).all():
                raise InputError(
                    f"{path}: the mask holds {np.size(mask) - int(np.isfinite(mask).sum())} values that are "
                    "no numbers (NaN); write the background's class there"
                )
            if np.abs(mask - np.rint(mask)).max() > 1e-3:
                raise InputError(
                    f"{path}: a mask must hold whole class numbers; resample it by nearest neighbour"
                )
        rounded = np.rint(mask)
        values = np.unique(rounded).astype(np.int64)
        if self.mapping is not None:
            return self.remap(rounded, values, path)
        known = range(len(self.names)) if self.names is not None else range(NUM_CLASSES)
        self.reject(values, known, path, f"0..{len(known) - 1}")
        return as_classes(rounded, path)

    def remap(self, mask: np.ndarray, values: np.ndarray, path: str | Path) -> np.ndarray:
        self.reject(values, self.mapping, path, str(sorted(self.mapping)))
        out = np.zeros(mask.shape, np.uint8 if max(self.mapping.values()) < 256 else np.uint16)
        for value in values.tolist():
            out[mask == value] = self.mapping[value]
        return out

    def reject(self, values: np.ndarray, known: Container[int], path: str | Path, which: str) -> None:
        """InputError where a mask holds values beyond the known, with an override that takes it: what is
        unknown becomes the class of its number, where there is one, else background.
        """
        unknown = [value for value in values.tolist() if value not in known]
        if unknown:
            names = self.names or ("background",)
            new = {value: value if 0 <= value < len(names) else 0 for value in unknown}
            kept = {} if self.mapping is not None else {v: v for v in values.tolist() if v in known}
            meaning = ", ".join(f"{value} is {names[number]}" for value, number in list(new.items())[:3])
            raise InputError(
                f"{path}: the mask holds label {', '.join(map(str, unknown[:5]))}, known are {which}; "
                f"correct the mask, or map it: {mapping_override(kept | new)} (so {meaning})"
            )


def mapping_override(mapping: Mapping[int, int]) -> str:
    """The override that adds to `data.preprocess.labels.mapping`, as a shell takes it."""
    pairs = ", ".join(f"{value}: {number}" for value, number in sorted(mapping.items()))
    return f"+data.preprocess.labels.mapping='{{{pairs}}}'"


def renumber(mask: np.ndarray, relabel: Mapping[int, int]) -> np.ndarray:
    """A mask in another release's numbers; values that `relabel` does not name stay."""
    out = mask.copy()
    for value, number in relabel.items():
        out[mask == value] = number
    return out


LATENTS = ("latent", "source_latent")
SPATIAL = ("image", "source", "mask", "edges", "edges_levels")  # what is cropped and flipped together


def crop_item(item: dict, start: Sequence[int], size: Sequence[int], factors: Sequence[int]) -> dict:
    """Cut the same box out of every (C, *S) array: views, so that of a mapped file the box alone is read.

    Latents are cut in their own cells; `start` and `size` are multiples of their `factors`.
    """

    def box(scale: Sequence[int]) -> tuple[slice, ...]:
        return (
            slice(None),
            *(slice(a // f, (a + n) // f) for a, n, f in zip(start, size, scale, strict=True)),
        )

    voxels = box([1] * len(size))
    return {
        key: x[voxels] if key in SPATIAL else x[box(factors)] if key in LATENTS else x
        for key, x in item.items()
    }


def spatial_shape(item: dict, cell: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(voxels of an item, voxels of a latent cell) along each axis; a cell is 1 where an item has no latents.

    Where an item holds latents alone, `cell` tells what they stand for.
    """
    grid = next((item[key].shape[1:] for key in LATENTS if key in item), None)
    shape = next((item[key].shape[1:] for key in SPATIAL if key in item), None)
    if shape is not None:
        return shape, tuple(n // m for n, m in zip(shape, grid or shape, strict=True))
    if cell is None:
        raise InputError("data.crop_size: these latents do not tell their voxels; run `medldm encode` again")
    return tuple(n * f for n, f in zip(grid, cell, strict=True)), tuple(cell)


def box_sizes(
    item: dict, size: Sequence[int | None], cell: Sequence[int] | None
) -> list[tuple[int, int, int]]:
    """(voxels, those of the box, those of a latent cell) of each axis; None in `size` is the whole axis."""
    shape, factors = spatial_shape(item, cell)
    filled = [m if n is None else n for n, m in zip(size, shape, strict=True)]
    if any(n % f for n, f in zip(filled, factors, strict=True)):
        raise InputError(f"data.crop_size={filled}: cached latents need multiples of {list(factors)}")
    return list(zip(shape, filled, factors, strict=True))


@dataclass(frozen=True)
class RandomCrop:
    """A box of `size` anywhere inside the (C, *S) arrays of an item, the same for all; None: the whole
    axis. `cell`: voxels of a latent cell along each axis, for items of latents alone.
    """

    size: tuple[int | None, ...]
    cell: tuple[int, ...] | None = None

    def __call__(self, item: dict, generator: np.random.Generator) -> dict:
        grid = box_sizes(item, self.size, self.cell)
        start = [f * int(generator.integers((n - m) // f + 1)) for n, m, f in grid]
        return crop_item(item, start, [m for _, m, _ in grid], [f for *_, f in grid])


@dataclass(frozen=True)
class CenterCrop:
    """The central box of `size`."""

    size: tuple[int | None, ...]
    cell: tuple[int, ...] | None = None

    def __call__(self, item: dict, generator: np.random.Generator | None = None) -> dict:
        grid = box_sizes(item, self.size, self.cell)
        start = [(n - m) // 2 // f * f for n, m, f in grid]
        return crop_item(item, start, [m for _, m, _ in grid], [f for *_, f in grid])


@dataclass(frozen=True)
class RandomFlip:
    """Mirror the spatial `axes` (0 = first of *S), each with probability `prob`."""

    axes: tuple[int, ...]
    prob: float = 0.5

    def __call__(self, item: dict, generator: np.random.Generator) -> dict:
        flipped = tuple(axis + 1 for axis in self.axes if generator.random() < self.prob)
        if not flipped:
            return item
        return {key: np.flip(x, flipped) if key in SPATIAL else x for key, x in item.items()}
