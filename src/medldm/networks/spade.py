"""Spatially adaptive normalisation. Park et al. 2019, "Semantic Image Synthesis with SPADE", Eq. 1."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.devices import full_precision
from medldm.networks.biased import Biased
from medldm.networks.convolution import conv, convolve_as
from medldm.networks.norms import group_normed, is_split, scaled, summed_in_parts

EPS = 1e-5  # of the norms, as torch has it


class Modulation(NamedTuple):
    """What a condition's map makes of a norm: x -> norm(x) (1 + gamma) + beta."""

    gamma: Tensor  # (B, C, *s)
    beta: Tensor  # (B, C, *s)


# of the norms of each unit of a U-Net, by the unit's name; None for a norm that sees no map
Modulations = dict[str, tuple[Modulation | None, ...]]


class SPADE(nn.Module):
    """Norm of x without weights of its own, scaled and shifted by two maps computed from the condition's map.

    groups: of a group norm, as many of them as divide `channels`; None is an instance norm.
    kernel_size: of all three convolutions, a number or one per axis.
    """

    def __init__(
        self,
        spatial_dims: int,
        channels: int,
        *,
        map_channels: int,
        hidden_channels: int = 128,
        groups: int | None = None,
        kernel_size: int | Sequence[int] = 3,
    ) -> None:
        super().__init__()
        kernel_size = (kernel_size,) * spatial_dims if isinstance(kernel_size, int) else tuple(kernel_size)
        padding = tuple(size // 2 for size in kernel_size)
        self.num_groups = math.gcd(groups, channels) if groups else None
        self.shared = conv(spatial_dims, map_channels, hidden_channels, kernel_size, padding=padding)
        self.gamma = conv(spatial_dims, hidden_channels, channels, kernel_size, padding=padding)
        self.beta = conv(spatial_dims, hidden_channels, channels, kernel_size, padding=padding)

    def modulation(self, spade: Tensor, size: torch.Size) -> Modulation:
        """The modulation of activations on a grid of `size`, from a map (B, map_channels, *any), which is
        resized by nearest neighbours.
        """
        hidden = self.hidden(spade, size)
        if self.gamma.weight.dtype == torch.float32:
            return Modulation(self.gamma(hidden), self.beta(hidden))
        return Modulation(*self.both(hidden, self.of_both("bias")).chunk(2, dim=1))

    def hidden(self, spade: Tensor, size: torch.Size) -> Tensor:
        """What gamma and beta are convolutions of, (B, hidden_channels, *size)."""
        if spade.shape[2:] != size:
            spade = F.interpolate(spade, size=size, mode="nearest")
        return F.relu(self.shared(spade))

    def both(self, hidden: Tensor, bias: Tensor | None) -> Tensor:
        """gamma and beta, one after the other along the channels, by one convolution that reads the hidden
        channels once. For weights that have been rounded for a GPU: in float32 on a CPU it would change the
        order of sums in their gradients, and with it the weights of a seeded run.
        """
        return convolve_as(self.gamma, hidden, self.of_both("weight"), bias)

    def of_both(self, name: str) -> Tensor:
        return torch.cat([getattr(layer, name) for layer in (self.gamma, self.beta)])

    def forward(
        self,
        x: Tensor,
        spade: Tensor | Modulation | None,
        embedding: Tensor | None = None,
        *,
        offset: Tensor | None = None,
    ) -> Tensor:
        """x (B, C, *s), and the map or what `modulation` has made of it -> (B, C, *s). embedding: as of
        `GroupNorm`. offset: see `group_normed`.
        """
        if spade is None:
            raise ValueError("a network built with SPADE norms needs condition.spade (B, C, *S)")
        if self.num_groups and is_split(x) and not isinstance(spade, Modulation):
            maps = self.both(self.hidden(spade, x.shape[2:]), None)
            biases = (self.gamma.bias[None], self.beta.bias[None])
            return summed_in_parts(x, self.num_groups, EPS, biases, offset, maps=maps, embedding=embedding)
        gamma, beta = spade if isinstance(spade, Modulation) else self.modulation(spade, x.shape[2:])
        return scaled(self.normed(x, offset) * (1 + gamma) + beta, embedding)

    def normed(self, x: Tensor, offset: Tensor | None) -> Tensor:
        if self.num_groups:
            return group_normed(x, self.num_groups, eps=EPS, offset=offset)
        x = x if offset is None else Biased(x, offset).summed()  # no effect, but a gradient: zero
        with full_precision(x.device):
            return F.instance_norm(x)
