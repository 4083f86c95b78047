"""Paths: how signal and noise are mixed at a level gamma, z = alpha x + sigma noise, (sigma / alpha)^2 =
exp(gamma).

A path has one natural parameter s, along which z moves at the velocity v = alpha' x + sigma' noise. For all
paths alpha sigma' - sigma alpha' = 1, so that x = sigma' z - sigma v and noise = alpha v - alpha' z.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Scales(NamedTuple):
    """The scales alpha and sigma of signal and noise, and their derivatives by the natural parameter s of the
    path.
    """

    alpha: Tensor
    sigma: Tensor
    alpha_slope: Tensor
    sigma_slope: Tensor

    def mix(self, x: Tensor, noise: Tensor) -> Tensor:
        """The noised z = alpha x + sigma noise at this level."""
        return self.alpha * x + self.sigma * noise

    def velocity(self, x: Tensor, noise: Tensor) -> Tensor:
        """The derivative dz / ds of the noised z by the path's natural parameter."""
        return self.sigma_slope * noise + self.alpha_slope * x


class Path(Protocol):
    """A path. Its functions take gamma = -log SNR of any shape; -inf is clean data, with alpha = 1 and sigma
    = 0.
    """

    def powers(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        """alpha^2 and sigma^2, of the shape of gamma."""

    def scales(self, gamma: Tensor) -> Scales:
        """alpha, sigma and their derivatives, of the shape of gamma."""

    def prior_std(self, gamma: Tensor) -> Tensor:
        """The deviation of the noise that sampling starts from at this level."""


class VariancePreserving:
    """alpha^2 + sigma^2 = 1: s is the angle between signal and noise. Ho et al. 2020; Salimans & Ho 2022."""

    def powers(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(-gamma), torch.sigmoid(gamma)

    def scales(self, gamma: Tensor) -> Scales:
        alpha, sigma = (power.sqrt() for power in self.powers(gamma))
        return Scales(alpha, sigma, -sigma, alpha)

    def prior_std(self, gamma: Tensor) -> Tensor:
        return torch.ones_like(gamma)


class LinearInterpolation:
    """alpha + sigma = 1: s = sigma, and the velocity is noise - x. Rectified flow, Liu et al. 2022."""

    def powers(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(-gamma / 2).square(), torch.sigmoid(gamma / 2).square()

    def scales(self, gamma: Tensor) -> Scales:
        one = torch.ones_like(gamma)
        return Scales(torch.sigmoid(-gamma / 2), torch.sigmoid(gamma / 2), -one, one)

    def prior_std(self, gamma: Tensor) -> Tensor:
        return torch.ones_like(gamma)


class VarianceExploding:
    """alpha = 1: s = sigma, and the velocity is the noise. Song et al. 2021; Karras et al. 2022."""

    def powers(self, gamma: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(gamma), gamma.exp()

    def scales(self, gamma: Tensor) -> Scales:
        one, sigma = torch.ones_like(gamma), torch.exp(gamma / 2)
        return Scales(one, sigma, torch.zeros_like(gamma), one)

    def prior_std(self, gamma: Tensor) -> Tensor:
        return torch.exp(gamma / 2)


VARIANCE_PRESERVING = VariancePreserving()
