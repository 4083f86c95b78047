"""Splits by subject: drawn from a seed, written once, checked on every reading."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from medldm.errors import InputError
from medldm.files import write_json

log = logging.getLogger(__name__)
SUBSETS = ("train", "val", "test")
Split = dict[str, list[str]]
MNMS2_SUBJECTS = [f"{i:03d}" for i in range(1, 361)]


def seed42_350_10(num_val: int = 20) -> Split:
    """The report's 350/10 split of M&Ms-2, whose ten held-out subjects are the test set.

    The report called the same ten subjects validation and test; here `num_val` of the 350 become the
    validation set.
    """
    order = np.random.RandomState(42).permutation(360)  # the legacy generator that the author's code used
    test, rest = order[:10], order[10:]
    names = {"test": test, "val": rest[:num_val], "train": rest[num_val:]}
    return {
        key: [MNMS2_SUBJECTS[i] for i in (names[key] if key == "test" else sorted(names[key]))]
        for key in SUBSETS
    }


def official_160_40_160() -> Split:
    """The challenge's sequential split of M&Ms-2."""
    return {"train": MNMS2_SUBJECTS[:160], "val": MNMS2_SUBJECTS[160:200], "test": MNMS2_SUBJECTS[200:]}


def fraction_split(subjects: Sequence[str], fractions: Mapping[str, float], seed: int) -> Split:
    """A seeded split; validation and test get at least one subject each where there are three or more."""
    subjects = sorted(set(subjects))
    order = [subjects[i] for i in np.random.default_rng(seed).permutation(len(subjects))]
    least = int(len(subjects) >= 3)
    num_test = max(round(fractions["test"] * len(order)), least)
    num_val = max(round(fractions["val"] * len(order)), least)
    parts = {
        "test": order[:num_test],
        "val": order[num_test : num_test + num_val],
        "train": order[num_test + num_val :],
    }
    return {key: sorted(parts[key]) for key in SUBSETS}


def stated_split(stated: Mapping[str, str], where: str) -> Split:
    """The split that a manifest states: {subject: train | val | test}."""
    split: Split = {key: [] for key in SUBSETS}
    for subject, name in sorted(stated.items()):
        if name not in split:
            raise InputError(f"{where}: split '{name}' of subject {subject} is none of {', '.join(SUBSETS)}")
        split[name].append(subject)
    return split


def make_splits(
    subjects: Sequence[str],
    *,
    dataset: str,
    fractions: Mapping[str, float],
    seed: int,
    stated: Mapping[str, str] | None = None,
) -> dict[str, Split]:
    """Every split of a dataset by name; `default` is the stated one, else the report's, else a seeded
    fraction split.
    """
    drawn = fraction_split(subjects, fractions, seed)
    if stated:
        return {"default": stated_split(stated, "manifest.csv"), "fraction": drawn}
    if dataset == "mnms2" and sorted(set(subjects)) == MNMS2_SUBJECTS:
        report = seed42_350_10()
        return {
            "default": report,
            "seed42_350_10": report,
            "official_160_40_160": official_160_40_160(),
            "fraction": drawn,
        }
    return {"default": drawn}


def check_splits(splits: Mapping[str, Split], where: str | Path) -> None:
    """InputError where a subject stands in two sets of one split."""
    for name, split in splits.items():
        if not isinstance(split, Mapping) or not split.keys() <= set(SUBSETS):
            raise InputError(f"{where}: split '{name}' must hold the lists train, val and test")
        seen: dict[str, str] = {}
        for subset, subjects in split.items():
            for subject in subjects:
                if subject in seen:
                    raise InputError(
                        f"{where}: split '{name}' has subject {subject} in both {seen[subject]} and "
                        f"{subset}; "
                        "take it out of one of them"
                    )
                seen[subject] = subset


def read_splits(path: Path) -> dict[str, Split]:
    try:
        splits = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: not a readable splits file ({error}); delete it and run `medldm prepare`"
        ) from error
    check_splits(splits, path)
    return splits


def write_splits_once(path: Path, splits: dict[str, Split], subjects: Sequence[str]) -> dict[str, Split]:
    """Write `splits` unless the file exists: then what it says stays. Returns what the file holds."""
    if not path.is_file():
        check_splits(splits, path)
        write_json(path, splits)
        return splits
    kept = read_splits(path)
    for name, split in kept.items():
        missing = set(subjects) - {subject for subset in split.values() for subject in subset}
        if missing:
            log.warning(
                "%s: split '%s' names %d subjects fewer than there are (%s ...), which stay unused; "
                "delete the file to draw it again",
                path,
                name,
                len(missing),
                sorted(missing)[0],
            )
    return kept
