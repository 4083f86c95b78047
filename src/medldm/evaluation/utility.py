"""Tests segmenters that were trained on real or synthetic images on real ones, and compares their scores."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from medldm.data.prepared import load_index
from medldm.data.records import ImageRecord, read_images
from medldm.data.splits import read_splits
from medldm.errors import InputError
from medldm.evaluation.screen import Lines, brief, cell
from medldm.evaluation.segmenter import load_segmenter
from medldm.evaluation.tools import Segmenter
from medldm.files import read_json
from medldm.metrics.overlap import dice
from medldm.metrics.summary import Bootstrap

MIN_SUBJECTS = 6
MEAN = "dice_mean"


class TrainedOn(NamedTuple):
    """The training data of one segmenter."""

    train_on: str  # real, synthetic or both
    fraction: float  # share of the training subjects
    seed: int


class HeldOutScores(NamedTuple):
    """Dice of one segmenter on the real images of the held-out subjects."""

    trial: TrainedOn
    ids: Sequence[str]
    subjects: Sequence[str]
    # dice_mean and dice_<class>, each (N,), NaN where an image lacks the class
    scores: Mapping[str, np.ndarray]


def held_out_subjects(root: Path, split: str) -> list[str]:
    """The test subjects of a split. InputError where the split does not exist or has none."""
    splits = read_splits(root / "splits.json")
    if split not in splits:
        raise InputError(f"split={split}: {root / 'splits.json'} has {', '.join(splits)}")
    if not splits[split]["test"]:
        raise InputError(f"split={split}: {root / 'splits.json'} holds out no subject for the test")
    return splits[split]["test"]


def judge_segmenter(
    checkpoint: Path, root: Path, split: str, device: torch.device, precision: str
) -> dict[str, Any]:
    """Measures Dice on every real image of the test subjects: `ids`, `subjects`, and `scores` by name."""
    facts, segmenter = load_index(root), None
    ids, subjects, rows = [], [], []
    for record in read_images(root, subjects=held_out_subjects(root, split)):
        if record.mask is None:
            raise InputError(f"{root}: '{record.id}' has no map to test a segmenter with")
        if segmenter is None:
            segmenter = load_segmenter(str(checkpoint), record.image.shape, device, facts, precision)
        ids.append(record.id)
        subjects.append(record.subject)
        rows.append(score_image(segmenter, record, device))
    names = [MEAN, *(f"dice_{name}" for name in segmenter.class_names)]
    scores = dict(zip(names, map(list, zip(*rows, strict=True)), strict=True))
    return {"ids": ids, "subjects": subjects, "scores": scores}


@torch.no_grad()
def score_image(segmenter: Segmenter, record: ImageRecord, device: torch.device) -> list[float]:
    """Dice of one image: the mean over the classes that either map has, then each class; NaN where neither
    map has it.
    """
    image = torch.from_numpy(np.asarray(record.image, np.float32))[None].to(device)
    wanted = torch.from_numpy(record.mask.astype(np.int64)).reshape(1, 1, *image.shape[2:])
    scores = dice(segmenter.segment(image).cpu(), wanted, len(segmenter.class_names) + 1)[0].tolist()
    known = [score for score in scores if not math.isnan(score)]
    return [sum(known) / len(known) if known else math.nan, *scores]


def read_trial(path: Path) -> HeldOutScores:
    """The scores that a test has written. InputError where the file is damaged."""
    found = read_json(path, "delete it and run `medldm utility` again")
    trial = TrainedOn(found["train_on"], found["fraction"], found["seed"])
    scores = {
        name: np.array([math.nan if value is None else value for value in values], float)
        for name, values in found["scores"].items()
    }
    return HeldOutScores(trial, found["ids"], found["subjects"], scores)


def summarise_trials(tests: Sequence[HeldOutScores], bootstrap: Bootstrap) -> dict[str, Any]:
    """Means over all seeds for each kind of training data and each fraction, with intervals over subjects and
    the standard deviation of the means of seeds; and the paired differences from `real` at the same fraction.
    """
    if any(test.ids != tests[0].ids for test in tests):
        raise InputError(
            "utility: the segmenters were tested on different images; delete output and run again"
        )
    groups: dict[tuple[str, float], list[HeldOutScores]] = defaultdict(list)
    for test in tests:
        groups[test.trial.train_on, test.trial.fraction].append(test)
    points = [
        {"train_on": train_on, "fraction": fraction, "num_seeds": len(found)}
        | {"scores": {name: point(found, name, bootstrap) for name in found[0].scores}}
        | {"minus_real": difference(found, groups.get(("real", fraction)), bootstrap)}
        for (train_on, fraction), found in groups.items()
    ]
    num_subjects = len(set(tests[0].subjects))
    few = f"intervals over {num_subjects} test subjects are rough: {MIN_SUBJECTS} or more make them usable"
    return {
        "n": {"images": len(tests[0].ids), "subjects": num_subjects},
        "points": points,
        "warnings": [few] if num_subjects < MIN_SUBJECTS else [],
    }


def point(found: Sequence[HeldOutScores], name: str, bootstrap: Bootstrap) -> dict[str, Any]:
    values = np.concatenate([test.scores[name] for test in found])
    subjects = [subject for test in found for subject in test.subjects]
    with np.errstate(invalid="ignore"):
        means = [np.nanmean(test.scores[name]) for test in found if np.isfinite(test.scores[name]).any()]
    spread = float(np.std(means, ddof=1)) if len(means) > 1 else None
    return bootstrap(values, subjects).as_dict() | {"std_over_seeds": spread}


def difference(
    found: Sequence[HeldOutScores], real: Sequence[HeldOutScores] | None, bootstrap: Bootstrap
) -> dict[str, Any] | None:
    """Mean Dice less that of the segmenter trained on real images of the same subjects, seed by seed."""
    by_seed = {test.trial.seed: test for test in real or ()}
    pairs = [(test, by_seed[test.trial.seed]) for test in found if test.trial.seed in by_seed]
    if not pairs or found[0].trial.train_on == "real":
        return None
    gaps = np.concatenate([test.scores[MEAN] - other.scores[MEAN] for test, other in pairs])
    return bootstrap(gaps, [subject for test, _ in pairs for subject in test.subjects]).as_dict()


def utility_lines(results: Mapping[str, Any]) -> Iterator[Lines]:
    """The learning curve as a table, for the terminal."""
    n = results["n"]
    rows = [
        [point["train_on"], f"{point['fraction']:g}", str(point["num_seeds"]), cell(point["scores"][MEAN])]
        + [brief(point["scores"][MEAN]["std_over_seeds"]), cell(point["minus_real"])]
        for point in results["points"]
    ]
    title = (
        f"mean Dice on {n['images']} real images of {n['subjects']} held-out subjects, with intervals over "
        "subjects"
    )
    head = ["trained on", "fraction", "seeds", "Dice", "deviation over seeds", "minus real"]
    yield Lines(title, head, rows)
