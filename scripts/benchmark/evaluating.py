"""Rows of metrics: {variant: callable} that compute the same number in medldm and in MONAI."""

from collections.abc import Callable

import torch
from measuring import DEVICE


def ssim_3d(size: int = 96) -> dict[str, Callable]:
    """SSIM of one pair of volumes (Gaussian 11, sigma 1.5, range 1); raises where the two values differ."""
    from monai.metrics import SSIMMetric

    from medldm.metrics.image import ssim_gaussian

    generator = torch.Generator().manual_seed(0)
    real = torch.rand(1, 1, size, size, size, generator=generator)
    generated = (real + 0.1 * torch.randn(real.shape, generator=generator)).clamp(0, 1)
    real, generated = real.to(DEVICE), generated.to(DEVICE)
    theirs = SSIMMetric(spatial_dims=3, data_range=1.0)._compute_metric
    runs = {
        "MONAI SSIMMetric": lambda: theirs(generated, real),
        "medldm": lambda: ssim_gaussian(generated, real),
    }
    values = [float(run()) for run in runs.values()]
    if abs(values[0] - values[1]) > 2e-5:
        raise ValueError(f"SSIM of MONAI {values[0]:.6f}, of medldm {values[1]:.6f}: not the same number")
    return runs
