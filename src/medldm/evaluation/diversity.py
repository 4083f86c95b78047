"""Mean MS-SSIM over random pairs of the images of one set: high where a generator repeats itself."""

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from medldm.evaluation.pairs import Pair
from medldm.evaluation.stored import Image, load
from medldm.metrics.image import to_unit
from medldm.metrics.similarity import ms_ssim, num_scales


def draw_pairs(pairs: Sequence[Pair], num: int, seed: int) -> list[tuple[int, int]]:
    """Up to `num` different pairs of images of two subjects in the same place (shape, view, phase, label)."""
    places: dict[tuple, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        places[pair.place].append(i)
    rng = np.random.default_rng(seed)
    drawn: dict[tuple[int, int], None] = {}
    for _ in range(20 * num):
        i = int(rng.integers(len(pairs)))
        j = int(rng.choice(places[pairs[i].place]))
        if pairs[i].subject != pairs[j].subject:
            drawn[min(i, j), max(i, j)] = None
        if len(drawn) == num:
            break
    return list(drawn)


def measure_diversity(
    pairs: Sequence[Pair], rows: Mapping[str, Sequence[Image | None]], num: int, seed: int
) -> dict:
    """MS-SSIM of the same random pairs within every row; images on [0, 1], range 1. Empty without a pair."""
    chosen = draw_pairs(pairs, num, seed)
    scales = num_scales(pairs[0].real.shape[1:])
    if not chosen or not scales:
        return {}
    table = {}
    for row, images in rows.items():
        values = np.array([similarity(images[i], images[j], scales) for i, j in chosen])
        std = float(values.std(ddof=1)) if len(values) > 1 else None
        table[row] = {"mean": float(values.mean()), "std": std, "n_pairs": len(values)}
    return {"ms_ssim": table, "num_scales": scales, "seed": seed}


def similarity(first: Image, second: Image, scales: int) -> float:
    x, y = (to_unit(torch.from_numpy(load(image))[None]) for image in (first, second))
    return float(ms_ssim(x, y, scales=scales))
