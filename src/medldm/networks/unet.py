"""The conditional denoising U-Net, 2D and 3D.

Three arrangements of its skips: "block" keeps the output of every block and resampling (Ho et al. 2020;
Dhariwal and Nichol 2021), "level" keeps the input of every level (the cardiac report), "output" the output
of every block, and the stem's for one more block at the end (Ho et al. 2022, Med-LSDM). Conditions enter by
concatenation, by an embedding added to the time embedding, by SPADE norms in the middle and decoder, and by
cross-attention.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.errors import InputError
from medldm.networks.layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TransformerBlock,
    Upsample,
    conv,
    group_norm,
    per_axis,
    sinusoidal_embedding,
    zero_init,
)
from medldm.networks.spade import SPADE


class Unit(nn.Module):
    """A residual block and, where asked, attention after it."""

    def __init__(self, res: ResBlock, attention: nn.Module | None) -> None:
        super().__init__()
        self.res, self.attention = res, attention

    def forward(self, h: Tensor, e: Tensor, condition: Any) -> Tensor:
        h = self.res(h, e, condition.spade)
        return h if self.attention is None else self.attention(h, condition.context)


class Level(nn.Module):
    """Units of one resolution with the resampling before (up) or after (down) them."""

    def __init__(self, units: Sequence[Unit], resample: nn.Module | None) -> None:
        super().__init__()
        self.units, self.resample = nn.ModuleList(units), resample


class UNet(nn.Module):
    """Predicts (B, out_channels, *s) from z_t, the time and the condition.

    channels: width of each level. skips="level": each level is followed by a downsampling, `mid_channels`
    ends the middle, `up_channels` are the widths on the way up (as the report's 256->384->512->768, 768->512,
    384->256->128). skips="block": no downsampling after the last level, the way up mirrors the way down with
    one more block a level. skips="output": as "block", with as many blocks up as down.
    kernel_size, stem_kernel, spade_kernel: a number or one per axis; strides: of every downsampling.
    [1, 3, 3] and [1, 2, 2] with attention along depth (`attention`) make the factorised 3D U-Net.
    attention, mid_attention, stem_attention: what builds the attention of a width where it is not the default
    one over all positions; the middle's defaults to `attention`, the stem has none of its own.
    attention_levels: None puts attention in every level.
    embedding_channels: width of time and condition embedding.
    spade_channels, context_channels: of the condition's map and tokens; None where there are none.
    """

    def __init__(
        self,
        spatial_dims: int,
        *,
        in_channels: int,
        out_channels: int,
        stem_channels: int,
        channels: Sequence[int],
        num_res_blocks: int = 2,
        skips: str = "block",
        mid_channels: int | None = None,
        up_channels: Sequence[int] | None = None,
        num_mid_units: int = 2,
        attention_levels: Sequence[int] | None = None,
        num_heads: int | None = None,
        head_channels: int | None = None,
        sinusoidal_channels: int = 128,
        embedding_channels: int = 512,
        shortcut: str = "auto",
        resample: str = "conv3",
        dropout: float = 0.0,
        norm_groups: int = 32,
        norm_eps: float = 1e-6,
        kernel_size: int | Sequence[int] = 3,
        stem_kernel: int | Sequence[int] = 3,
        spade_kernel: int | Sequence[int] = 3,
        strides: int | Sequence[int] = 2,
        attention: Callable[[int], nn.Module] | None = None,
        mid_attention: Callable[[int], nn.Module] | None = None,
        stem_attention: Callable[[int], nn.Module] | None = None,
        scale_shift: bool = False,
        zero_init_last: bool = True,
        spade_channels: int | None = None,
        context_channels: int | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if skips not in ("block", "level", "output"):
            raise ValueError(f"skips '{skips}' is none of block, level, output")
        self.spatial_dims, self.skips = spatial_dims, skips
        self.in_channels, self.out_channels = in_channels, out_channels
        self.sinusoidal_channels = sinusoidal_channels
        num_downsamplings = len(channels) - (skips != "level")
        kernel, strides = per_axis(kernel_size, spatial_dims), per_axis(strides, spatial_dims)
        self.downsampling = tuple(stride**num_downsamplings for stride in strides)
        plain = partial(group_norm, groups=norm_groups, eps=norm_eps)
        spade = plain
        if spade_channels is not None:
            spade = partial(
                SPADE, spatial_dims, map_channels=spade_channels, groups=8, kernel_size=spade_kernel
            )

        def full_attention(width: int) -> nn.Module:
            heads = {"num_heads": num_heads, "head_channels": head_channels, "groups": norm_groups}
            if context_channels is not None:
                return TransformerBlock(width, context_channels=context_channels, **heads)
            return AttentionBlock(width, zero_init_last=zero_init_last, **heads)

        attention = attention or full_attention
        mid_attention = mid_attention or attention

        def unit(c_in: int, c_out: int, norm, attention: Callable | None) -> Unit:
            res = ResBlock(
                spatial_dims,
                c_in,
                c_out,
                norm=norm,
                embedding_channels=embedding_channels,
                shortcut=shortcut,
                dropout=dropout,
                zero_init_last=zero_init_last,
                kernel_size=kernel,
                scale_shift=scale_shift,
                use_checkpoint=use_checkpoint,
            )
            return Unit(res, attention(c_out) if attention else None)

        def attends(level: int) -> Callable | None:
            return attention if attention_levels is None or level in attention_levels else None

        resampling = {"stride": strides, "kind": resample, "flat_kernel": min(kernel) == 1}
        down = partial(Downsample, spatial_dims, **resampling)
        up = partial(Upsample, spatial_dims, **resampling)
        self.time = nn.Sequential(
            nn.Linear(sinusoidal_channels, embedding_channels),
            nn.SiLU(),
            nn.Linear(embedding_channels, embedding_channels),
        )
        stem_kernel = per_axis(stem_kernel, spatial_dims)
        padding = tuple(size // 2 for size in stem_kernel)
        self.stem = conv(spatial_dims, in_channels, stem_channels, stem_kernel, padding=padding)
        self.stem_attention = stem_attention(stem_channels) if stem_attention else None

        self.down, width = nn.ModuleList(), stem_channels
        kept = [stem_channels] if skips == "block" else []
        for level, out in enumerate(channels):
            units = [
                unit(width if i == 0 else out, out, plain, attends(level)) for i in range(num_res_blocks)
            ]
            resampled = level < num_downsamplings
            self.down.append(Level(units, down(out, out) if resampled else None))
            kept += [out] * (num_res_blocks + (resampled and skips == "block"))
            width = out

        mid_width = mid_channels or width
        self.mid = nn.ModuleList([unit(width, mid_width, spade, None if skips == "level" else mid_attention)])
        if skips != "level":
            self.mid.append(unit(mid_width, mid_width, spade, None))
        else:
            # res, then (attention, res) as often as asked
            self.mid_attention = nn.ModuleList([mid_attention(mid_width) for _ in range(num_mid_units)])
            self.mid.extend(unit(mid_width, mid_width, spade, None) for _ in range(num_mid_units))
        width = mid_width

        self.up = nn.ModuleList()
        if skips == "block":
            for level in reversed(range(len(channels))):
                units = []
                for _ in range(num_res_blocks + 1):
                    units.append(unit(width + kept.pop(), channels[level], spade, attends(level)))
                    width = channels[level]
                self.up.append(Level(units, up(width, width) if level else None))
        elif skips == "output":
            for level in reversed(range(len(channels))):
                units = []
                for i in range(num_res_blocks):
                    narrows = i == num_res_blocks - 1
                    out = (channels[level - 1] if level else stem_channels) if narrows else channels[level]
                    units.append(unit(width + kept.pop(), out, spade, attends(level)))
                    width = out
                self.up.append(Level(units, up(width, width) if level else None))
            self.last = unit(width + stem_channels, stem_channels, plain, None)
            width = stem_channels
        else:
            for level, out in zip(reversed(range(len(channels))), up_channels or (), strict=True):
                skip = stem_channels if level == 0 else channels[level - 1]
                units = [
                    unit(width + skip if i == 0 else out, out, spade, attends(level))
                    for i in range(num_res_blocks)
                ]
                self.up.append(Level(units, up(width, width)))
                width = out
        self.head_norm = plain(width)
        self.head = conv(spatial_dims, width, out_channels, kernel, padding=tuple(k // 2 for k in kernel))
        if zero_init_last:
            zero_init(self.head)

    def forward(self, z_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """z_t (B, Cz, *s), t (B,) float in [0, 1000), condition -> (B, out_channels, *s)."""
        for size, factor in zip(z_t.shape[2:], self.downsampling, strict=True):
            if size % factor:
                raise InputError(
                    f"data: latents of {tuple(z_t.shape[2:])} do not divide by {self.downsampling}, the "
                    "downsampling of model.network; crop or pad the images, or give it fewer levels"
                )
        e = self.time(sinusoidal_embedding(t, self.sinusoidal_channels).to(self.time[0].weight.dtype))
        if condition.embedding is not None:
            e = e + condition.embedding
        e = F.silu(e)
        h = z_t if condition.concat is None else torch.cat([z_t, condition.concat.to(z_t.dtype)], dim=1)
        h = self.stem(h)
        if self.stem_attention is not None:
            h = self.stem_attention(h)
        run = self._forward_level if self.skips == "level" else self._forward_block
        h = run(h, e, condition)
        return self.head(F.silu(self.head_norm(h)))

    def _forward_block(self, h: Tensor, e: Tensor, condition: Any) -> Tensor:
        keeps_all = self.skips == "block"
        stem, kept = h, [h] if keeps_all else []
        for level in self.down:
            for unit in level.units:
                h = unit(h, e, condition)
                kept.append(h)
            if level.resample is not None:
                h = level.resample(h)
                kept += [h] if keeps_all else []
        for unit in self.mid:
            h = unit(h, e, condition)
        for level in self.up:
            for unit in level.units:
                h = unit(torch.cat([h, kept.pop()], dim=1), e, condition)
            h = h if level.resample is None else level.resample(h)
        return h if keeps_all else self.last(torch.cat([h, stem], dim=1), e, condition)

    def _forward_level(self, h: Tensor, e: Tensor, condition: Any) -> Tensor:
        kept = []
        for level in self.down:
            kept.append(h)
            for unit in level.units:
                h = unit(h, e, condition)
            h = level.resample(h)
        h = self.mid[0](h, e, condition)
        for attention, unit in zip(self.mid_attention, self.mid[1:], strict=True):
            h = unit(attention(h, condition.context), e, condition)
        for level in self.up:
            h = torch.cat([level.resample(h), kept.pop()], dim=1)
            for unit in level.units:
                h = unit(h, e, condition)
        return h
