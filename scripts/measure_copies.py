"""Measures how often the audit for copies finds planted ones, and how often it takes new images for copies.

python scripts/measure_copies.py data=DATA [n=100] [size=128] [weights=true]

DATA is a prepared folder. Its subjects are dealt out into a training set, held-out images that set the
thresholds, and further held-out images that nobody copied. n of the training images are planted, as they are
and changed in several ways. A line for each way says which share of them is nearer to a training image than
every held-out one that sets the threshold. All is seeded: the same command gives the same numbers.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medldm.data.records import read_images
from medldm.evaluation.measure import measure_nearest
from medldm.evaluation.slices import SliceFeatures, axial_axis
from medldm.evaluation.tools import Tools
from medldm.metrics.memorization import audit_copies, thumbnails
from medldm.networks.features import build_features
from medldm.networks.lpips import LPIPS

NUM_SLICES = 16  # of a volume that Inception sees
NOISE = 0.1  # standard deviation on [-1, 1], a twentieth of the range
# Sign: larger is nearer.
MEASURES = {"nearest_train_correlation": 1, "nearest_train_perceptual": -1, "nearest_train_inception": -1}


def noisy(x: Tensor) -> Tensor:
    return (x + NOISE * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(-1, 1)


def windowed(x: Tensor) -> Tensor:
    return (0.5 * x + 0.3).clamp(-1, 1)


def shifted(x: Tensor, distance: int) -> Tensor:
    """By so many pixels along every axis, what leaves coming in on the other side."""
    axes = range(2, x.ndim)
    return x.roll([distance if axis % 2 else -distance for axis in axes], tuple(axes))


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "exact": lambda x: x,
    "mirrored": lambda x: x.flip(-1),
    "shifted by 1 pixel": partial(shifted, distance=1),
    "shifted by 2 pixels": partial(shifted, distance=2),
    "shifted by 3 pixels": partial(shifted, distance=3),
    "shifted by 4 pixels": partial(shifted, distance=4),
    "noisy, sd 1/20 of the range": noisy,
    "contrast halved, brighter": windowed,
    "all of these (shifted by 1 pixel)": lambda x: noisy(shifted(windowed(x).flip(-1), distance=1)),
}


def read(data: Path, size: int, limit: int) -> dict[str, Tensor]:
    """The images of each subject, resized to one size."""
    found: dict[str, list[Tensor]] = {}
    for record in read_images(data):
        kept = found.setdefault(record.subject, [])
        if len(kept) < limit:
            image = torch.from_numpy(np.asarray(record.image, np.float32))[None, :1]
            kept.append(F.interpolate(image, [size] * (image.ndim - 2), mode="area"))
    return {subject: torch.cat(images) for subject, images in found.items() if images}


def deal(images: dict[str, Tensor], num: int) -> tuple[Tensor, Tensor, Tensor]:
    """Deals out half of the subjects to train, a quarter to set thresholds and a quarter as new ones, with at
    most `num` images of the latter two.
    """
    subjects = sorted(images)
    order = [subjects[i] for i in np.random.default_rng(0).permutation(len(subjects))]
    ends = [0, len(order) // 2, 3 * len(order) // 4, len(order)]
    parts = [torch.cat([images[s] for s in order[a:b]]) for a, b in zip(ends, ends[1:], strict=False)]
    picked = [part[np.random.default_rng(1).permutation(len(part))] for part in parts]
    return picked[0], picked[1][:num], picked[2][:num]


def main() -> None:
    given = {"n": "100", "size": "128", "weights": "true"} | dict(a.split("=", 1) for a in sys.argv[1:])
    num, size = int(given["n"]), int(given["size"])
    train, held_out, new = deal(read(Path(given["data"]), size, limit=12), num)
    volumes = train.ndim == 5
    tools = Tools({}, recipe=None, axial_axis=axial_axis({}, {}) if volumes else None)
    if given["weights"] == "true":
        tools.lpips = LPIPS("alex")
        inception = build_features("inception", spatial_dims=2)
        depth = train.shape[tools.axial_axis + 2] if volumes else 0
        tools.networks = (
            {"inception_slices": SliceFeatures(inception, tools.axial_axis, min(NUM_SLICES, depth))}
            if volumes
            else {"inception": inception}
        )
    shape = tuple(train.shape[1:])
    with torch.no_grad():
        tools.train_thumbnails = {shape: torch.cat([thumbnails(x) for x in train.split(16)])}
        tools.train_embeddings = {
            name: {shape: torch.cat([embed(x) for x in train.split(4)])}
            for name, embed in tools.embedders().items()
        }

        def nearest(images: Tensor) -> dict[str, np.ndarray]:
            found = [measure_nearest(x, tools) for x in images.split(4)]
            return {k: np.concatenate([f[k] for f in found]) for k in MEASURES if k in found[0]}

        limits = nearest(held_out)
        print(f"{len(train)} training, {len(held_out)} held-out, {len(new)} new images of {list(shape)}")
        planted = train[: min(num, len(train))]
        sets = {"new, no copies": new} | {name: change(planted) for name, change in CHANGES.items()}
        for name, images in sets.items():
            rates = []
            for key, values in nearest(images).items():
                audit = audit_copies(MEASURES[key] * values, MEASURES[key] * limits[key])
                rates.append(f"{key} {audit.num_copies / audit.num_images:.3f}")
            print(f"{name} (n = {len(images)}): {', '.join(rates)}")


if __name__ == "__main__":
    main()
