"""The blocks of an autoencoder in the order in which they run: a plan for each half.

A layout is a function that writes the plan; a new arrangement is a new entry of `AUTOENCODER_LAYOUTS`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from medldm.networks.layers import per_axis
from medldm.networks.options import check_one_of


class BlockStep(NamedTuple):
    """One block: "res" (residual), "attn" (attention), "down" or "up" (resampling by `stride`)."""

    kind: str
    in_channels: int
    out_channels: int
    stride: tuple[int, ...] | None = None


class Plan(NamedTuple):
    """The blocks of both halves, and whether a norm and an activation follow the decoder's last block."""

    encoder: list[BlockStep]
    decoder: list[BlockStep]
    has_last_norm: bool = True


@dataclass(frozen=True, kw_only=True)
class Stages:
    """Widths, resampling and depth of both halves.

    stem_channels: width of the first convolution.
    channels, strides: one entry for each level; a stride is a number or one per axis, 1 keeps the size.
    layout: "res_up" (latent diffusion of CompVis, ALDM), "up_res" (cardiac2d) or "strided" (TATS, Med-LSDM).
    num_res_blocks: of each level, (encoder, decoder).
    mid: blocks between the levels and the latent, in both halves, of "res" and "attn".
    attention_levels: levels with attention after each residual block.
    """

    stem_channels: int
    channels: Sequence[int]
    strides: Sequence[int | Sequence[int]]
    layout: str = "res_up"
    num_res_blocks: Sequence[int] = (2, 2)
    mid: Sequence[str] = ("res", "attn", "res")
    attention_levels: Sequence[int] = ()

    def __post_init__(self) -> None:
        check_one_of("layout", self.layout, tuple(AUTOENCODER_LAYOUTS))
        for kind in self.mid:
            check_one_of("mid", kind, ("res", "attn"))
        if len(self.channels) != len(self.strides):
            raise ValueError(
                f"{len(self.channels)} channels but {len(self.strides)} strides; give one of each a level"
            )

    def strides_per_axis(self, spatial_dims: int) -> list[tuple[int, ...]]:
        return [per_axis(stride, spatial_dims) for stride in self.strides]

    def plan(self, spatial_dims: int) -> Plan:
        """Both halves, with the blocks of the middle at the end of the encoder and at the start of the
        decoder.
        """
        layout = AUTOENCODER_LAYOUTS[self.layout]
        encoder, decoder, has_last_norm = layout(self, self.strides_per_axis(spatial_dims))
        middle = [BlockStep(kind, self.channels[-1], self.channels[-1]) for kind in self.mid]
        return Plan(encoder + middle, middle + decoder, has_last_norm)

    def blocks(self, level: int, half: int, in_channels: int, out_channels: int) -> list[BlockStep]:
        """Residual blocks of a level, each with attention after it where the level has any; half 0 is the
        encoder.
        """
        steps, width = [], in_channels
        for _ in range(self.num_res_blocks[half]):
            steps.append(BlockStep("res", width, out_channels))
            if level in self.attention_levels:
                steps.append(BlockStep("attn", out_channels, out_channels))
            width = out_channels
        return steps


Strides = Sequence[tuple[int, ...]]  # of each level, per axis


def resampling(kind: str, width: int, stride: tuple[int, ...]) -> list[BlockStep]:
    """Nothing where a level keeps its size."""
    return [BlockStep(kind, width, width, stride)] if max(stride) > 1 else []


def encoder_res_down(stages: Stages, strides: Strides) -> list[BlockStep]:
    """Residual blocks, then downsampling."""
    steps, width = [], stages.stem_channels
    for level, out in enumerate(stages.channels):
        steps += stages.blocks(level, 0, width, out) + resampling("down", out, strides[level])
        width = out
    return steps


def plan_res_up(stages: Stages, strides: Strides) -> Plan:
    """Residual blocks, then downsampling; upsampling, then residual blocks of the level's width."""
    steps, width = [], stages.channels[-1]
    for level in reversed(range(len(stages.channels))):
        out = stages.channels[level]
        steps += resampling("up", width, strides[level]) + stages.blocks(level, 1, width, out)
        width = out
    return Plan(encoder_res_down(stages, strides), steps)


def plan_up_res(stages: Stages, strides: Strides) -> Plan:
    """As `plan_res_up`, but on the way up the blocks of a level already have the width of the next one."""
    steps, width = [], stages.channels[-1]
    for level in reversed(range(len(stages.channels))):
        out = stages.channels[level - 1] if level else stages.stem_channels
        steps += resampling("up", width, strides[level]) + stages.blocks(level, 1, width, out)
        width = out
    return Plan(encoder_res_down(stages, strides), steps)


def plan_strided(stages: Stages, strides: Strides) -> Plan:
    """Every level starts with a strided convolution, which changes the width; residual blocks follow it. The
    decoder ends without a norm.
    """
    encoder, width = [], stages.stem_channels
    for level, out in enumerate(stages.channels):
        encoder += [BlockStep("down", width, out, strides[level]), *stages.blocks(level, 0, out, out)]
        width = out
    decoder = []
    for level in reversed(range(len(stages.channels))):
        out = stages.channels[level]
        decoder += [BlockStep("up", width, out, strides[level]), *stages.blocks(level, 1, out, out)]
        width = out
    return Plan(encoder, decoder, has_last_norm=False)


AUTOENCODER_LAYOUTS = {"res_up": plan_res_up, "up_res": plan_up_res, "strided": plan_strided}
