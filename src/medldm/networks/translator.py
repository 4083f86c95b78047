"""MS-SPADE: one translator of latents to any of K modalities. Kim and Park 2024, "ALDM"."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from medldm.batch import check_stated
from medldm.devices import full_precision
from medldm.networks.layers import conv

LEAK = 0.2


class SwitchedConv(nn.Module):
    """K convolutions of kernel 3; each sample goes through that of its class.

    The weights of a batch are gathered by an index on the device and applied as one grouped convolution. So
    the host waits for nothing, and classes that are not in the batch get a gradient of zero. The weights of
    all classes lie along the first axis, (K C_out, C_in, 3, 3[, 3]), as one convolution's would.
    """

    rounds_weights = True

    def __init__(self, spatial_dims: int, num_classes: int, in_channels: int, out_channels: int) -> None:
        super().__init__()
        shape = (num_classes * out_channels, in_channels, *(3,) * spatial_dims)
        self.num_classes = num_classes
        self.weight, self.bias = nn.Parameter(torch.empty(shape)), nn.Parameter(torch.empty(shape[0]))
        bound = 1 / math.sqrt(math.prod(shape[1:]))  # as nn.Conv does for a single one
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        self.apply_conv = getattr(F, f"conv{spatial_dims}d")

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """(B, C_in, *S), (B,) classes -> (B, C_out, *S)."""
        weight, bias = (
            p.unflatten(0, (self.num_classes, -1)).index_select(0, label).flatten(0, 1)
            for p in (self.weight, self.bias)
        )
        grouped = x.reshape(1, -1, *x.shape[2:])  # (1, B C_in, *S)
        out = self.apply_conv(grouped, weight, bias, padding=1, groups=len(x))
        return out.reshape(len(x), -1, *x.shape[2:])


class SwitchedSPADE(nn.Module):
    """An instance norm, scaled and shifted by maps that are computed from x itself, with weights of the
    target's class.

    For a sample of class k, out = norm(x) (1 + gamma_k(a)) + beta_k(a) with a = ReLU(shared_k(x)). gamma and
    beta are one convolution with twice the channels.
    """

    def __init__(self, spatial_dims: int, channels: int, *, num_classes: int, hidden_channels: int) -> None:
        super().__init__()
        self.shared = SwitchedConv(spatial_dims, num_classes, channels, hidden_channels)
        self.modulation = SwitchedConv(spatial_dims, num_classes, hidden_channels, 2 * channels)

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        gamma, beta = self.modulation(F.relu(self.shared(x, label)), label).chunk(2, dim=1)
        with full_precision(x.device):
            normed = F.instance_norm(x)
        return normed * (1 + gamma) + beta


class SwitchedBlock(nn.Module):
    """Switched norm, leaky ReLU and convolution, twice, with a shortcut; all classes share the convolutions.

    norm_on_shortcut: a third switched norm before the shortcut's convolution, as ALDM's first release has it.
    conv_skip: one more convolution of the input beside the block, as its second release has it.
    """

    is_block = True

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        num_classes: int,
        hidden_channels: int,
        norm_on_shortcut: bool = False,
        conv_skip: bool = False,
    ) -> None:
        super().__init__()
        middle = min(in_channels, out_channels)
        options = {"num_classes": num_classes, "hidden_channels": hidden_channels}
        self.norm1 = SwitchedSPADE(spatial_dims, in_channels, **options)
        self.conv1 = conv(spatial_dims, in_channels, middle, 3, padding=1)
        self.norm2 = SwitchedSPADE(spatial_dims, middle, **options)
        self.conv2 = conv(spatial_dims, middle, out_channels, 3, padding=1)
        is_wider = in_channels != out_channels
        self.shortcut_norm = (
            SwitchedSPADE(spatial_dims, in_channels, **options) if norm_on_shortcut and is_wider else None
        )
        self.shortcut = (
            conv(spatial_dims, in_channels, out_channels, 1, bias=False) if is_wider else nn.Identity()
        )
        self.skip = conv(spatial_dims, in_channels, out_channels, 3, padding=1) if conv_skip else None

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        """(B, C_in, *s), (B,) -> (B, C_out, *s)."""
        h = self.conv1(F.leaky_relu(self.norm1(x, label), LEAK))
        h = self.conv2(F.leaky_relu(self.norm2(h, label), LEAK))
        h = h + self.shortcut(x if self.shortcut_norm is None else self.shortcut_norm(x, label))
        return h if self.skip is None else h + self.skip(x)


class MSSPADE(nn.Module):
    """Blocks of the widths latent_channels, *channels, latent_channels, all on the latent grid; each sample
    has a target of its own.

    num_classes: the number of modalities K. hidden_channels: of the switched norms. norm_on_shortcut,
    conv_skip: see `SwitchedBlock`. use_checkpoint: blocks are computed again in the backward pass.
    """

    def __init__(
        self,
        spatial_dims: int,
        *,
        latent_channels: int,
        num_classes: int,
        channels: Sequence[int],
        hidden_channels: int = 64,
        norm_on_shortcut: bool = False,
        conv_skip: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        self.num_classes, self.use_checkpoint = num_classes, use_checkpoint
        widths = [latent_channels, *channels, latent_channels]
        self.blocks = nn.ModuleList(
            SwitchedBlock(
                spatial_dims,
                c_in,
                c_out,
                num_classes=num_classes,
                hidden_channels=hidden_channels,
                norm_on_shortcut=norm_on_shortcut,
                conv_skip=conv_skip,
            )
            for c_in, c_out in zip(widths[:-1], widths[1:], strict=True)
        )

    def forward(self, z: Tensor, label: Tensor) -> Tensor:
        """Latents (B, Cz, *s) of any modality, target classes (B,) in [0, K) -> latents of the targets."""
        check_stated(label)
        for block in self.blocks:
            if self.use_checkpoint and self.training and torch.is_grad_enabled():
                z = checkpoint(block, z, label, use_reentrant=False)
            else:
                z = block(z, label)
        return z

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradient norms set the adaptive adversarial weight."""
        return self.blocks[-1].conv2.weight
