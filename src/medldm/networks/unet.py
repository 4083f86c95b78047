"""The conditional denoising U-Net, 2D and 3D.

Two arrangements of its skips: "block" keeps the output of every block (Ho et al. 2020; Dhariwal and Nichol
2021), "level" keeps the input of every level (the cardiac report). Conditions enter by concatenation, by an
embedding added to the time embedding, by SPADE norms in the middle and decoder, and by cross-attention.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.networks.layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    TransformerBlock,
    Upsample,
    conv,
    group_norm,
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
    one more block a level.
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
        zero_init_last: bool = True,
        spade_channels: int | None = None,
        context_channels: int | None = None,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if skips not in ("block", "level"):
            raise ValueError(f"skips '{skips}' is none of block, level")
        self.spatial_dims, self.skips = spatial_dims, skips
        self.in_channels, self.out_channels = in_channels, out_channels
        self.sinusoidal_channels = sinusoidal_channels
        self.num_downsamplings = len(channels) - (skips == "block")
        plain = partial(group_norm, groups=norm_groups, eps=norm_eps)
        spade = plain
        if spade_channels is not None:
            spade = partial(SPADE, spatial_dims, map_channels=spade_channels, groups=8)

        def attention(width: int) -> nn.Module:
            heads = {"num_heads": num_heads, "head_channels": head_channels, "groups": norm_groups}
            if context_channels is not None:
                return TransformerBlock(width, context_channels=context_channels, **heads)
            return AttentionBlock(width, zero_init_last=zero_init_last, **heads)

        def unit(c_in: int, c_out: int, norm, has_attention: bool) -> Unit:
            res = ResBlock(
                spatial_dims,
                c_in,
                c_out,
                norm=norm,
                embedding_channels=embedding_channels,
                shortcut=shortcut,
                dropout=dropout,
                zero_init_last=zero_init_last,
                use_checkpoint=use_checkpoint,
            )
            return Unit(res, attention(c_out) if has_attention else None)

        def attends(level: int) -> bool:
            return attention_levels is None or level in attention_levels

        down = partial(Downsample, spatial_dims, kind=resample)
        up = partial(Upsample, spatial_dims, kind=resample)
        self.time = nn.Sequential(
            nn.Linear(sinusoidal_channels, embedding_channels),
            nn.SiLU(),
            nn.Linear(embedding_channels, embedding_channels),
        )
        self.stem = conv(spatial_dims, in_channels, stem_channels, 3, padding=1)

        self.down, width, kept = nn.ModuleList(), stem_channels, [stem_channels]
        for level, out in enumerate(channels):
            units = [
                unit(width if i == 0 else out, out, plain, attends(level)) for i in range(num_res_blocks)
            ]
            resampled = level < self.num_downsamplings
            self.down.append(Level(units, down(out, out) if resampled else None))
            kept += [out] * (num_res_blocks + resampled) if skips == "block" else [out] * resampled
            width = out

        mid_width = mid_channels or width
        self.mid = nn.ModuleList([unit(width, mid_width, spade, skips == "block")])
        if skips == "block":
            self.mid.append(unit(mid_width, mid_width, spade, False))
        else:
            # res, then (attention, res) as often as asked
            self.mid_attention = nn.ModuleList([attention(mid_width) for _ in range(num_mid_units)])
            self.mid.extend(unit(mid_width, mid_width, spade, False) for _ in range(num_mid_units))
        width = mid_width

        self.up = nn.ModuleList()
        if skips == "block":
            for level in reversed(range(len(channels))):
                units = []
                for _ in range(num_res_blocks + 1):
                    units.append(unit(width + kept.pop(), channels[level], spade, attends(level)))
                    width = channels[level]
                self.up.append(Level(units, up(width, width) if level else None))
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
        self.head = conv(spatial_dims, width, out_channels, 3, padding=1)
        if zero_init_last:
            zero_init(self.head)

    def forward(self, z_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """z_t (B, Cz, *s), t (B,) float in [0, 1000), condition -> (B, out_channels, *s)."""
        for size in z_t.shape[2:]:
            if size % 2**self.num_downsamplings:
                raise ValueError(
                    f"latent size {tuple(z_t.shape[2:])} is not divisible by {2**self.num_downsamplings}"
                )
        e = self.time(sinusoidal_embedding(t, self.sinusoidal_channels).to(self.time[0].weight.dtype))
        if condition.embedding is not None:
            e = e + condition.embedding
        e = F.silu(e)
        h = z_t if condition.concat is None else torch.cat([z_t, condition.concat.to(z_t.dtype)], dim=1)
        run = self._forward_block if self.skips == "block" else self._forward_level
        h = run(self.stem(h), e, condition)
        return self.head(F.silu(self.head_norm(h)))

    def _forward_block(self, h: Tensor, e: Tensor, condition: Any) -> Tensor:
        kept = [h]
        for level in self.down:
            for unit in level.units:
                h = unit(h, e, condition)
                kept.append(h)
            if level.resample is not None:
                h = level.resample(h)
                kept.append(h)
        for unit in self.mid:
            h = unit(h, e, condition)
        for level in self.up:
            for unit in level.units:
                h = unit(torch.cat([h, kept.pop()], dim=1), e, condition)
            h = h if level.resample is None else level.resample(h)
        return h

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
