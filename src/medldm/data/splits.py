"""Splits by subject, which are drawn from a seed, written once, and checked whenever they are read."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medldm.errors import InputError
from medldm.files import write_json
from medldm.schemas import Splits, read_checked

log = logging.getLogger(__name__)
SUBSETS = ("train", "val", "test")
SPELLINGS = {
    "train": ("train", "training", "tr"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "ts"),
}
SPLIT_NOTE = "note"  # the key of a split for a sentence about its origin, beside its lists
Split = dict[str, Any]  # {train, val, test: lists of subjects}, and a note where there is something to say


def subset_of(name: str) -> str | None:
    """train, val or test by any of its spellings (Train, validation...); None for another word."""
    return next((key for key, spellings in SPELLINGS.items() if name.strip().lower() in spellings), None)


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


def split_of_table(stated: Mapping[str, str], where: str) -> Split:
    """The split that the data state: {subject: train | val | test}."""
    split: Split = {key: [] for key in SUBSETS}
    for subject, name in sorted(stated.items()):
        subset = subset_of(name)
        if subset is None:
            raise InputError(f"{where}: split '{name}' of subject {subject} is none of {', '.join(SUBSETS)}")
        split[subset].append(subject)
    return split


def with_validation(split: Split, fraction: float, seed: int) -> Split:
    """A stated split without validation gets a seeded share of its training subjects, at least one, and a
    note that says so: without one, nothing tells the best checkpoint from the last. `fraction` 0 leaves it.
    """
    train = split["train"]
    if split["val"] or len(train) < 2 or fraction == 0:
        return split
    order = np.random.default_rng(seed).permutation(len(train))
    held = sorted(train[i] for i in order[: min(max(round(fraction * len(train)), 1), len(train) - 1)])
    note = (
        f"Validation: {len(held)} of {len(train)} training subjects, drawn with data.splits.seed={seed}, "
        "as the data state none."
    )
    return {
        **split,
        "train": [name for name in train if name not in set(held)],
        "val": held,
        SPLIT_NOTE: note,
    }


def make_splits(
    subjects: Sequence[str],
    fractions: Mapping[str, float],
    seed: int,
    *,
    stated: Mapping[str, str] | None = None,
    published: Mapping[str, Split] | None = None,
) -> dict[str, Split]:
    """Every split of a dataset by name. `default` is the one that the data state, else the first of
    those that are `published` for the dataset, else a seeded split by `fractions`.
    """
    drawn = fraction_split(subjects, fractions, seed)
    if stated:
        default = with_validation(split_of_table(stated, "the data's own split"), fractions["val"], seed)
        return {"default": default, "fraction": drawn}
    if published:
        return {"default": next(iter(published.values())), **published, "fraction": drawn}
    return {"default": drawn}


def describe_split(split: Split) -> str:
    """One line for the screen: sizes, how the split came about, and what an empty part means."""
    sizes = ", ".join(f"{len(split.get(part, ()))} {part}" for part in SUBSETS)
    without = "" if split.get("val") else " Without validation best.ckpt will be the last checkpoint."
    return f"Split by subject: {sizes}.{without} {split.get(SPLIT_NOTE, '')}".strip()


def check_splits(splits: Mapping[str, Split], where: str | Path) -> None:
    """InputError where a subject stands in two sets of one split."""
    for name, split in splits.items():
        if not isinstance(split, Mapping) or not split.keys() <= {*SUBSETS, SPLIT_NOTE}:
            raise InputError(f"{where}: split '{name}' must hold the lists train, val and test")
        seen: dict[str, str] = {}
        for subset in SUBSETS:
            for subject in split.get(subset, ()):
                if subject in seen:
                    raise InputError(
                        f"{where}: split '{name}' has subject {subject} in both {seen[subject]} and "
                        f"{subset}; "
                        "take it out of one of them"
                    )
                seen[subject] = subset


def read_splits(path: Path) -> dict[str, Split]:
    splits = read_checked(path, Splits, "delete it and run `medldm prepare`")
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
        missing = set(subjects) - {subject for key in SUBSETS for subject in split.get(key, ())}
        if missing:
            log.warning(
                "%s: split '%s' names %d subjects fewer than there are (%s ...), which stay unused; "
                "delete the file to draw it again",
                path,
                name,
                len(missing),
                sorted(missing)[0],
            )
        elif name in splits and any(set(split.get(k, ())) != set(splits[name][k]) for k in SUBSETS):
            log.warning(
                "%s: split '%s' stays as it was written; data.splits or the dataset itself would now make "
                "another; delete the file to draw it again",
                path,
                name,
            )
    return kept
