"""Mean MS-SSIM over random pairs of the images of one set: high where a generator repeats itself."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from medldm.evaluation.matching import numbers_by_place
from medldm.evaluation.pairs import Pair
from medldm.evaluation.stored import Image, load
from medldm.metrics.image import to_unit
from medldm.metrics.similarity import ms_ssim, num_scales

VALUES_KEPT = 2**26  # 256 MiB: 32 volumes of 128^3


def draw_pairs(
    pairs: Sequence[Pair], num: int, seed: int, match: Sequence[str] = ()
) -> list[tuple[int, int]]:
    """Up to `num` different pairs of images of two subjects with the same shape and matched attributes."""
    places = numbers_by_place(pairs, match)
    rng = np.random.default_rng(seed)
    drawn: dict[tuple[int, int], None] = {}
    for _ in range(20 * num):
        i = int(rng.integers(len(pairs)))
        j = int(rng.choice(places[pairs[i].place(match)]))
        if pairs[i].subject != pairs[j].subject:
            drawn[min(i, j), max(i, j)] = None
        if len(drawn) == num:
            break
    return list(drawn)


def measure_diversity(
    pairs: Sequence[Pair],
    rows: Mapping[str, Sequence[Image | None]],
    num: int,
    seed: int,
    match: Sequence[str] = (),
) -> dict:
    """MS-SSIM of the same random pairs within every row; images on [0, 1], range 1. Empty where none is
    asked for; `missing` says why where none can be drawn.
    """
    if not num:
        return {}
    chosen = draw_pairs(pairs, num, seed, match)
    if not chosen:
        return {"missing": "ms_ssim left out: no two subjects have images of the same shape"}
    scales = min(num_scales(pairs[i].real.shape[1:]) for i, _ in chosen)
    if not scales:
        return {"missing": "ms_ssim left out: an image is smaller than its window of 11"}
    subjects = {pairs[i].subject for both in chosen for i in both}
    table = {}
    for row, images in rows.items():
        read = reader(images, chosen)
        values = np.array([float(ms_ssim(read(i), read(j), scales=scales)) for i, j in chosen])
        std = float(values.std(ddof=1)) if len(values) > 1 else None
        table[row] = {"mean": float(values.mean()), "std": std, "n_pairs": len(values)}
        table[row]["num_subjects"] = len(subjects)
    return {"ms_ssim": table, "num_scales": scales, "seed": seed, "matched_on": list(match)}


def reader(images: Sequence[Image | None], chosen: Sequence[tuple[int, int]]) -> Callable[[int], Tensor]:
    """Index -> image on [0, 1], (1, C, *S). The last `VALUES_KEPT` values are not read again: most images are
    in several pairs, and a compressed volume takes longer to read than to compare.
    """
    largest = max(math.prod(images[i].shape) for both in chosen for i in both)

    @lru_cache(maxsize=max(2, VALUES_KEPT // largest))
    def read(i: int) -> Tensor:
        return to_unit(torch.from_numpy(load(images[i]))[None])

    return read
