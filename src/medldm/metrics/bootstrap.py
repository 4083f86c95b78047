"""Confidence intervals: subjects, not images, are independent, so subjects are what is resampled."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BLOCK_ELEMENTS = 2**21  # counts of resampled subjects in memory at once


class Interval(NamedTuple):
    """A mean over images with its percentile interval over subjects (`low`, `high` None with one subject)."""

    mean: float | None
    low: float | None
    high: float | None
    num_images: int
    num_subjects: int
    num_excluded: int
    std: float | None = None  # over images, unbiased

    def as_dict(self) -> dict:
        """The form in metrics.json; `ci95` is null where there are too few subjects for one."""
        interval = None if self.low is None else [self.low, self.high]
        return {
            "mean": self.mean,
            "ci95": interval,
            "std": self.std,
            "n": self.num_images,
            "num_subjects": self.num_subjects,
            "num_excluded": self.num_excluded,
        }


def resamples(num_subjects: int, num: int, seed: int) -> Iterator[np.ndarray]:
    """How often each subject is drawn in each of `num` resamples, (r, num_subjects) at a time: the numbers do
    not depend on the size of these blocks.
    """
    rng, share = np.random.default_rng(seed), np.full(num_subjects, 1 / num_subjects)
    rows = max(1, BLOCK_ELEMENTS // num_subjects)
    for start in range(0, num, rows):
        yield rng.multinomial(num_subjects, share, size=min(rows, num - start))


def bootstrap_mean(
    values: np.ndarray, subjects: list[str], *, num_resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean of per-image `values` (N,) and the percentile bootstrap over `subjects` (N names).

    NaN marks an image without a value: it is left out and counted. An infinite value (PSNR of identical
    images) makes mean and interval infinite.
    """
    values = np.asarray(values, dtype=np.float64)
    valid = ~np.isnan(values)
    names, index = np.unique(np.asarray(subjects)[valid], return_inverse=True)
    excluded = int((~valid).sum())
    if not len(names):
        return Interval(None, None, None, 0, 0, excluded)
    counts = np.bincount(index, minlength=len(names)).astype(np.float64)
    sums = np.bincount(index, weights=values[valid], minlength=len(names))
    mean = float(sums.sum() / counts.sum())
    num = int(valid.sum())
    std = float(values[valid].std(ddof=1)) if num > 1 and np.isfinite(mean) else None
    if len(names) < 2 or not np.isfinite(mean):
        return Interval(mean, None, None, num, len(names), excluded, std)
    blocks = resamples(len(names), num_resamples, seed)
    means = np.concatenate([(weights @ sums) / (weights @ counts) for weights in blocks])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean, float(low), float(high), num, len(names), excluded, std)


def bootstrap_ratio(
    over: np.ndarray,
    under: np.ndarray,
    subjects: list[str],
    *,
    num_resamples: int = 2000,
    seed: int = 0,
    level: float = 0.95,
) -> Interval:
    """Mean of `over` / mean of `under`, per image (N,) each, over the images where both have a value.

    Subjects are resampled, so the interval knows that both values come from the same ones.
    """
    over, under = np.asarray(over, np.float64), np.asarray(under, np.float64)
    valid = np.isfinite(over) & np.isfinite(under)
    names, index = np.unique(np.asarray(subjects)[valid], return_inverse=True)
    excluded = int((~valid).sum())
    if not len(names) or not under[valid].sum():
        return Interval(None, None, None, 0, 0, excluded)
    sums = np.stack([np.bincount(index, v[valid], minlength=len(names)) for v in (over, under)])
    ratio = float(sums[0].sum() / sums[1].sum())
    if len(names) < 2:
        return Interval(ratio, None, None, int(valid.sum()), len(names), excluded)
    blocks = resamples(len(names), num_resamples, seed)
    tops, bottoms = np.concatenate([weights @ sums.T for weights in blocks]).T
    low, high = np.quantile(tops[bottoms > 0] / bottoms[bottoms > 0], [(1 - level) / 2, (1 + level) / 2])
    return Interval(ratio, float(low), float(high), int(valid.sum()), len(names), excluded)
