"""PatchGAN discriminators in 2D and 3D. Isola et al. 2017."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from medldm.networks.layers import conv, group_norm


def discriminator_norm(kind: str, spatial_dims: int, channels: int) -> nn.Module:
    if kind == "batch":
        return getattr(nn, f"BatchNorm{spatial_dims}d")(channels)
    if kind == "group":
        return group_norm(channels)
    if kind == "instance":
        return getattr(nn, f"InstanceNorm{spatial_dims}d")(channels)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"discriminator norm '{kind}' is none of batch, group, instance, none")


class PatchDiscriminator(nn.Module):
    """Convolutions of kernel 4 with leaky ReLU 0.2; the first has no norm, the last gives the logits.

    bias_before_norm: biases in convolutions that a norm follows. They have no effect, but
    Med-LSDM's counts include them (norm "batch", padding 2: 2,764,481 in 2D and 11,049,665 in 3D).
    weight: of its adversarial term among those of several discriminators, in the generator's loss.
    Returns every stage's features, logits (B, out_channels, *S') last: feature matching needs them all.
    """

    def __init__(
        self,
        spatial_dims: int,
        *,
        channels: Sequence[int] = (64, 128, 256),
        strides: Sequence[int] = (2, 2, 2),
        norm: str = "batch",
        padding: int = 1,
        bias_before_norm: bool = False,
        weight: float = 1.0,
        in_channels: int = 1,
        out_channels: int = 1,
    ) -> None:
        super().__init__()
        if len(channels) != len(strides):
            raise ValueError(f"discriminator: {len(channels)} channels but {len(strides)} strides")
        self.spatial_dims, self.weight = spatial_dims, weight
        stages, width = [], in_channels
        for i, (out, stride) in enumerate(zip(channels, strides, strict=True)):
            has_norm = i > 0 and norm != "none"
            has_bias = bias_before_norm or not has_norm
            layer = conv(spatial_dims, width, out, 4, stride=stride, padding=padding, bias=has_bias)
            stages.append(
                nn.Sequential(
                    layer, discriminator_norm(norm, spatial_dims, out) if has_norm else nn.Identity()
                )
            )
            width = out
        self.stages = nn.ModuleList(stages)
        self.head = conv(spatial_dims, width, out_channels, 4, stride=1, padding=padding)
        self.apply(init_weights)

    def forward(self, x: Tensor) -> list[Tensor]:
        features = []
        for stage in self.stages:
            x = F.leaky_relu(stage(x), 0.2)
            features.append(x)
        return [*features, self.head(x)]


def init_weights(module: nn.Module) -> None:
    """N(0, 0.02) on convolutions, as in pix2pix."""
    if "Conv" in type(module).__name__:
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
