"""What a generated image is judged beside: a mean image, a random real one, one of another condition."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medldm.data.readers import read_images
from medldm.evaluation.pairs import Pair
from medldm.evaluation.stored import Image, StoredImage, load
from medldm.metrics.memorization import thumbnails

DESCRIPTIONS = {
    "generated": "the generated images (sample 0)",
    "generated_mean_of_k": "mean of the metric over the K samples of a condition",
    "generated_best_of_k": "best value of each metric among the K samples of a condition",
    "reconstruction": "the real image through the first stage: the upper bound of a latent model",
    "mean_image": "a pixelwise mean image, one a view and label",
    "random_real": "a real image of another random subject, same view, phase and label",
    "shuffled": "the image generated for another random subject, same view, phase and label: near "
    "`generated` means that the condition is not used",
    "identity": "the source as its own translation",
    "spade": "the translation without diffusion",
    "regression": "a plain U-Net trained for this one pair of modalities",
    "real": "the real image itself (edge columns: what the detector gives back at best; Dice: what the "
    "segmenter reaches on real images)",
}


def random_partners(pairs: list[Pair], seed: int) -> list[int | None]:
    """For each image the number of a random one of another subject in the same place (view, label, shape)."""
    rng = np.random.default_rng(seed)
    places: dict[tuple, list[int]] = defaultdict(list)
    for i, pair in enumerate(pairs):
        places[pair.place].append(i)
    partners: list[int | None] = []
    for pair in pairs:
        others = [i for i in places[pair.place] if pairs[i].subject != pair.subject]
        partners.append(int(rng.choice(others)) if others else None)
    return partners


class MeanImages:
    """Pixelwise mean per view, label and shape, in float64.

    With training images their mean; without, the mean over every other subject of the reference set
    (leave one subject out), so that no image takes part in its own baseline.
    """

    def __init__(self) -> None:
        self.sums: dict[tuple, np.ndarray] = {}
        self.counts: dict[tuple, int] = defaultdict(int)

    @staticmethod
    def key(image: Image, attributes: dict) -> tuple:
        return image.shape, attributes.get("view"), attributes.get("label")

    def add(self, image: np.ndarray, attributes: dict) -> None:
        key = self.key(image, attributes)
        if key not in self.sums:
            self.sums[key] = np.zeros(image.shape)
        self.sums[key] += image
        self.counts[key] += 1

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

    @property
    def num_images(self) -> int:
        return sum(self.means.counts.values())


def read_training_set(
    train: Path, subjects: Collection[str] | None, evaluated: Collection[str]
) -> TrainingSet:
    """Mean and thumbnails of the training images; subjects under evaluation are left out."""
    means, small = MeanImages(), defaultdict(list)
    for record in read_images(train, subjects=subjects):
        if record.subject not in evaluated:
            means.add(record.image, record.attributes)
            image = torch.from_numpy(np.asarray(record.image, np.float32))[None]
            small[record.image.shape].append(thumbnails(image))
    return TrainingSet(means, {shape: torch.cat(parts) for shape, parts in small.items()})


def mean_images(pairs: list[Pair], training: MeanImages | None) -> list[Image | None]:
    """The mean image of every pair's place. Those of volumes are made when they are read."""
    keys = [MeanImages.key(pair.real, pair.attributes) for pair in pairs]
    if training is not None:
        made = {key: training.mean(key) for key in set(keys)}
        return [made[key] for key in keys]
    everyone = mean_of((load(pair.real), pair.attributes) for pair in pairs)

    def without(subject: str, key: tuple) -> np.ndarray | None:
        return everyone.mean(key, without=mean_of_subject(pairs, subject, key))

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


def mean_of_subject(pairs: list[Pair], subject: str, key: tuple) -> MeanImages:
    own = (pair for pair in pairs if pair.subject == subject)
    same = (pair for pair in own if MeanImages.key(pair.real, pair.attributes) == key)
    return mean_of((load(pair.real), pair.attributes) for pair in same)


def make_rows(
    pairs: list[Pair], baselines: Collection[str], *, training: MeanImages | None, seed: int
) -> dict[str, list[Image | None]]:
    """Every row of the table: an image (or None) for each pair. A row without any image is left out."""
    partners = random_partners(pairs, seed)
    rows: dict[str, list[Image | None]] = {
        "generated": [pair.generated[0] for pair in pairs],
        "reconstruction": [pair.reconstruction for pair in pairs],
    }
    if any(pair.source is not None for pair in pairs):
        rows["identity"] = [pair.source for pair in pairs]
    for name in dict.fromkeys(name for pair in pairs for name in pair.others):
        rows[name] = [pair.others.get(name) for pair in pairs]
    if "mean_image" in baselines:
        rows["mean_image"] = mean_images(pairs, training)
    if "random_real" in baselines:
        rows["random_real"] = [None if i is None else pairs[i].real for i in partners]
    if "shuffled" in baselines:
        rows["shuffled"] = [None if i is None else pairs[i].generated[0] for i in partners]
    return {name: images for name, images in rows.items() if any(image is not None for image in images)}
