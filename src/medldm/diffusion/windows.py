"""Denoises volumes larger than the training windows in overlapping windows, which are blended at every step.

Bar-Tal et al. 2023 (MultiDiffusion), with weights that fall off towards the border of a window, so that there
are no seams. The condition of a window is made from its part of the edges and the class map, so that memory
does not grow with the volume.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from medldm.batch import spatial_shape
from medldm.diffusion.condition import Condition
from medldm.diffusion.objective import Denoise
from medldm.diffusion.static import Given
from medldm.errors import InputError

Box = tuple[slice, ...]  # cells of the latent grid
ConditionOf = Callable[[Box], Condition]  # the condition of any window
WINDOWS_KEPT = 16


def window_starts(length: int, size: int, overlap: int) -> list[int]:
    """Evenly spread starts of windows of `size` that cover `length`. Neighbours share at least `overlap`."""
    if size >= length:
        return [0]
    count = math.ceil((length - overlap) / (size - overlap))
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


class Windows:
    """`size` is a number of cells of the latent grid for each axis, None for a whole axis. `overlap` is the
    share of a window that its neighbour covers too, in [0, 1). What the network computes from the condition
    of a window alone stays in memory for the first `keep` windows; for all others it is made again at every
    step.
    """

    def __init__(self, size: Sequence[int | None], overlap: float = 0.5, keep: int = WINDOWS_KEPT) -> None:
        if not 0 <= overlap < 1:
            raise ValueError(f"overlap={overlap} must lie in [0, 1)")
        if any(n is not None and n < 1 for n in size):
            raise ValueError(f"size={list(size)} cells of the latent grid: give at least one cell an axis")
        if keep < 0:
            raise ValueError(f"keep={keep}: give the number of windows whose condition is kept")
        self.size, self.overlap, self.keep = tuple(size), overlap, keep

    @classmethod
    def of_image(
        cls, size: Sequence[int | None], downsampling: Sequence[int], overlap: float, keep: int = WINDOWS_KEPT
    ) -> "Windows":
        """Windows of a `size` in voxels of the image. ValueError where it does not divide by the factors."""
        if len(size) != len(downsampling):
            raise ValueError(f"size={list(size)}: give {len(downsampling)} numbers, null for a whole axis")
        for n, factor in zip(size, downsampling, strict=True):
            if n is not None and n % factor:
                raise ValueError(
                    f"size={list(size)} does not divide by the first stage's factors {tuple(downsampling)}"
                )
        cells = [None if n is None else n // factor for n, factor in zip(size, downsampling, strict=True)]
        return cls(cells, overlap, keep)

    def boxes(self, shape: Sequence[int]) -> list[Box]:
        axes = []
        for n, size in zip(shape, self.size, strict=True):
            size = n if size is None else min(n, size)
            overlap = min(size - 1, round(size * self.overlap))
            axes.append([slice(a, a + size) for a in window_starts(n, size, overlap)])
        return list(itertools.product(*axes))

    def weight(self, box: Box, shape: Sequence[int]) -> Tensor:
        """Positive weights of the cells of a window: 1 inside, and falling over the overlap towards its
        neighbours.
        """
        total = torch.ones(())
        for axis, (part, n) in enumerate(zip(box, shape, strict=True)):
            size = part.stop - part.start
            ramp = max(1, round(size * self.overlap))
            place = torch.arange(size, dtype=torch.float32) + 0.5
            rise = (place / ramp).clamp(max=1) if part.start > 0 else torch.ones(size)
            fall = ((size - place) / ramp).clamp(max=1) if part.stop < n else torch.ones(size)
            total = total * (rise * fall).reshape(-1, *[1] * (len(shape) - 1 - axis))
        return total


def part_over(x: Tensor, box: Box, shape: Sequence[int]) -> Tensor:
    """The part of x (B, C, *S) over a window of latents of `shape`. InputError where S is no multiple of
    `shape`.
    """
    if any(size % n for size, n in zip(spatial_shape(x), shape, strict=True)):
        raise InputError(
            f"a condition of {spatial_shape(x)} cannot be cut into windows of latents of {tuple(shape)}"
        )
    factors = [size // n for size, n in zip(spatial_shape(x), shape, strict=True)]
    slices = [slice(s.start * f, s.stop * f) for s, f in zip(box, factors, strict=True)]
    return x[(..., *slices)].contiguous()


def cut_condition(condition: Condition, box: Box, shape: Sequence[int]) -> Condition:
    """The part of a condition over a window. A map may be on a finer grid than the latents."""
    maps = {"concat": condition.concat, "spade": condition.spade, "hint": condition.hint}
    return condition._replace(**{key: part_over(x, box, shape) for key, x in maps.items() if x is not None})


def with_halo(box: Box, halo: int, shape: Sequence[int]) -> Box:
    """`box` with `halo` more cells on every side, as far as `shape` reaches."""
    return tuple(
        slice(max(0, s.start - halo), min(n, s.stop + halo)) for s, n in zip(box, shape, strict=True)
    )


class WindowConditions:
    """The condition of any window of latents of `shape`, under which a part of a batch is enough.

    build: makes a condition from a batch. keys: the arrays (B, C, *S) of the batch that it reads. halo: the
    number of cells around a window that its condition depends on; so many are added to the part that is read,
    and cut off again. None says that every cell depends on the whole volume, as after a group norm: the
    condition is then made once, from the whole, and kept.
    """

    def __init__(
        self,
        build: Callable[[dict], Condition],
        batch: dict,
        keys: Sequence[str],
        shape: Sequence[int],
        halo: int | None,
    ) -> None:
        self.build, self.batch, self.keys, self.shape, self.halo = build, batch, keys, tuple(shape), halo
        self.kept: Condition | None = None

    @property
    def whole(self) -> Condition:
        if self.halo is not None:
            return self.build(self.batch)
        if self.kept is None:
            self.kept = self.build(self.batch)
        return self.kept

    def __call__(self, box: Box) -> Condition:
        if all((s.start, s.stop) == (0, n) for s, n in zip(box, self.shape, strict=True)):
            return self.whole
        if self.halo is None:
            return cut_condition(self.whole, box, self.shape)
        wide = with_halo(box, self.halo, self.shape)
        parts = {key: part_over(self.batch[key], wide, self.shape) for key in self.keys if key in self.batch}
        inner = tuple(slice(s.start - w.start, s.stop - w.start) for s, w in zip(box, wide, strict=True))
        condition = self.build(self.batch | parts)
        return cut_condition(condition, inner, tuple(w.stop - w.start for w in wide))


def windowed(
    build: Callable[[Given, Given], Denoise],
    condition: ConditionOf,
    null: ConditionOf,
    shape: Sequence[int],
    windows: Windows,
) -> Denoise:
    """A denoiser of latents of `shape`. `build` makes the denoiser of a window from two functions, one that
    makes its condition and one that makes the null of guidance.
    """

    def denoiser_of(box: Box) -> Denoise:
        return build(partial(condition, box), partial(null, box))

    boxes = windows.boxes(shape)
    if len(boxes) == 1:
        return denoiser_of(boxes[0])
    weights = [windows.weight(box, shape) for box in boxes]
    total = torch.zeros(tuple(shape))
    for box, weight in zip(boxes, weights, strict=True):
        total[box] += weight
    kept = [denoiser_of(box) for box in boxes[: windows.keep]]

    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        blended = torch.zeros_like(z_t)
        for k, (box, weight) in enumerate(zip(boxes, weights, strict=True)):
            part = kept[k] if k < len(kept) else denoiser_of(box)
            blended[(..., *box)] += part(z_t[(..., *box)].contiguous(), t) * weight.to(z_t)
            del part  # freed before that of the next window is made
        return blended / total.to(z_t)

    return denoise
