"""Shows the generated images that are nearest to a training image, each beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch

from medldm.evaluation.baselines import TrainingSet
from medldm.evaluation.browsing import to_bytes
from medldm.evaluation.folders import read_matching
from medldm.evaluation.foreign import Reading
from medldm.evaluation.pairs import Pair
from medldm.evaluation.panels import upright
from medldm.evaluation.stored import load
from medldm.files import replacing
from medldm.metrics.memorization import nearest_training, thumbnail_shape

CLOSEST_FOLDER = "closest"
PICTURE_SIDE = 512  # pixels of a picture of one image
GAP = 8


def name_closest(memorization: dict[str, Any], pairs: list[Pair], training: TrainingSet | None) -> None:
    """Add `train_id`, the training image that each of the closest correlates with, to the content of
    metrics.json.
    """
    by_id = {pair.id: pair for pair in pairs}
    for entry in memorization.get("closest", ()):
        image = np.asarray(load(by_id[entry["id"]].generated[0]), np.float32)
        known = training.thumbnails[image.shape].view(-1, *thumbnail_shape(image.shape))
        _, index = nearest_training(torch.from_numpy(image)[None], known)
        entry["train_id"] = training.names[image.shape][int(index)]


def write_closest(
    output: Path,
    memorization: Mapping[str, Any],
    pairs: list[Pair],
    train: Path | None,
    reading: Reading,
    orientation: str,
) -> None:
    """<output>/closest/<k>.png: the k-th closest generated image on the left, its training image on the
    right; of volumes the middle slice of each plane. What an earlier evaluation left is deleted.
    """
    folder = output / CLOSEST_FOLDER
    for path in folder.glob("*.png"):
        path.unlink()
    closest = [entry for entry in memorization.get("closest", ()) if "train_id" in entry]
    if not closest:
        return
    known = read_matching(train, {entry["train_id"] for entry in closest}, output, reading)
    by_id = {pair.id: pair for pair in pairs}
    for number, entry in enumerate(closest):
        both = (by_id[entry["id"]].generated[0], known[entry["train_id"]].image)
        pictures = [flat_picture(np.asarray(load(image), np.float32), orientation) for image in both]
        with replacing(folder / f"{number}.png") as temporary:
            temporary.write_bytes(cv2.imencode(".png", beside(pictures))[1].tobytes())


def flat_picture(image: np.ndarray, orientation: str) -> np.ndarray:
    """(C, *S) in [-1, 1] -> (H, W) uint8: the first channel, of a volume the middle slices of its planes one
    below the other.
    """
    if image.ndim == 3:
        return to_bytes(image[0], "grey")
    volume = to_bytes(upright(image[0], orientation), "grey")
    slices = [volume.take(volume.shape[axis] // 2, axis=axis) for axis in range(3)]
    width = max(piece.shape[1] for piece in slices)
    return np.concatenate([np.pad(piece, ((0, 0), (0, width - piece.shape[1]))) for piece in slices])


def beside(pictures: list[np.ndarray]) -> np.ndarray:
    """Two pictures of one size with a grey line between them, enlarged or shrunk to a handy size."""
    scale = PICTURE_SIDE / max(pictures[0].shape)
    scale = float(int(scale)) if scale >= 1 else scale
    mode = cv2.INTER_NEAREST if scale >= 1 else cv2.INTER_AREA
    left, right = (cv2.resize(picture, None, fx=scale, fy=scale, interpolation=mode) for picture in pictures)
    return np.concatenate([left, np.full((len(left), GAP), 128, np.uint8), right], axis=1)
