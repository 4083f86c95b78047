"""Score networks of variational diffusion (Kingma et al. 2021): the residual MLP of the notebook
SimpleDiffusionColab (google-research/vdm) and the network for pixels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.networks.layers import sinusoidal_embedding
from medldm.networks.options import check_one_of
from medldm.networks.spade import Modulations
from medldm.networks.unet import UNet

ACTIVATIONS = {"gelu": F.gelu, "swish": F.silu}
FILMS = ("shift", "scale_shift")


class ResidualLinear(nn.Module):
    """Layer norm, activation and linear layer, twice, with a residual connection. The second linear layer
    starts at zero; the condition enters between the two, see `ResidualMLP`.
    """

    def __init__(
        self,
        channels: int,
        *,
        middle_channels: int,
        condition_channels: int = 0,
        film: str = "shift",
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm1, self.linear1 = nn.LayerNorm(channels), nn.Linear(channels, middle_channels)
        self.norm2, self.linear2 = nn.LayerNorm(middle_channels), nn.Linear(middle_channels, channels)
        nn.init.zeros_(self.linear2.weight)
        self.scales = film == "scale_shift"
        width = middle_channels * (1 + self.scales)
        self.condition = nn.Linear(condition_channels, width, bias=False) if condition_channels else None

    def forward(self, h: Tensor, condition: Tensor | None) -> Tensor:
        """(B, C), condition (B, E) -> (B, C)."""
        x = self.linear1(self.activation(self.norm1(h)))
        if self.condition is not None and condition is not None:
            shift = self.condition(condition)
            if self.scales:
                scale, shift = shift.chunk(2, dim=1)
                x = x * (1 + scale)
            x = x + shift
        return h + self.linear2(self.activation(self.norm2(x)))


class ResidualMLP(nn.ModuleList):
    """`num_blocks` blocks of `ResidualLinear`, the identity before training.

    film: how the condition enters, "shift" adds a projection of it, "scale_shift" scales by another one
    first.
    activation: "gelu" or "swish". options: the others of `ResidualLinear`.
    """

    is_block = True

    def __init__(
        self, channels: int, num_blocks: int, *, film: str = "shift", activation: str = "gelu", **options
    ):
        check_one_of("film", film, FILMS)
        check_one_of("activation", activation, tuple(ACTIVATIONS))
        blocks = (
            ResidualLinear(channels, film=film, activation=activation, **options) for _ in range(num_blocks)
        )
        super().__init__(blocks)

    def forward(self, h: Tensor, condition: Tensor | None = None) -> Tensor:
        for block in self:
            h = block(h, condition)
        return h


def fourier_features(x: Tensor, first: int, last: int) -> Tensor:
    """(B, C, *S) -> (B, 2 C n, *S) for n = last - first: the sines, then the cosines, of 2 pi 2^k x for k in
    [first, last). Appendix C, Kingma et al. 2021.
    """
    powers = 2.0 ** torch.arange(first, last, dtype=torch.float32, device=x.device) * 2 * math.pi
    angles = (x.float()[:, :, None] * powers.reshape((1, 1, -1) + (1,) * (x.ndim - 2))).flatten(1, 2)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class ScoreNet(nn.Module):
    """noise_hat = z + output(blocks(input(z))) of latents that are vectors (B, D), D = `in_channels`.

    The embeddings of the time and of the label (zeros where there is none) go side by side through an MLP,
    whose output enters every block.
    embedding_channels: E, the width of both embeddings and of the blocks. Where E = D the projection to the
    output is left out, as in SimpleDiffusionColab.
    fourier: [first, last) of the Fourier features of z that are added to the input, None for none.
    Maps and tokens are refused: `spade_channels` and `context_channels` must be None or 0.
    """

    is_block = True

    def __init__(
        self,
        spatial_dims: int,
        *,
        in_channels: int,
        out_channels: int,
        embedding_channels: int = 128,
        num_blocks: int = 10,
        middle_channels: int = 1024,
        fourier: Sequence[int] | None = None,
        film: str = "shift",
        activation: str = "gelu",
        spade_channels: int | None = None,
        context_channels: int | None = None,
    ) -> None:
        super().__init__()
        if spade_channels or context_channels:
            raise ValueError(
                "a ScoreNet takes neither maps nor tokens (spade_channels, context_channels); choose "
                "conditions without them"
            )
        width = embedding_channels
        self.embedding_channels, self.fourier = width, tuple(fourier) if fourier else None
        num_features = 2 * in_channels * (self.fourier[1] - self.fourier[0]) if self.fourier else 0
        self.condition = nn.Sequential(
            nn.Linear(2 * width, 4 * width),
            nn.SiLU(),
            nn.Linear(4 * width, 4 * width),
            nn.SiLU(),
            nn.Linear(4 * width, width),
        )
        self.input = nn.Linear(in_channels + num_features, width)
        self.blocks = ResidualMLP(
            width,
            num_blocks,
            middle_channels=middle_channels,
            condition_channels=width,
            film=film,
            activation=activation,
        )
        self.output = nn.Identity() if width == out_channels else nn.Linear(width, out_channels)

    def forward(self, z_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """z_t (B, D), t (B,) in [0, 1000) -> noise_hat (B, D)."""
        dtype = self.input.weight.dtype
        time = sinusoidal_embedding(t, self.embedding_channels).to(dtype)
        label = torch.zeros_like(time) if condition.embedding is None else condition.embedding.to(dtype)
        e = self.condition(torch.cat([time, label], dim=1))
        z = z_t.to(dtype)
        h = torch.cat([z, fourier_features(z, *self.fourier).to(dtype)], dim=1) if self.fourier else z
        return z_t + self.output(self.blocks(self.input(h), e))


class PixelScoreNet(nn.Module):
    """noise_hat = z + U-Net(z, Fourier features of z): the network of Kingma et al. 2021 for pixels, with the
    U-Net of this package.

    unet: builds the U-Net. With one entry in its `channels` it has no downsampling and is the published
    network at full resolution, which has `num_res_blocks` blocks and attention in the middle alone. More
    entries make images of 256 x 256 feasible. Two things differ from the publication. The time enters each
    block through a linear layer with a bias and the usual initial weights; there it has no bias and starts at
    zero. The exponents of the time's sinusoids are i / half; there they are i / (half - 1).
    """

    def __init__(
        self,
        spatial_dims: int,
        *,
        in_channels: int,
        out_channels: int,
        unet: Callable[..., UNet],
        embedding_channels: int,
        fourier: Sequence[int] = (6, 8),
        **condition_channels: int | None,
    ) -> None:
        super().__init__()
        self.fourier, self.embedding_channels = tuple(fourier), embedding_channels
        num_features = 2 * out_channels * (self.fourier[1] - self.fourier[0])
        self.unet = unet(
            spatial_dims,
            in_channels=in_channels + num_features,
            out_channels=out_channels,
            embedding_channels=embedding_channels,
            **condition_channels,
        )

    def forward(self, z_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """z_t (B, C, *S), t (B,) in [0, 1000), condition -> noise_hat (B, C, *S)."""
        features = fourier_features(z_t, *self.fourier).to(z_t.dtype)
        return z_t + self.unet(torch.cat([z_t, features], dim=1), t, condition)

    def modulations(self, spade: Tensor, size: Sequence[int]) -> Modulations:
        """See `UNet.modulations`."""
        return self.unet.modulations(spade, size)
