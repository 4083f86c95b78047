"""From per-image values to a table: means with intervals over subjects, groups, and paired differences."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from medldm.metrics.bootstrap import Interval, bootstrap_mean, bootstrap_ratio

Values = Mapping[str, Mapping[str, np.ndarray]]  # row -> metric -> (N,) float64, NaN where there is no value
Table = dict[str, dict[str, Interval]]  # row -> metric


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: `num_resamples` draws of subjects with replacement, percentiles of `level`."""

    num_resamples: int = 2000
    level: float = 0.95
    seed: int = 0

    def __call__(self, values: np.ndarray, subjects: Sequence[str]) -> Interval:
        return bootstrap_mean(
            values, list(subjects), num_resamples=self.num_resamples, level=self.level, seed=self.seed
        )

    def ratio(self, over: np.ndarray, under: np.ndarray, subjects: Sequence[str]) -> Interval:
        settings = {"num_resamples": self.num_resamples, "level": self.level, "seed": self.seed}
        return bootstrap_ratio(over, under, list(subjects), **settings)


def summarise(values: Values, subjects: Sequence[str], bootstrap: Bootstrap) -> Table:
    """Mean and interval of every row and metric."""
    return {
        row: {metric: bootstrap(array, subjects) for metric, array in metrics.items()}
        for row, metrics in values.items()
    }


def select(values: Values, keep: np.ndarray) -> Values:
    return {row: {name: array[keep] for name, array in metrics.items()} for row, metrics in values.items()}


def summarise_groups(
    values: Values, subjects: Sequence[str], groups: Mapping[str, Sequence[str | None]], bootstrap: Bootstrap
) -> dict[str, dict[str, Table]]:
    """The same table for every value of every group: `groups["view"]` names the view of each image."""
    tables: dict[str, dict[str, Table]] = {}
    for group, members in groups.items():
        labels = np.array([str(member) for member in members])
        known = sorted({str(member) for member in members if member is not None})
        tables[group] = {
            label: summarise(
                select(values, labels == label), np.asarray(subjects)[labels == label].tolist(), bootstrap
            )
            for label in known
        }
    return tables


def paired_differences(values: Values, subjects: Sequence[str], row: str, bootstrap: Bootstrap) -> Table:
    """`row` minus every other row, image by image: the interval says whether the gap is more than chance."""
    with np.errstate(invalid="ignore"):  # PSNR of identical images: infinity minus infinity is excluded
        gaps = {
            other: {name: values[row][name] - array for name, array in metrics.items() if name in values[row]}
            for other, metrics in values.items()
            if other != row
        }
    return summarise(gaps, subjects, bootstrap)


def combine_samples(values: np.ndarray, higher_is_better: bool) -> tuple[np.ndarray, np.ndarray]:
    """(K, N) values of K samples a condition -> their mean and their best, each (N,)."""
    best = values.max(0) if higher_is_better else values.min(0)
    return values.mean(0), best
