"""Spatially adaptive normalisation. Park et al. 2019, "Semantic Image Synthesis with SPADE", Eq. 1."""

import math
import weakref
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.devices import full_precision


class SPADE(nn.Module):
    """Parameter-free norm of x, scaled and shifted by two maps computed from the condition.

    With `keeps_maps`, outside training, the maps of every condition tensor that is alive are kept: a sampler
    calls a denoiser with the same static map (or one for each window) at every step, and they do not depend
    on the step. A decoder uses each map once and keeps none.
    kernel_size: a number, or one per axis ([1, 3, 3] in Med-LSDM).
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
        keeps_maps: bool = False,
    ) -> None:
        super().__init__()
        conv = getattr(nn, f"Conv{spatial_dims}d")
        kernel_size = (kernel_size,) * spatial_dims if isinstance(kernel_size, int) else tuple(kernel_size)
        padding = tuple(size // 2 for size in kernel_size)
        self.groups = math.gcd(groups, channels) if groups else None
        self.shared = conv(map_channels, hidden_channels, kernel_size, padding=padding)
        self.gamma = conv(hidden_channels, channels, kernel_size, padding=padding)
        self.beta = conv(hidden_channels, channels, kernel_size, padding=padding)
        self.keeps_maps = keeps_maps
        self._kept: dict[int, tuple] = {}

    def modulation(self, spade: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        """gamma and beta, each (B, C, *size), from a map of any grid (nearest)."""
        if spade.shape[2:] != size:
            spade = F.interpolate(spade, size=size, mode="nearest")
        hidden = F.relu(self.shared(spade))
        return self.gamma(hidden), self.beta(hidden)

    def _modulation_kept(self, spade: Tensor, size: torch.Size) -> tuple[Tensor, Tensor]:
        if not self.keeps_maps or self.training or torch.is_grad_enabled():
            self._kept.clear()
            return self.modulation(spade, size)
        is_rounded = torch.is_autocast_enabled(spade.device.type)
        key, version = id(spade), (size, spade._version, self.gamma.weight._version, is_rounded)
        kept = self._kept.get(key)
        if kept is None or kept[0]() is not spade or kept[1] != version:
            self._kept = {k: entry for k, entry in self._kept.items() if entry[0]() is not None}
            kept = self._kept[key] = (weakref.ref(spade), version, self.modulation(spade, size))
        return kept[2]

    def forward(self, x: Tensor, spade: Tensor | None) -> Tensor:
        if spade is None:
            raise ValueError("a network built with SPADE norms needs condition.spade (B, C, *S)")
        gamma, beta = self._modulation_kept(spade, x.shape[2:])
        with full_precision(x.device):
            normed = F.group_norm(x, self.groups) if self.groups else F.instance_norm(x)
        return normed * (1 + gamma) + beta
