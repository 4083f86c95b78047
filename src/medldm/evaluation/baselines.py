"""What a generated image is judged beside: a mean image, a random real one, one of another condition."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medldm.data.records import read_images
from medldm.errors import InputError
from medldm.evaluation.conditions import MATCHABLE, Conditions
from medldm.evaluation.foreign import Reading, settle_reference
from medldm.evaluation.pairs import Pair, known_facts, read_folder
from medldm.evaluation.stored import Image, StoredImage, load
from medldm.metrics.memorization import thumbnails

DESCRIPTIONS = {
    "generated": "the generated images (sample 0)",
    "generated_mean_of_k": "mean of the metric over the K samples of a condition",
    "generated_best_of_k": "best value of each metric among the K samples of a condition",
    "reconstruction": "the real image through the first stage: the upper bound of a latent model",
    "mean_image": "a pixelwise mean image",
    "random_real": "a real image of another random subject",
    "shuffled": "the image generated for another random subject: near `generated` means that the condition "
    "is not used",
    "identity": "the source as its own translation",
    "spade": "the translation without diffusion",
    "regression": "a plain U-Net trained for this one pair of modalities",
    "real": "the real image itself (edge columns: what the detector gives back at best; Dice: what the "
    "segmenter reaches on real images)",
}


class Match(NamedTuple):
    """The attributes that a stand-in shares with the image beside it, and why not more of them."""

    attributes: tuple[str, ...] = ()
    note: str = ""


def attributes_to_match(stated: str | Sequence[str], conditions: Conditions) -> tuple[str, ...]:
    """Attributes to match on. `auto`: those that were conditions of the model, since a stand-in that shares
    what the model was never told is no fair one. InputError for an unknown name.
    """
    if stated == "auto":
        return conditions.matchable
    names = (stated,) if isinstance(stated, str) else tuple(stated)
    for name in names:
        if name not in MATCHABLE:
            raise InputError(
                f"metrics.match: no attribute '{name}'; choose auto or from {', '.join(MATCHABLE)}"
            )
    return names


def choose_match(
    names: tuple[str, ...], has_stand_in: Callable[[tuple[str, ...]], Sequence[bool]], *, relax: bool
) -> Match:
    """As many of `names` as leave no image without a stand-in, so that all rows are on the same images; all
    of them where `relax` is False. `has_stand_in(names)` says it for every image.
    """
    wanted, dropped = list(names), []
    best = sum(has_stand_in(()))
    while relax and wanted and (num := sum(has_stand_in(tuple(wanted)))) < best:
        name = wanted.pop()
        dropped.append(f"{name} is not matched: it would leave {best - num} of {best} images without one")
    return Match(tuple(wanted), "; ".join(dropped))


def random_partners(pairs: list[Pair], seed: int, match: Sequence[str] = ()) -> list[int | None]:
    """For each image the number of a random one of another subject, of the same shape and attributes."""
    rng = np.random.default_rng(seed)
    places = numbers_by_place(pairs, match)
    partners: list[int | None] = []
    for pair in pairs:
        others = [i for i in places[pair.place(match)] if pairs[i].subject != pair.subject]
        partners.append(int(rng.choice(others)) if others else None)
    return partners


def numbers_by_place(pairs: Sequence[Pair], match: Sequence[str]) -> dict[tuple, list[int]]:
    places: dict[tuple, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        places[pair.place(match)].append(i)
    return places


def has_partner(pairs: Sequence[Pair], match: Sequence[str]) -> list[bool]:
    subjects: dict[tuple, set[str]] = defaultdict(set)
    for pair in pairs:
        subjects[pair.place(match)].add(pair.subject)
    return [len(subjects[pair.place(match)]) > 1 for pair in pairs]


class MeanImages:
    """Pixelwise sums by shape and attributes, in float64, from which the mean of any matched part follows.

    The mean is that of training images where there are any, else that of all other subjects of the reference
    set, so that no image takes part in its own baseline.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple, np.ndarray] = {}
        self.counts: dict[tuple, int] = defaultdict(int)

    @staticmethod
    def key(image: Image, attributes: dict, match: Sequence[str] = MATCHABLE) -> tuple:
        return image.shape, *(attributes.get(name) if name in match else None for name in MATCHABLE)

    def add(self, image: np.ndarray, attributes: dict) -> None:
        key = self.key(image, attributes)
        if key not in self.sums:
            self.sums[key] = np.zeros(image.shape)
        self.sums[key] += image
        self.counts[key] += 1

    @staticmethod
    def narrowed(key: tuple, match: Sequence[str]) -> tuple:
        """The key of the images that share the shape, and those attributes alone that `match` names."""
        kept = (True, *(name in match for name in MATCHABLE))
        return tuple(part if keep else None for part, keep in zip(key, kept, strict=True))

    def merged(self, match: Sequence[str]) -> "MeanImages":
        merged = MeanImages()
        for key, total in self.sums.items():
            place = self.narrowed(key, match)
            merged.sums[place] = merged.sums[place] + total if place in merged.sums else total
            merged.counts[place] += self.counts[key]
        return merged

    def mean(self, key: tuple, without: "MeanImages | None" = None) -> np.ndarray | None:
        """float32 mean of this place, less the images of `without`; None where nothing is left."""
        total, count = self.sums.get(key), self.counts.get(key, 0)
        if without is not None and key in without.sums:
            total, count = total - without.sums[key], count - without.counts[key]
        return (total / count).astype(np.float32) if count else None


def mean_of(items: Iterable[tuple[np.ndarray, dict]]) -> MeanImages:
    means = MeanImages()
    for image, attributes in items:
        means.add(image, attributes)
    return means


class TrainingSet(NamedTuple):
    """What evaluation keeps of the training images."""

    means: MeanImages
    thumbnails: dict[tuple[int, ...], Tensor]  # shape of the images (C, *S) -> (N, D)
    names: dict[tuple[int, ...], list[str]]  # of the N images

    @property
    def num_images(self) -> int:
        return sum(self.means.counts.values())


def read_training_set(
    train: Path, subjects: Collection[str] | None, evaluated: Collection[str], reading: Reading
) -> TrainingSet:
    """Mean and thumbnails of the training images; subjects under evaluation are left out."""
    means, small, names = MeanImages(), defaultdict(list), defaultdict(list)
    if known_facts(train):
        records = read_images(train, subjects=subjects)
    else:
        records = settle_reference(train, read_folder(train), reading).values()
    for record in records:
        if record.subject not in evaluated:
            image = np.asarray(load(record.image), np.float32)
            means.add(image, record.attributes)
            small[image.shape].append(thumbnails(torch.from_numpy(image)[None]))
            names[image.shape].append(record.id)
    return TrainingSet(means, {shape: torch.cat(parts) for shape, parts in small.items()}, dict(names))


def has_mean(pairs: Sequence[Pair], training: MeanImages | None, match: Sequence[str]) -> list[bool]:
    """Whether each image has a mean image to stand beside, of the training set or of other subjects."""
    if training is None:
        return has_partner(pairs, match)
    known = {MeanImages.narrowed(key, match) for key in training.sums}
    return [MeanImages.key(pair.real, pair.attributes, match) in known for pair in pairs]


def mean_images(
    pairs: list[Pair], training: MeanImages | None, match: Sequence[str] = ()
) -> list[Image | None]:
    """The mean image of every pair's place. Those of volumes are made when they are read."""
    keys = [MeanImages.key(pair.real, pair.attributes, match) for pair in pairs]
    if training is not None:
        means = training.merged(match)
        made = {key: means.mean(key) for key in set(keys)}
        return [made[key] for key in keys]
    everyone = mean_of((load(pair.real), pair.attributes) for pair in pairs).merged(match)

    def without(subject: str, key: tuple) -> np.ndarray | None:
        return everyone.mean(key, without=mean_of_subject(pairs, subject, key, match))

    if isinstance(pairs[0].real, StoredImage):
        num_all = Counter(keys)
        num_own = Counter((pair.subject, key) for pair, key in zip(pairs, keys, strict=True))
        return [
            StoredImage(key[0], partial(without, pair.subject, key))
            if num_all[key] > num_own[pair.subject, key]
            else None
            for pair, key in zip(pairs, keys, strict=True)
        ]
    wanted = dict.fromkeys((pair.subject, key) for pair, key in zip(pairs, keys, strict=True))
    made = {place: without(*place) for place in wanted}
    return [made[pair.subject, key] for pair, key in zip(pairs, keys, strict=True)]


def mean_of_subject(pairs: list[Pair], subject: str, key: tuple, match: Sequence[str]) -> MeanImages:
    own = (pair for pair in pairs if pair.subject == subject)
    same = (pair for pair in own if MeanImages.key(pair.real, pair.attributes, match) == key)
    return mean_of((load(pair.real), pair.attributes) for pair in same).merged(match)


class Rows(NamedTuple):
    """Every row of the table: an image (or None) for each pair; what the stand-ins share, row by row; and
    for each row that was asked for and cannot be made a line that says why.
    """

    images: dict[str, list[Image | None]]
    matches: dict[str, Match]
    missing: list[str]


NO_STAND_IN = {
    "mean_image": "no other subject, and no training image, has their shape",
    "random_real": "there is no other subject with images of the same shape",
    "shuffled": "there is no other subject with images of the same shape",
}


def make_rows(
    pairs: list[Pair],
    baselines: Collection[str],
    *,
    training: MeanImages | None,
    seed: int,
    match: tuple[str, ...] = (),
    relax: bool = True,
) -> Rows:
    """The rows of the table; `match` and `relax` are those of `choose_match`. A row without any image is left
    out, and a line says why.
    """
    rows: dict[str, list[Image | None]] = {
        "generated": [pair.generated[0] for pair in pairs],
        "reconstruction": [pair.reconstruction for pair in pairs],
    }
    if any(pair.source is not None for pair in pairs):
        rows["identity"] = [pair.source for pair in pairs]
    for name in dict.fromkeys(name for pair in pairs for name in pair.others):
        rows[name] = [pair.others.get(name) for pair in pairs]
    matches: dict[str, Match] = {}
    if "mean_image" in baselines:
        found = choose_match(match, lambda names: has_mean(pairs, training, names), relax=relax)
        matches["mean_image"] = found
        rows["mean_image"] = mean_images(pairs, training, found.attributes)
    found = choose_match(match, lambda names: has_partner(pairs, names), relax=relax)
    partners = random_partners(pairs, seed, found.attributes)
    if "random_real" in baselines:
        rows["random_real"] = [None if i is None else pairs[i].real for i in partners]
    if "shuffled" in baselines:
        rows["shuffled"] = [None if i is None else pairs[i].generated[0] for i in partners]
    matches |= {name: found for name in ("random_real", "shuffled") if name in rows}
    empty = [name for name, images in rows.items() if all(image is None for image in images)]
    rows = {name: images for name, images in rows.items() if name not in empty}
    missing = [f"{name} left out: {NO_STAND_IN[name]}" for name in empty if name in baselines]
    return Rows(rows, matches, missing)


def describe_row(row: str, match: Match | None) -> str:
    """What a row is, with the attributes that a stand-in shares."""
    text = DESCRIPTIONS[row]
    if match is None:
        return text
    shared = f", same {' and '.join(match.attributes)}" if match.attributes else ", any view, phase and label"
    head, colon, tail = text.partition(":")
    return f"{head}{shared}{colon}{tail}" + (f" ({match.note})" if match.note else "")
