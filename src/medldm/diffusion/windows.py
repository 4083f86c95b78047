"""Denoising of volumes larger than the training windows: overlapping windows, blended at every step.

Bar-Tal et al. 2023 (MultiDiffusion), with weights that fall off towards the border of a window, so that no
seam is left.
"""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from medldm.diffusion.conditioner import Condition
from medldm.diffusion.objective import Denoise
from medldm.errors import InputError

Box = tuple[slice, ...]


def window_starts(length: int, size: int, overlap: int) -> list[int]:
    """Evenly spread starts of windows of `size` that cover `length`; neighbours share at least `overlap`."""
    if size >= length:
        return [0]
    count = math.ceil((length - overlap) / (size - overlap))
    return [round(i * (length - size) / (count - 1)) for i in range(count)]


class Windows:
    """`size` is a number of cells of the latent grid for each axis, None for a whole axis. `overlap` is the
    share of a window that its neighbour covers too, in [0, 1).
    """

    def __init__(self, size: Sequence[int | None], overlap: float = 0.5) -> None:
        if not 0 <= overlap < 1:
            raise InputError(f"windows.overlap={overlap} must lie in [0, 1)")
        if any(n is not None and n < 1 for n in size):
            raise InputError(
                f"windows.size: {list(size)} cells of the latent grid; give at least one cell an axis"
            )
        self.size, self.overlap = tuple(size), overlap

    @classmethod
    def of_image(cls, size: Sequence[int | None], downsampling: Sequence[int], overlap: float) -> "Windows":
        """Windows of a size in voxels of the image. InputError where it does not divide by the factors."""
        if len(size) != len(downsampling):
            raise InputError(
                f"windows.size={list(size)}: give {len(downsampling)} numbers, null for a whole axis"
            )
        for n, factor in zip(size, downsampling, strict=True):
            if n is not None and n % factor:
                raise InputError(
                    f"windows.size={list(size)} does not divide by the first stage's factors "
                    f"{tuple(downsampling)}"
                )
        cells = [None if n is None else n // factor for n, factor in zip(size, downsampling, strict=True)]
        return cls(cells, overlap)

    def boxes(self, shape: Sequence[int]) -> list[Box]:
        axes = []
        for n, size in zip(shape, self.size, strict=True):
            size = n if size is None else min(n, size)
            overlap = min(size - 1, round(size * self.overlap))
            axes.append([slice(a, a + size) for a in window_starts(n, size, overlap)])
        return list(itertools.product(*axes))

    def weight(self, box: Box, shape: Sequence[int]) -> Tensor:
        """Positive weights of a window's cells: 1 inside, falling over the overlap to its inner borders."""
        total = torch.ones(())
        for axis, (part, n) in enumerate(zip(box, shape, strict=True)):
            size = part.stop - part.start
            ramp = max(1, round(size * self.overlap))
            place = torch.arange(size, dtype=torch.float32) + 0.5
            rise = (place / ramp).clamp(max=1) if part.start > 0 else torch.ones(size)
            fall = ((size - place) / ramp).clamp(max=1) if part.stop < n else torch.ones(size)
            total = total * (rise * fall).reshape(-1, *[1] * (len(shape) - 1 - axis))
        return total


def cut_condition(condition: Condition, box: Box, shape: Sequence[int]) -> Condition:
    """The part of a condition that belongs to a window; a map may lie on a finer grid than the latents."""

    def part(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        factors = [size // n for size, n in zip(x.shape[2:], shape, strict=True)]
        slices = [slice(s.start * f, s.stop * f) for s, f in zip(box, factors, strict=True)]
        return x[(..., *slices)].contiguous()

    return condition._replace(concat=part(condition.concat), spade=part(condition.spade))


def windowed(
    build: Callable[[Condition, Condition], Denoise],
    condition: Condition,
    null: Condition,
    shape: Sequence[int],
    windows: Windows,
) -> Denoise:
    """`build(condition, null)` makes the denoiser of a window; the result denoises latents of `shape`."""
    boxes = windows.boxes(shape)
    if len(boxes) == 1:
        return build(condition, null)
    parts = [
        (
            box,
            build(cut_condition(condition, box, shape), cut_condition(null, box, shape)),
            windows.weight(box, shape),
        )
        for box in boxes
    ]
    total = torch.zeros(tuple(shape))
    for box, _, weight in parts:
        total[box] += weight

    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        blended = torch.zeros_like(z_t)
        for box, part, weight in parts:
            blended[(..., *box)] += part(z_t[(..., *box)].contiguous(), t) * weight.to(z_t)
        return blended / total.to(z_t)

    return denoise
