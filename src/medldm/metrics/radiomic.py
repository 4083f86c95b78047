"""The Frechet radiomic distance, version 1 (Konz, Osuala et al., Medical Image Analysis 2026)."""

import math

import torch
from torch import Tensor

from medldm.metrics.frechet import frechet_from_features


def radiomic_distance(generated: Tensor, real: Tensor) -> float:
    """log of the Frechet distance of radiomic features (N, D), each standardised by the real images' mean and
    deviation; the natural logarithm, of the squared distance as in frd-score. -inf for equal sets, NaN where
    no feature is left.

    Features that are not finite after that, such as those that are equal in all real images, take no part.
    The arithmetic up to there is in float32, as in the package.
    """
    x, y = (features.to(torch.float32) for features in (generated, real))
    mean, deviation = y.mean(0), y.std(0, correction=0)
    x, y = ((features - mean) / deviation for features in (x, y))
    keep = x.isfinite().all(0) & y.isfinite().all(0)
    if not keep.any():
        return math.nan
    squared = frechet_from_features(x[:, keep].double(), y[:, keep].double())
    return math.log(squared) if squared > 0 else -math.inf


def complete_rows(features: Tensor) -> Tensor:
    """The rows (N, D) of images whose features could all be taken."""
    return features[~features.isnan().any(1)]
