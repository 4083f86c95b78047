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


class Blocks:
    """Builds the units and resamplings of one U-Net, with what they all share."""

    def __init__(
        self,
        spatial_dims: int,
        *,
        res: Callable[..., ResBlock],
        norms: tuple[Callable, Callable],  # plain, and with the map
        attention: Callable[[int], nn.Module],
        attention_levels: Sequence[int] | None,
        resampling: dict[str, Any],
    ) -> None:
        self.res, (self.plain, self.spade) = res, norms
        self.attention, self.attention_levels = attention, attention_levels
        self.down = partial(Downsample, spatial_dims, **resampling)
        self.up = partial(Upsample, spatial_dims, **resampling)

    def unit(
        self, c_in: int, c_out: int, attention: Callable | None = None, *, sees_map: bool = True
    ) -> Unit:
        res = self.res(c_in, c_out, norm=self.spade if sees_map else self.plain)
        return Unit(res, attention(c_out) if attention else None)

    def attention_of(self, level: int) -> Callable | None:
        attends = self.attention_levels is None or level in self.attention_levels
        return self.attention if attends else None


def way_down(blocks: Blocks, stem: int, channels: Sequence[int], count: int, resampled: int) -> nn.ModuleList:
    """`count` units a level; the first `resampled` levels end in a downsampling."""
    levels, width = nn.ModuleList(), stem
    for level, out in enumerate(channels):
        attention = blocks.attention_of(level)
        units = [blocks.unit(width if i == 0 else out, out, attention, sees_map=False) for i in range(count)]
        levels.append(Level(units, blocks.down(out, out) if level < resampled else None))
        width = out
    return levels


def way_up_block(blocks: Blocks, stem: int, channels: Sequence[int], count: int, width: int) -> nn.ModuleList:
    """One unit for each output of the way down, resamplings and stem included."""
    kept = [stem]
    for level, out in enumerate(channels):
        kept += [out] * (count + (level < len(channels) - 1))
    levels = nn.ModuleList()
    for level in reversed(range(len(channels))):
        units = []
        for _ in range(count + 1):
            units.append(blocks.unit(width + kept.pop(), channels[level], blocks.attention_of(level)))
            width = channels[level]
        levels.append(Level(units, blocks.up(width, width) if level else None))
    return levels


def way_up_output(
    blocks: Blocks, stem: int, channels: Sequence[int], count: int, width: int
) -> nn.ModuleList:
    """One unit for each unit of the way down; the last of a level has the next level's width."""
    levels = nn.ModuleList()
    for level in reversed(range(len(channels))):
        units = []
        for i in range(count):
            out = channels[level]
            if i == count - 1:
                out = channels[level - 1] if level else stem
            units.append(blocks.unit(width + channels[level], out, blocks.attention_of(level)))
            width = out
        levels.append(Level(units, blocks.up(width, width) if level else None))
    return levels


def way_up_level(
    blocks: Blocks, stem: int, channels: Sequence[int], count: int, width: int, up_channels: Sequence[int]
) -> nn.ModuleList:
    """Every level starts with an upsampling and the input that the level had on the way down."""
    levels = nn.ModuleList()
    for level, out in zip(reversed(range(len(channels))), up_channels, strict=True):
        skip = channels[level - 1] if level else stem
        attention = blocks.attention_of(level)
        units = [blocks.unit(width + skip if i == 0 else out, out, attention) for i in range(count)]
        levels.append(Level(units, blocks.up(width, width)))
        width = out
    return levels


def same_conv(spatial_dims: int, c_in: int, c_out: int, kernel_size: int | Sequence[int]) -> nn.Module:
    """A convolution that keeps the grid, with odd kernels."""
    kernel = per_axis(kernel_size, spatial_dims)
    return conv(spatial_dims, c_in, c_out, kernel, padding=tuple(size // 2 for size in kernel))


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
                SPADE,
                spatial_dims,
                map_channels=spade_channels,
                groups=8,
                kernel_size=spade_kernel,
                keeps_maps=True,
            )

        def full_attention(width: int) -> nn.Module:
            heads = {"num_heads": num_heads, "head_channels": head_channels, "groups": norm_groups}
            if context_channels is not None:
                return TransformerBlock(width, context_channels=context_channels, **heads)
            return AttentionBlock(width, zero_init_last=zero_init_last, **heads)

        attention = attention or full_attention
        mid_attention = mid_attention or attention
        res = partial(
            ResBlock,
            spatial_dims,
            embedding_channels=embedding_channels,
            shortcut=shortcut,
            dropout=dropout,
            zero_init_last=zero_init_last,
            kernel_size=kernel,
            scale_shift=scale_shift,
            use_checkpoint=use_checkpoint,
        )
        blocks = Blocks(
            spatial_dims,
            res=res,
            norms=(plain, spade),
            attention=attention,
            attention_levels=attention_levels,
            resampling={"stride": strides, "kind": resample, "flat_kernel": min(kernel) == 1},
        )
        self.time = nn.Sequential(
            nn.Linear(sinusoidal_channels, embedding_channels),
            nn.SiLU(),
            nn.Linear(embedding_channels, embedding_channels),
        )
        self.stem = same_conv(spatial_dims, in_channels, stem_channels, stem_kernel)
        self.stem_attention = stem_attention(stem_channels) if stem_attention else None
        sizes = (stem_channels, channels, num_res_blocks)
        self.down = way_down(blocks, *sizes, num_downsamplings)
        width = mid_channels or channels[-1]
        self.mid = nn.ModuleList(
            [blocks.unit(channels[-1], width, None if skips == "level" else mid_attention)]
        )
        if skips == "level":
            # res, then (attention, res) as often as asked
            self.mid_attention = nn.ModuleList([mid_attention(width) for _ in range(num_mid_units)])
            self.mid.extend(blocks.unit(width, width) for _ in range(num_mid_units))
            self.up = way_up_level(blocks, *sizes, width, up_channels or ())
            width = up_channels[-1]
        else:
            self.mid.append(blocks.unit(width, width))
            way_up = way_up_block if skips == "block" else way_up_output
            self.up = way_up(blocks, *sizes, width)
            width = channels[0] if skips == "block" else stem_channels
            if skips == "output":
                self.last = blocks.unit(width + stem_channels, stem_channels, sees_map=False)
        self.head_norm = plain(width)
        self.head = same_conv(spatial_dims, width, out_channels, kernel)
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
