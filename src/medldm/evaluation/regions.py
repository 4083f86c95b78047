"""The parts of a volume in which a translation is judged beside the whole box: brain and tumour."""

from collections.abc import Collection, Sequence

import numpy as np
import torch
from torch import Tensor

from medldm.errors import InputError
from medldm.evaluation.pairs import Pair
from medldm.evaluation.stored import load
from medldm.metrics.catalogue import REGIONAL, REGIONS

FOREGROUND = -0.99  # an image in [-1, 1] is background up to here: half a percent of its range


def check_regions(regions: Sequence[str], metrics: Collection[str]) -> Sequence[str]:
    """The regions; InputError where one, or a metric to take in it, is unknown."""
    for region in regions:
        if region not in REGIONS:
            raise InputError(f"metrics.regions: no region '{region}'; choose from {', '.join(REGIONS)}")
    unfit = [name for name in metrics if name not in REGIONAL]
    if regions and unfit:
        raise InputError(
            f"metrics.image: {unfit[0]} is not defined in a region; choose from {', '.join(REGIONAL)}"
        )
    return regions


def region_masks(region: str, pairs: Sequence[Pair], x: Tensor) -> Tensor:
    """(B, 1, *S) bool on the device of `x`; all False where a pair has no such region."""
    masks = []
    for pair in pairs:
        if region == "brain" and pair.source is not None:
            masks.append((load(pair.source) > FOREGROUND).any(0, keepdims=True))
        elif region == "tumour" and pair.mask is not None:
            masks.append(load(pair.mask) > 0)
        else:
            masks.append(np.zeros((1, *x.shape[2:]), bool))
    return torch.from_numpy(np.stack(masks)).to(x.device)
