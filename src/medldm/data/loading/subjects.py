"""Which subjects train, validate and test, by the split of a prepared folder."""

import logging
from pathlib import Path

import numpy as np

from medldm.data.datasets import published_splits
from medldm.data.splits import SUBSETS, Split, make_splits, read_splits
from medldm.errors import InputError

log = logging.getLogger(__name__)
FRACTIONS = {"val": 0.1, "test": 0.1}


def read_subjects(root: Path, index: dict, split: str) -> Split:
    """The subjects of each subset under the split named `split`, without those that the index does not have.

    A folder without a splits.json gets the split that is published for its dataset, else one drawn with the
    defaults of data.splits. InputError for the name of a split that there is not.
    """
    subjects = sorted({case["subject"] for case in index["cases"]})
    path = root / "splits.json"
    if not path.is_file() and "preprocess" in index:  # folders of ldm-medical-image have none
        raise InputError(
            f"{path}: not there, so it is open who is held out; restore it, or run `medldm prepare`"
        )
    splits = (
        read_splits(path)
        if path.is_file()
        else make_splits(
            subjects, fractions=FRACTIONS, seed=42, published=published_splits(index["dataset"], subjects)
        )
    )
    if split not in splits:
        raise InputError(f"data.split={split}: {path} has {', '.join(splits)}")
    named = {subset: list(splits[split].get(subset, ())) for subset in SUBSETS}
    absent = {subject for part in named.values() for subject in part} - set(subjects)
    if absent:
        log.warning("%s: %d subjects of split '%s' are not in the index", path, len(absent), split)
    return {subset: [s for s in part if s not in absent] for subset, part in named.items()}


def share_of(subjects: list[str], fraction: float, seed: int) -> list[str]:
    """The first subjects of a seeded order, at least one, so that a larger share holds a smaller one."""
    if fraction == 1:
        return subjects
    order = np.random.default_rng(seed).permutation(len(subjects))
    return [subjects[i] for i in order[: max(1, round(fraction * len(subjects)))]]
