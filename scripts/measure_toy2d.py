"""Measures how far the samples of `medvdm/toy2d` lie from the swirl: python scripts/measure_toy2d.py RUN
[num_samples].
"""

import sys
from pathlib import Path

import numpy as np
import torch

from medldm.build import load_module
from medldm.data.phantoms.swirl import SwirlPoints, distance_to_swirl, to_grid
from medldm.plots import points_figure, save_png


def summary(name: str, points: np.ndarray) -> None:
    distance = distance_to_swirl(points)
    upper, share = np.quantile(distance, 0.95), (distance > 5).mean()
    print(f"{name:<10} mean {distance.mean():6.2f}  95% {upper:6.2f}  beyond 5: {share:.1%}")


def main() -> None:
    run, count = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 2000
    module = load_module(run / "checkpoints" / "last.ckpt")
    samples = module.generate(count, (), seed=1)
    data = SwirlPoints(count, 7).points
    print(f"distance to the curve in grid units of 256, n = {count}, {module.sampler.num_steps} steps:")
    summary("data", to_grid(data))
    summary("samples", to_grid(samples))
    summary("uniform", np.random.default_rng(0).uniform(0, 255, (count, 2)))
    nearest = torch.cdist(data.double(), samples.double()).min(1).values.mean() * 127.5
    print(f"mean distance of a data point to the nearest sample: {nearest:.2f} grid units")
    path = run / "samples" / "swirl.png"
    save_png(path, points_figure(data, samples))
    print(path)


if __name__ == "__main__":
    main()
