"""Paired image metrics: one value per image, averaged over images by `PairedMetric`.

The functions take (B, C, *S) tensors in [0, `data_range`], 2D or 3D alike, and return (B,) float64.
`PairedMetric` takes model images in [-1, 1] and maps them as `to_unit` does.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torchmetrics import Metric

from medldm.metrics.similarity import ssim

ImageFunction = Callable[[Tensor, Tensor], Tensor]


def to_unit(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1] in float64; what lies outside is clamped first."""
    return (x.double().clamp(-1, 1) + 1) / 2


def per_image(x: Tensor, region: Tensor | None = None) -> Tensor:
    """Mean over everything but the batch, or over a `region` (B, 1, *S) bool of it: (B, ...) -> (B,).

    NaN where the region is empty.
    """
    if region is None:
        return x.double().flatten(1).mean(1)
    weight = region.expand_as(x).flatten(1).double()
    return (x.double().flatten(1) * weight).sum(1) / weight.sum(1)


def mse(generated: Tensor, reference: Tensor, region: Tensor | None = None) -> Tensor:
    return per_image((generated.double() - reference.double()) ** 2, region)


def rmse(generated: Tensor, reference: Tensor, *, region: Tensor | None = None) -> Tensor:
    return mse(generated, reference, region).sqrt()


def mae(generated: Tensor, reference: Tensor, *, region: Tensor | None = None) -> Tensor:
    return per_image((generated.double() - reference.double()).abs(), region)


def psnr(
    generated: Tensor, reference: Tensor, *, data_range: float = 1.0, region: Tensor | None = None
) -> Tensor:
    """10 log10(range^2 / MSE) in dB; infinite for identical images."""
    return 10 * torch.log10(data_range**2 / mse(generated, reference, region))


def nmse_var(generated: Tensor, reference: Tensor) -> Tensor:
    """MSE / unbiased variance of the real image (the NMSE of ldm-medical-image).

    0 is perfect, (N - 1) / N the image's own mean everywhere, 2 an independent image of equal statistics.
    NaN where the real image is constant: such an image is counted as excluded.
    """
    variance = reference.double().flatten(1).var(1, unbiased=True)
    return mse(generated, reference) / variance.where(variance > 0, math.nan)


def nmse_energy(generated: Tensor, reference: Tensor, *, region: Tensor | None = None) -> Tensor:
    """||x - y||^2 / ||x||^2 with x the real image (fastMRI); NaN where the real image is all zero."""
    energy = per_image(reference.double() ** 2, region)
    return mse(generated, reference, region) / energy.where(energy > 0, math.nan)


ssim_gaussian = partial(ssim, window="gaussian", size=11, sigma=1.5, sample_covariance=False)


class PairedMetric(Metric):
    """Mean over images of a per-image function, e.g. `PairedMetric(ssim)`; images in [-1, 1].

    Images whose value is NaN (a constant real image in `nmse_var`) are left out, counted in `num_excluded`.
    """

    full_state_update = False

    def __init__(self, function: ImageFunction) -> None:
        super().__init__()
        self.function = function
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("num_images", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("num_excluded", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, generated: Tensor, reference: Tensor) -> None:
        if generated.shape != reference.shape:
            raise ValueError(f"generated {tuple(generated.shape)} against reference {tuple(reference.shape)}")
        values = self.function(to_unit(generated), to_unit(reference))
        valid = ~values.isnan()
        self.total += values[valid].sum()
        self.num_images += valid.sum()
        self.num_excluded += (~valid).sum()

    def compute(self) -> Tensor:
        return self.total / self.num_images
