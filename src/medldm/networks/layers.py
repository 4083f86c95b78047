"""Building blocks of every network: dimension-free convolutions, norms in half precision, attention."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.devices import full_precision
from medldm.networks.biased import Biased, parted, pointwise, pointwise_without_bias, without_bias
from medldm.networks.compiling import checkpointed, is_compiling
from medldm.networks.convolution import conv, conv_transpose
from medldm.networks.norms import as_summed, group_norm
from medldm.networks.options import check_one_of
from medldm.networks.spade import SPADE, Modulation

Norm = Callable[[int], nn.Module]
RESAMPLINGS = ("conv4", "conv3", "conv3_end")  # kinds of `Downsample` and `Upsample`


def last_layer_of_image(layer: nn.Module, x: Tensor) -> Tensor:
    """`layer(x)`, the image or latent that a network hands out, in float32 where no gradient is recorded: in
    bf16 an image that spans 1,000 HU has steps of 3.9 HU. Training keeps its mixed precision, which takes
    half of the memory.
    """
    if torch.is_grad_enabled():
        return layer(x)
    with full_precision(x.device):
        return layer(x.to(torch.promote_types(x.dtype, torch.float32)))


def per_axis(value: int | Sequence[int], spatial_dims: int) -> tuple[int, ...]:
    """One number per axis, from one for all axes or from a sequence. Raises ValueError for a sequence of
    another length.
    """
    values = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(values) != spatial_dims:
        raise ValueError(f"{values} has {len(values)} entries for {spatial_dims} spatial axes")
    return values


def zero_init(module: nn.Module) -> nn.Module:
    """The module, with all its parameters set to zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def apply_norm(
    norm: nn.Module,
    x: Tensor,
    spade: Tensor | Modulation | None,
    embedding: Tensor | None = None,
    *,
    offset: Tensor | None = None,
) -> Tensor:
    """A plain norm of x, or a SPADE norm under its map, scaled and shifted by the two halves of an embedding
    (B, 2 C, 1 ..). offset: see `group_normed`.
    """
    if isinstance(norm, SPADE):
        return norm(x, spade, embedding, offset=offset)
    return norm(x, embedding, offset=offset)


def sinusoidal_embedding(t: Tensor, channels: int, *, max_period: float = 10_000.0) -> Tensor:
    """(B,) times -> (B, channels): sines then cosines of t * max_period^(-i / half). Vaswani et al. 2017."""
    half = channels // 2
    exponents = torch.arange(half, device=t.device, dtype=torch.float32) / half
    angles = t.float()[:, None] * torch.exp(-math.log(max_period) * exponents)
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, channels % 2))


class Projected(NamedTuple):
    """What the layer `embedding` of a `ResBlock` has made of an embedding."""

    value: Tensor  # (B, width)


class ResBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with a shortcut around them. The embedding is added after the first
    convolution.

    shortcut: "auto" is the identity where the widths agree and a convolution of kernel 1 where not, "always"
    is that convolution in every block. "none" leaves the shortcut and the second convolution out, as the
    blocks of ALDM's releases of 2023 and 2024 do.
    kernel_size: a number, or one per axis; [1, 3, 3] keeps slices apart.
    scale_shift: the embedding scales and shifts the output of the second norm instead (Dhariwal and Nichol
    2021).
    embedding_channels: 0 where there is none.
    use_checkpoint: the block is computed again in the backward pass, which saves memory.
    """

    is_block = takes_biased = gives_biased = True

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        norm: Norm,
        embedding_channels: int = 0,
        shortcut: str = "auto",
        dropout: float = 0.0,
        zero_init_last: bool = False,
        padding_mode: str = "zeros",
        kernel_size: int | Sequence[int] = 3,
        scale_shift: bool = False,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        check_one_of("shortcut", shortcut, ("auto", "always", "none"))
        kernel = per_axis(kernel_size, spatial_dims)
        padding = tuple(size // 2 for size in kernel)
        kwargs = {"kernel_size": kernel, "padding": padding, "padding_mode": padding_mode}
        self.use_checkpoint, self.scale_shift = use_checkpoint, scale_shift
        self.norm1 = norm(in_channels)
        self.conv1 = conv(spatial_dims, in_channels, out_channels, **kwargs)
        width = out_channels * (1 + scale_shift)
        self.embedding = nn.Linear(embedding_channels, width) if embedding_channels else None
        self.truncated = shortcut == "none"
        if self.truncated and scale_shift:
            raise ValueError("scale_shift=True acts on the second norm, which shortcut=none leaves out")
        if self.truncated:
            return
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = conv(spatial_dims, out_channels, out_channels, **kwargs)
        if zero_init_last:
            zero_init(self.conv2)
        has_projection = shortcut == "always" or in_channels != out_channels
        self.shortcut = (
            conv(spatial_dims, in_channels, out_channels, kernel_size=1) if has_projection else nn.Identity()
        )

    def forward(
        self,
        x: Tensor | Biased,
        embedding: Tensor | Projected | None = None,
        spade: Tensor | tuple[Modulation | None, ...] | None = None,
        *,
        apart: bool = False,
    ) -> Tensor | Biased:
        """x (B, C, *S), activated embedding (B, E) or what the block's layer has made of it, and for SPADE
        norms the map (B, C, *any) or what `modulations` has made of it -> (B, C_out, *S). apart: leaves the
        bias to what comes next.
        """
        if self.use_checkpoint and self.training and torch.is_grad_enabled():
            return checkpointed(self, self._forward, x, embedding, spade, apart)
        return self._forward(x, embedding, spade, apart)

    def _forward(
        self, x: Tensor | Biased, embedding: Tensor | Projected | None, spade: Any, apart: bool
    ) -> Tensor | Biased:
        maps = spade if isinstance(spade, tuple) else (spade, spade)
        given, offset = parted(x)
        h = F.silu(apply_norm(self.norm1, given, maps[0], offset=offset))
        joins = is_compiling() or apart or offset is not None  # biases join the norm that follows
        h, bias = without_bias(self.conv1, h) if joins else (self.conv1(h), None)
        e = self.embedded(embedding, h)
        if e is not None and not self.scale_shift:
            h, bias = (h, bias + e.flatten(1)) if joins else (h + e, None)
        if not self.truncated:
            h = apply_norm(self.norm2, h, maps[1], e if self.scale_shift else None, offset=bias)
            h = self.dropout(F.silu(h))
            if not joins:
                # in this order: the sum takes the layout of its first term
                return self.conv2(h) + pointwise(self.shortcut, given)
            h, bias = without_bias(self.conv2, h)
            shortcut, offset = pointwise_without_bias(self.shortcut, given, offset)
            h, bias = h + shortcut, bias if offset is None else bias + offset
        if bias is None:
            return h
        return Biased(h, bias) if apart else Biased(h, bias).summed()

    def modulations(self, spade: Tensor, size: torch.Size) -> tuple[Modulation | None, ...]:
        """What each norm computes from a map (B, C, *any) alone, for x on a grid of `size`; None for a plain
        norm.
        """
        norms = (self.norm1,) if self.truncated else (self.norm1, self.norm2)
        return tuple(norm.modulation(spade, size) if isinstance(norm, SPADE) else None for norm in norms)

    def embedded(self, embedding: Tensor | Projected | None, h: Tensor) -> Tensor | None:
        if self.embedding is None:
            return None
        if embedding is None:
            raise ValueError("this block was built with a time embedding and got none")
        e = embedding.value if isinstance(embedding, Projected) else self.embedding(embedding)
        return e.reshape(e.shape + (1,) * (h.ndim - 2)).to(h.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Multi-head scaled dot-product attention over (B, L, C) tokens."""

    def split(x: Tensor) -> Tensor:
        return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, heads, L, C / heads)

    return F.scaled_dot_product_attention(split(q), split(k), split(v)).transpose(1, 2).flatten(2)


def heads_for(channels: int, num_heads: int | None, head_channels: int | None) -> int:
    """The number of heads of attention over `channels`, from their number or the width of each."""
    heads = num_heads if head_channels is None else max(1, channels // head_channels)
    if heads is None:
        raise ValueError("attention needs num_heads or head_channels")
    if channels % heads:
        raise ValueError(f"{channels} channels of attention do not split over {heads} heads")
    return heads


class AttentionBlock(nn.Module):
    """Group norm and self-attention over all positions, with a residual connection; `context` is not used."""

    is_block = takes_biased = gives_biased = True

    def __init__(
        self,
        channels: int,
        *,
        num_heads: int | None = None,
        head_channels: int | None = None,
        groups: int = 32,
        zero_init_last: bool = False,
    ) -> None:
        super().__init__()
        self.num_heads = heads_for(channels, num_heads, head_channels)
        self.norm = group_norm(channels, groups=groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        if zero_init_last:
            zero_init(self.out)

    def forward(
        self, x: Tensor | Biased, context: Tensor | None = None, *, apart: bool = False
    ) -> Tensor | Biased:
        """(B, C, *S) -> the same shape. apart: leaves the bias to what comes next."""
        x, offset = parted(x)
        tokens = self.norm(x, offset=offset).flatten(2).transpose(1, 2)  # (B, L, C)
        out = attend(*self.qkv(tokens).chunk(3, dim=-1), self.num_heads)
        if not apart and offset is None:
            return x + self.out(out).transpose(1, 2).reshape(x.shape)
        value = x + F.linear(out, self.out.weight).transpose(1, 2).reshape(x.shape)
        bias = as_summed(self.out.bias)[None]
        out = Biased(value, bias if offset is None else bias + offset)
        return out if apart else out.summed()


class TransformerBlock(nn.Module):
    """The transformer block of latent diffusion: self-attention over all positions, cross-attention to the
    tokens `context` (B, L, context_channels), and a feed-forward layer with GEGLU. Rombach et al. 2022.
    """

    is_block = True

    def __init__(
        self,
        channels: int,
        *,
        context_channels: int,
        num_heads: int | None = None,
        head_channels: int | None = None,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.num_heads = heads_for(channels, num_heads, head_channels)
        self.norm = group_norm(channels, groups=groups)
        self.proj_in = nn.Linear(channels, channels)
        self.norm_self, self.norm_cross, self.norm_ff = (nn.LayerNorm(channels) for _ in range(3))
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.out_self = nn.Linear(channels, channels)
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(context_channels, 2 * channels, bias=False)
        self.out_cross = nn.Linear(channels, channels)
        self.ff_in = nn.Linear(channels, 8 * channels)
        self.ff_out = nn.Linear(4 * channels, channels)
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        if context is None:
            raise ValueError("a network built with context_channels needs condition.context (B, L, C)")
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, L, C)
        h = h + self.out_self(attend(*self.qkv(self.norm_self(h)).chunk(3, dim=-1), self.num_heads))
        q, (k, v) = self.q(self.norm_cross(h)), self.kv(context).chunk(2, dim=-1)
        h = h + self.out_cross(attend(q, k, v, self.num_heads))
        gate, value = self.ff_in(self.norm_ff(h)).chunk(2, dim=-1)
        h = h + self.ff_out(value * F.gelu(gate))
        return x + self.proj_out(h).transpose(1, 2).reshape(x.shape)


class Downsample(nn.Module):
    """A strided convolution, which divides the grid by `stride` (a number or one per axis).

    kind: "conv4" has kernel 4 and padding 1, "conv3" kernel 3 and padding 1, "conv3_end" kernel 3 and one
    zero at the end of each axis, as latent diffusion of CompVis and ALDM have it.
    flat_kernel: the kernel is 1 along axes of stride 1, and 3 otherwise.
    """

    is_block = True
    takes_biased, gives_biased = False, True

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        stride: int | Sequence[int] = 2,
        kind: str = "conv4",
        padding_mode: str = "zeros",
        flat_kernel: bool = False,
    ) -> None:
        super().__init__()
        check_one_of("kind", kind, RESAMPLINGS)
        self.strides = strides = per_axis(stride, spatial_dims)
        flat = 1 if flat_kernel else 3
        kernels = tuple(flat if s == 1 else 4 if kind == "conv4" else 3 for s in strides)
        pads_at_end = kind == "conv3_end"
        self.pad = (
            [
                p
                for s, k in zip(strides[::-1], kernels[::-1], strict=True)
                for p in ((0, 1) if s > 1 else (k // 2,) * 2)
            ]
            if pads_at_end
            else None
        )
        self.conv = conv(
            spatial_dims,
            in_channels,
            out_channels,
            kernel_size=kernels,
            stride=strides,
            padding=0 if pads_at_end else tuple(int(k > 1) for k in kernels),
            padding_mode=padding_mode,
        )

    def forward(self, x: Tensor, *, apart: bool = False) -> Tensor | Biased:
        """apart: leaves the bias to what comes next."""
        x = F.pad(x, self.pad) if self.pad else x
        return without_bias(self.conv, x) if apart else self.conv(x)


class Upsample(nn.Module):
    """Multiplies the grid by `stride` (a number or one per axis).

    kind: "conv4" is a transposed convolution of kernel 4, "conv3" and "conv3_end" repeat each value and apply
    a convolution of kernel 3.
    padding_mode: "replicate" makes a transposed convolution repeat the border of its input (TATS, Med-LSDM).
    flat_kernel: the kernel is 1 along axes of stride 1, and 3 otherwise.
    """

    is_block = True
    takes_biased, gives_biased = False, True

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        stride: int | Sequence[int] = 2,
        kind: str = "conv4",
        padding_mode: str = "zeros",
        flat_kernel: bool = False,
    ) -> None:
        super().__init__()
        self.strides = strides = per_axis(stride, spatial_dims)
        self.pad_mode = None if padding_mode == "zeros" or kind != "conv4" else padding_mode
        self.scale = None if kind == "conv4" else tuple(float(s) for s in strides)
        if kind == "conv4":
            kernels = tuple(4 if s > 1 else 1 if flat_kernel else 3 for s in strides)
            padding = tuple(0 if k == 1 else k - 1 if self.pad_mode else 1 for k in kernels)
            self.pad = [p for k in reversed(kernels) for p in (int(k > 1),) * 2]
            self.conv = conv_transpose(
                spatial_dims, in_channels, out_channels, kernel_size=kernels, stride=strides, padding=padding
            )
        else:
            kernels = tuple(1 if s == 1 and flat_kernel else 3 for s in strides)
            padding = tuple(k // 2 for k in kernels)
            self.conv = conv(
                spatial_dims,
                in_channels,
                out_channels,
                kernel_size=kernels,
                padding=padding,
                padding_mode=padding_mode,
            )

    def forward(self, x: Tensor, *, apart: bool = False) -> Tensor | Biased:
        """apart: leaves the bias to what comes next."""
        if self.pad_mode:
            x = F.pad(x, self.pad, mode=self.pad_mode)
        x = F.interpolate(x, scale_factor=self.scale, mode="nearest") if self.scale else x
        return without_bias(self.conv, x) if apart else self.conv(x)
