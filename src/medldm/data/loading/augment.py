"""The random crops and flips of training, and the central crop of validation."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from medldm.errors import InputError

LATENT_KEYS = ("latent", "source_latent")
SPATIAL_KEYS = ("image", "source", "mask", "edges", "edges_levels")  # what is cropped and flipped together


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
        key: x[voxels] if key in SPATIAL_KEYS else x[box(factors)] if key in LATENT_KEYS else x
        for key, x in item.items()
    }


def item_shape(item: dict, cell: Sequence[int] | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(voxels of an item, voxels of a latent cell) along each axis; a cell is 1 where an item has no latents.

    Where an item holds latents alone, `cell` tells what they stand for.
    """
    grid = next((item[key].shape[1:] for key in LATENT_KEYS if key in item), None)
    shape = next((item[key].shape[1:] for key in SPATIAL_KEYS if key in item), None)
    if shape is not None:
        return shape, tuple(n // m for n, m in zip(shape, grid or shape, strict=True))
    if cell is None:
        raise InputError("data.crop_size: these latents do not tell their voxels; run `medldm encode` again")
    return tuple(n * f for n, f in zip(grid, cell, strict=True)), tuple(cell)


def box_sizes(
    item: dict, size: Sequence[int | None], cell: Sequence[int] | None
) -> list[tuple[int, int, int]]:
    """(voxels, those of the box, those of a latent cell) of each axis; None in `size` is the whole axis."""
    shape, factors = item_shape(item, cell)
    filled = [m if n is None else n for n, m in zip(size, shape, strict=True)]
    if any(n % f for n, f in zip(filled, factors, strict=True)):
        raise InputError(f"data.crop_size={filled}: cached latents need multiples of {list(factors)}")
    return list(zip(shape, filled, factors, strict=True))


@dataclass(frozen=True)
class RandomCrop:
    """A box of `size` anywhere inside the (C, *S) arrays of an item, the same for all of them; None along an
    axis keeps it whole. `cell`: voxels of a latent cell along each axis, for items of latents alone.
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
        return {key: np.flip(x, flipped) if key in SPATIAL_KEYS else x for key, x in item.items()}
