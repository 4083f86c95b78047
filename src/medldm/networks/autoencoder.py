"""One vector-quantised autoencoder for 2D and 3D.

Its stages come from a plan: a list of (what, channels in, channels out, stride) that a layout writes. Adding
an arrangement is adding a layout function. Layouts: "res_up" (CompVis latent diffusion, ALDM), "up_res" (the
cardiac report) and "strided" (TATS, Med-LSDM).
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.errors import InputError
from medldm.networks.layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    Upsample,
    apply_norm,
    conv,
    group_norm,
    last_layer_of_image,
    per_axis,
)
from medldm.networks.quantizer import Quantized
from medldm.networks.spade import SPADE


class Step(NamedTuple):
    kind: str  # "res", "attn", "down", "up"
    in_channels: int
    out_channels: int
    stride: tuple[int, ...] | None = None


class Plan(NamedTuple):
    encoder: list[Step]
    decoder: list[Step]


def res_run(in_channels: int, out_channels: int, count: int, with_attention: bool = False) -> list[Step]:
    steps = []
    for i in range(count):
        steps.append(Step("res", in_channels if i == 0 else out_channels, out_channels))
        if with_attention:
            steps.append(Step("attn", out_channels, out_channels))
    return steps


def encoder_res_down(stem, channels, strides, num_res_blocks, attention_levels) -> list[Step]:
    steps, width = [], stem
    for level, (out, stride) in enumerate(zip(channels, strides, strict=True)):
        steps += res_run(width, out, num_res_blocks[0], level in attention_levels)
        if max(stride) > 1:
            steps.append(Step("down", out, out, stride))
        width = out
    return steps


def plan_res_up(stem, channels, strides, num_res_blocks, attention_levels) -> Plan:
    """Residual blocks, then resampling, in both directions."""
    steps, width = [], channels[-1]
    for level in reversed(range(len(channels))):
        if max(strides[level]) > 1:
            steps.append(Step("up", width, width, strides[level]))
        steps += res_run(width, channels[level], num_res_blocks[1], level in attention_levels)
        width = channels[level]
    return Plan(encoder_res_down(stem, channels, strides, num_res_blocks, attention_levels), steps)


def plan_up_res(stem, channels, strides, num_res_blocks, attention_levels) -> Plan:
    """As above on the way down; on the way up a level's blocks already have the next level's width."""
    steps, width = [], channels[-1]
    for level in reversed(range(len(channels))):
        if max(strides[level]) > 1:
            steps.append(Step("up", width, width, strides[level]))
        out = channels[level - 1] if level else stem
        steps += res_run(width, out, num_res_blocks[1], level in attention_levels)
        width = out
    return Plan(encoder_res_down(stem, channels, strides, num_res_blocks, attention_levels), steps)


def plan_strided(stem, channels, strides, num_res_blocks, attention_levels) -> Plan:
    """A strided convolution changes the width, residual blocks follow it."""
    encoder, width = [], stem
    for level, (out, stride) in enumerate(zip(channels, strides, strict=True)):
        encoder.append(Step("down", width, out, stride))
        encoder += res_run(out, out, num_res_blocks[0], level in attention_levels)
        width = out
    decoder = []
    for level in reversed(range(len(channels))):
        out = channels[level]
        decoder.append(Step("up", width, out, strides[level]))
        decoder += res_run(out, out, num_res_blocks[1], level in attention_levels)
        width = out
    return Plan(encoder, decoder)


LAYOUTS = {"res_up": plan_res_up, "up_res": plan_up_res, "strided": plan_strided}


class Stack(nn.ModuleList):
    """Blocks in a row; those that take the SPADE map get it."""

    def forward(self, h: Tensor, spade: Tensor | None = None) -> Tensor:
        for block in self:
            h = block(h, None, spade) if isinstance(block, ResBlock) else block(h)
        return h


class VQAutoencoder(nn.Module):
    """Encoder, vector quantiser, decoder.

    channels, strides: one entry per level; a stride is a number or one per axis, 1 keeps the size.
    mid: blocks between the two halves, of "res" and "attn". num_res_blocks: per level, (encoder, decoder).
    decoder_map_channels: channels of a semantic map that SPADE norms of the decoder see; None means plain
    norms. spade_kernel: their kernel, a number or one per axis. latent_kernel: kernel of the last encoder and
    first decoder convolution (None: the 1x1 convolutions around the quantiser alone do it, as in TATS).
    image_range: of the grey levels that it works in, "signed" [-1, 1] or "unit" [0, 1] (ALDM of 2023);
    images are in [-1, 1] outside.
    use_checkpoint: recompute residual blocks in the backward pass to save memory, those with SPADE norms and
    their 128 hidden channels at full resolution among them.
    """

    def __init__(
        self,
        spatial_dims: int,
        *,
        quantizer: Callable[..., nn.Module],
        latent_channels: int,
        stem_channels: int,
        channels: Sequence[int],
        strides: Sequence[int | Sequence[int]],
        layout: str = "res_up",
        num_res_blocks: Sequence[int] = (2, 2),
        mid: Sequence[str] = ("res", "attn", "res"),
        attention_levels: Sequence[int] = (),
        num_heads: int = 8,
        norm_groups: int = 32,
        shortcut: str = "auto",
        dropout: float = 0.0,
        resample: str = "conv4",
        padding_mode: str = "zeros",
        latent_kernel: int | None = 3,
        output_activation: str = "none",
        image_range: str = "signed",
        decoder_map_channels: int | None = None,
        spade_kernel: int | Sequence[int] = 3,
        spade_hidden_channels: int = 128,
        image_channels: int = 1,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if layout not in LAYOUTS:
            raise ValueError(f"layout '{layout}' is none of {', '.join(LAYOUTS)}")
        if output_activation not in ("none", "tanh"):
            raise ValueError(f"output_activation '{output_activation}' is none of none, tanh")
        if image_range not in ("signed", "unit"):
            raise InputError(f"model.autoencoder.image_range={image_range} is none of signed, unit")
        axis_strides = [per_axis(stride, spatial_dims) for stride in strides]
        self.spatial_dims, self.image_channels = spatial_dims, image_channels
        self.latent_channels = latent_channels
        self.downsampling = tuple(math.prod(factors) for factors in zip(*axis_strides, strict=True))
        self.output_activation, self.is_unit = output_activation, image_range == "unit"
        self.latent_halo = 0 if latent_kernel is None else latent_kernel // 2
        self.decoder_map_channels = decoder_map_channels

        plain = partial(group_norm, groups=norm_groups)
        spade = plain
        if decoder_map_channels is not None:
            # Med-LSDM's SPADE layers have 8 groups.
            spade = partial(
                SPADE,
                spatial_dims,
                map_channels=decoder_map_channels,
                hidden_channels=spade_hidden_channels,
                groups=8,
                kernel_size=spade_kernel,
            )

        def build(steps: Sequence[Step], norm) -> Stack:
            return Stack([block(step, norm) for step in steps])

        def block(step: Step, norm) -> nn.Module:
            kind, c_in, c_out, stride = step
            if kind == "res":
                return ResBlock(
                    spatial_dims,
                    c_in,
                    c_out,
                    norm=norm,
                    shortcut=shortcut,
                    dropout=dropout,
                    padding_mode=padding_mode,
                    use_checkpoint=use_checkpoint,
                )
            if kind == "attn":
                return AttentionBlock(c_in, num_heads=num_heads, groups=norm_groups)
            if kind == "down":
                return Downsample(
                    spatial_dims, c_in, c_out, stride=stride, kind=resample, padding_mode=padding_mode
                )
            return Upsample(
                spatial_dims, c_in, c_out, stride=stride, kind=resample, padding_mode=padding_mode
            )

        plan = LAYOUTS[layout](stem_channels, list(channels), axis_strides, num_res_blocks, attention_levels)
        widest, narrowest = channels[-1], plan.decoder[-1].out_channels
        middle = [Step(kind, widest, widest) for kind in mid]
        conv_latent = partial(conv, spatial_dims, kernel_size=1)
        has_latent_conv = latent_kernel is not None
        self.stem = conv(spatial_dims, image_channels, stem_channels, 3, padding=1, padding_mode=padding_mode)
        self.encoder = build(plan.encoder + middle, plain)
        self.encoder_norm = plain(widest)
        self.to_latent = nn.Identity()
        self.from_latent = nn.Identity()
        if has_latent_conv:
            pad = latent_kernel // 2
            self.to_latent = conv(spatial_dims, widest, latent_channels, latent_kernel, padding=pad)
            self.from_latent = conv(spatial_dims, latent_channels, widest, latent_kernel, padding=pad)
        self.pre_quantizer = conv_latent(latent_channels if has_latent_conv else widest, latent_channels)
        self.post_quantizer = conv_latent(latent_channels, latent_channels if has_latent_conv else widest)
        self.quantizer = quantizer(code_dim=latent_channels)
        self.decoder_entry_norm = None if has_latent_conv else spade(widest)
        self.decoder = build(middle + plan.decoder, spade)
        self.decoder_norm = None if layout == "strided" else spade(narrowest)
        self.head = conv(spatial_dims, narrowest, image_channels, 3, padding=1, padding_mode=padding_mode)

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, *S) image -> (B, Cz, *S/f) latent before quantisation. Raises ValueError where S does not
        divide.
        """
        self.check_size(x)
        h = F.silu(self.encoder_norm(self.encoder(self.first(x))))
        return self.latent(h)

    def latent(self, h: Tensor) -> Tensor:
        """Activated features (B, C, *S/f) of the encoder -> (B, Cz, *S/f)."""
        return last_layer_of_image(lambda h: self.pre_quantizer(self.to_latent(h)), h)

    def first(self, x: Tensor) -> Tensor:
        return self.stem((x + 1) / 2 if self.is_unit else x)

    def check_size(self, x: Tensor) -> None:
        for size, factor in zip(x.shape[2:], self.downsampling, strict=True):
            if size % factor:
                raise ValueError(
                    f"image size {tuple(x.shape[2:])} does not divide by the downsampling {self.downsampling}"
                )

    def quantize(self, h: Tensor) -> Quantized:
        return self.quantizer(h)

    def decode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, Cz, *S/f) quantised latent (and, for SPADE decoders, the one-hot map) -> (B, C, *S) image."""
        h = self.from_latent(self.post_quantizer(z))
        if self.decoder_entry_norm is not None:
            h = F.silu(apply_norm(self.decoder_entry_norm, h, mask))
        h = self.decoder(h, mask)
        if self.decoder_norm is not None:
            h = F.silu(apply_norm(self.decoder_norm, h, mask))
        return self.last(h)

    def last(self, h: Tensor) -> Tensor:
        x = last_layer_of_image(self.head, h)
        x = torch.tanh(x) if self.output_activation == "tanh" else x
        return 2 * x - 1 if self.is_unit else x

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Quantized]:
        quantized = self.quantize(self.encode(x))
        return self.decode(quantized.z, mask), quantized

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradient norms set the adaptive adversarial weight (Esser et al. 2021, Eq. 7)."""
        return self.head.weight
