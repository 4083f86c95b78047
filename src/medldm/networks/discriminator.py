"""PatchGAN discriminators in 2D and 3D. Isola et al. 2017."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from medldm.networks.layers import conv
from medldm.networks.norms import group_norm


def discriminator_norm(kind: str, spatial_dims: int, channels: int) -> nn.Module:
    """The norm of a `kind` that `PatchDiscriminator` knows."""
    if kind == "batch":
        return getattr(nn, f"BatchNorm{spatial_dims}d")(channels)
    if kind == "group":
        return group_norm(channels)
    if kind == "instance":
        return getattr(nn, f"InstanceNorm{spatial_dims}d")(channels)
    if kind == "none":
        return nn.Identity()
    raise ValueError(f"norm={kind} is none of batch, group, instance, none")


class PatchDiscriminator(nn.Module):
    """Convolutions of kernel 4 with leaky ReLU of slope 0.2; the first has no norm, a last one gives logits.

    channels, strides: one entry for each convolution before the last, whose stride is 1.
    norm: "batch", "group", "instance" or "none".
    bias_before_norm: gives biases to the convolutions that a norm follows, too. They have no effect;
    Med-LSDM's discriminators have them (with norm "batch" and padding 2: 2,764,481 parameters in 2D,
    11,049,665 in 3D).
    weight: of its adversarial term in the generator's loss, where there are several discriminators.
    `smallest_size` is the least length of an image's axes from which logits come out.
    """

    is_block = True

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
            raise ValueError(
                f"{len(channels)} channels but {len(strides)} strides; give one of each a convolution"
            )
        self.spatial_dims, self.weight = spatial_dims, weight
        self.smallest_size = smallest_input([*strides, 1], padding)
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
        """x (B, in_channels, *S) -> the features of each stage, for feature matching, and at the end the
        logits (B, out_channels, *S').
        """
        features = []
        for stage in self.stages:
            x = F.leaky_relu(stage(x), 0.2)
            features.append(x)
        return [*features, self.head(x)]


def smallest_input(strides: Sequence[int], padding: int) -> int:
    """The least length of an axis from which convolutions of kernel 4 with these strides, one after the
    other, make one value.
    """
    length = 1
    for stride in reversed(strides):
        length = max(1, (length - 1) * stride + 4 - 2 * padding)
    return length


def init_weights(module: nn.Module) -> None:
    """Draws a convolution's weights from N(0, 0.02^2), as pix2pix does, and sets its bias to zero."""
    if "Conv" in type(module).__name__:
        nn.init.normal_(module.weight, 0.0, 0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
