"""What a generated image is judged beside: a mean image, a random real one, one of another condition."""

from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medldm.data.records import read_images
from medldm.evaluation.folders import read_folder
from medldm.evaluation.foreign import Reading, settle_reference
from medldm.evaluation.matching import Match, Wanted, choose_match, has_partner, random_partners
from medldm.evaluation.pairs import Pair, known_facts
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


NOTHING = Wanted()
NO_EMBEDDERS: Mapping = {}
KEPT_MEANS = {2: 16, 3: 1}  # by spatial dims: as many views and phases as a subject may have


class MeanImages:
    """Pixelwise sums by shape and attributes (`names`), in float64, from which the mean of any matched part
    follows.

    The mean is that of training images where there are any, else that of all other subjects of the reference
    set, so that no image takes part in its own baseline.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        self.names = tuple(names)
        self.sums: dict[tuple, np.ndarray] = {}
        self.counts: dict[tuple, int] = defaultdict(int)

    def key(self, image: Image, attributes: dict, match: Sequence[str] | None = None) -> tuple:
        match = self.names if match is None else match
        return image.shape, *(attributes.get(name) if name in match else None for name in self.names)

    def add(self, image: np.ndarray, attributes: dict) -> None:
        key = self.key(image, attributes)
        if key not in self.sums:
            self.sums[key] = np.zeros(image.shape)
        self.sums[key] += image
        self.counts[key] += 1

    def narrowed(self, key: tuple, match: Sequence[str]) -> tuple:
        """The key of the images that share the shape, and those attributes alone that `match` names."""
        kept = (True, *(name in match for name in self.names))
        return tuple(part if keep else None for part, keep in zip(key, kept, strict=True))

    def merged(self, match: Sequence[str]) -> "MeanImages":
        merged = MeanImages(self.names)
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


def mean_of(items: Iterable[tuple[np.ndarray, dict]], names: Sequence[str]) -> MeanImages:
    means = MeanImages(names)
    for image, attributes in items:
        means.add(image, attributes)
    return means


class TrainingSet(NamedTuple):
    """What evaluation keeps of the training images."""

    means: MeanImages
    thumbnails: dict[tuple[int, ...], Tensor]  # shape of the images (C, *S) -> (N, D)
    names: dict[tuple[int, ...], list[str]]  # of the N images
    embeddings: dict[str, dict[tuple[int, ...], Tensor]]  # by the name of what embeds: shape -> (N, D)

    @property
    def num_images(self) -> int:
        return sum(self.means.counts.values())


def read_training_set(
    train: Path,
    subjects: Collection[str] | None,
    evaluated: Collection[str],
    reading: Reading,
    match: Sequence[str] = (),
    embedders: Mapping[str, Callable[[Tensor], Tensor]] = NO_EMBEDDERS,
) -> TrainingSet:
    """Means, told apart by the attributes `match`, thumbnails and embeddings of the training images; subjects
    under evaluation are left out.
    """
    means, small, names = MeanImages(match), defaultdict(list), defaultdict(list)
    embedded = {name: defaultdict(list) for name in embedders}
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
            for name, embed in embedders.items():
                embedded[name][image.shape].append(embed(torch.from_numpy(image)[None]))
    embeddings = {name: stacked_parts(kept) for name, kept in embedded.items()}
    return TrainingSet(means, stacked_parts(small), dict(names), embeddings)


def stacked_parts(kept: Mapping[tuple[int, ...], list[Tensor]]) -> dict[tuple[int, ...], Tensor]:
    return {shape: torch.cat(parts) for shape, parts in kept.items()}


def has_mean(pairs: Sequence[Pair], training: MeanImages | None, match: Sequence[str]) -> list[bool]:
    """Whether each image has a mean image to stand beside, of the training set or of other subjects."""
    if training is None:
        return has_partner(pairs, match)
    known = {training.narrowed(key, match) for key in training.sums}
    return [training.key(pair.real, pair.attributes, match) in known for pair in pairs]


def mean_images(
    pairs: list[Pair], training: MeanImages | None, match: Sequence[str] = ()
) -> list[Image | None]:
    """The mean image of every pair's place. Means that leave out a subject are made when they are read."""
    names = match if training is None else training.names
    keys = [MeanImages(names).key(pair.real, pair.attributes, match) for pair in pairs]
    if training is not None:
        means = training.merged(match)
        made = {key: means.mean(key) for key in set(keys)}
        return [made[key] for key in keys]
    everyone = mean_of(((load(pair.real), pair.attributes) for pair in pairs), match)

    own: dict[tuple, list[Pair]] = defaultdict(list)
    for pair, key in zip(pairs, keys, strict=True):
        own[pair.subject, key].append(pair)

    @lru_cache(KEPT_MEANS[len(pairs[0].real.shape) - 1])
    def without(subject: str, key: tuple) -> np.ndarray | None:
        same = ((load(pair.real), pair.attributes) for pair in own[subject, key])
        return everyone.mean(key, without=mean_of(same, match))

    num_all = Counter(keys)
    return [
        StoredImage(key[0], partial(without, pair.subject, key))
        if num_all[key] > len(own[pair.subject, key])
        else None
        for pair, key in zip(pairs, keys, strict=True)
    ]


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
    match: Wanted = NOTHING,
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
        matches["mean_image"] = found = without_numbers(found)
        rows["mean_image"] = mean_images(pairs, training, found.attributes)
    found = choose_match(match, lambda names: has_partner(pairs, names), relax=relax)
    partners = random_partners(pairs, seed, found.attributes, match.scalars)
    if "random_real" in baselines:
        rows["random_real"] = [None if i is None else pairs[i].real for i in partners]
    if "shuffled" in baselines:
        rows["shuffled"] = [None if i is None else pairs[i].generated[0] for i in partners]
    matches |= {name: found for name in ("random_real", "shuffled") if name in rows}
    empty = [name for name, images in rows.items() if all(image is None for image in images)]
    rows = {name: images for name, images in rows.items() if name not in empty}
    missing = [f"{name} left out: {NO_STAND_IN[name]}" for name in empty if name in baselines]
    return Rows(rows, matches, missing)


def without_numbers(match: Match) -> Match:
    """Of a mean, which is over images of all values of a number."""
    said = [f"{name} is a number: the mean is over all of its values" for name in match.nearest]
    return Match(match.attributes, "; ".join([*said, *([match.note] if match.note else [])]))


def describe_row(row: str, match: Match | None) -> str:
    """What a row is, with the attributes that a stand-in shares."""
    text = DESCRIPTIONS[row]
    if match is None:
        return text
    shared = f", same {' and '.join(match.attributes)}" if match.attributes else ", any view, phase and label"
    shared += f", nearest {' and '.join(match.nearest)}" if match.nearest else ""
    head, colon, tail = text.partition(":")
    return f"{head}{shared}{colon}{tail}" + (f" ({match.note})" if match.note else "")
