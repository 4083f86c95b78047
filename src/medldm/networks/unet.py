"""The conditional denoising U-Net, 2D and 3D.

Conditions enter by concatenation to the input, by an embedding added to that of the time, by SPADE norms in
the middle and on the way up, and by cross-attention. How its skips run is a plan of `unet_plan`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.errors import InputError
from medldm.networks.biased import Biased, without_bias
from medldm.networks.compiling import Function, is_compiling
from medldm.networks.layers import (
    RESAMPLINGS,
    AttentionBlock,
    Downsample,
    Projected,
    ResBlock,
    TransformerBlock,
    Upsample,
    conv,
    per_axis,
    sinusoidal_embedding,
    zero_init,
)
from medldm.networks.norms import group_norm
from medldm.networks.options import check_one_of, grouped
from medldm.networks.spade import SPADE, Modulations
from medldm.networks.unet_plan import Arrangement, UNetStep, in_order_of_construction, incoming_channels


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Attention over all positions of a level, or what builds another kind from a width.

    num_heads or head_channels: heads of the default attention, by their number or their width.
    attention, mid_attention, stem_attention: a callable each, width -> module that takes (x, context). The
    middle's is by default that of the levels; after the stem there is none by default.
    """

    num_heads: int | None = None
    head_channels: int | None = None
    attention: Callable[[int], nn.Module] | None = None
    mid_attention: Callable[[int], nn.Module] | None = None
    stem_attention: Callable[[int], nn.Module] | None = None


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """kernel_size, stem_kernel and spade_kernel: of the blocks and the head, of the first convolution and of
    SPADE norms; strides: of every downsampling; each a number or one per axis. [1, 3, 3] and [1, 2, 2] with
    attention along depth make the factorised 3D U-Net. resample: the kind of `Downsample` and `Upsample`.
    """

    kernel_size: int | Sequence[int] = 3
    stem_kernel: int | Sequence[int] = 3
    spade_kernel: int | Sequence[int] = 3
    strides: int | Sequence[int] = 2
    resample: str = "conv3"

    def __post_init__(self) -> None:
        check_one_of("resample", self.resample, RESAMPLINGS)


@dataclass(frozen=True, kw_only=True)
class BlockOptions:
    """What all residual blocks share, see `ResBlock`; `norm_groups` and `norm_eps` are of their group norms.

    zero_init_last: the head and the last layer of every block and attention start at zero.
    use_checkpoint: blocks are computed again in the backward pass, which saves memory.
    """

    shortcut: str = "auto"
    dropout: float = 0.0
    norm_groups: int = 32
    norm_eps: float = 1e-6
    scale_shift: bool = False
    zero_init_last: bool = True
    use_checkpoint: bool = False


@dataclass(frozen=True, kw_only=True)
class Embeddings:
    """sinusoidal_channels: of the time's sines and cosines; embedding_channels: of what time and condition
    become.
    """

    sinusoidal_channels: int = 128
    embedding_channels: int = 512


PARAMETERS = ("weight", "bias")
PlacedStep = tuple[UNetStep, nn.Module | None]  # a step of a plan with its module


class Unit(nn.Module):
    """A residual block and, where asked, attention after it."""

    is_block = True

    def __init__(self, res: ResBlock, attention: nn.Module | None) -> None:
        super().__init__()
        self.res, self.attention = res, attention

    def forward(self, h: Tensor, e: Tensor | Projected, spade: Any, context: Tensor | None) -> Tensor:
        is_taken = is_compiling() and getattr(self.attention, "takes_biased", False)
        h = self.res(h, e, spade, apart=is_taken)
        return h if self.attention is None else self.attention(h, context)


def same_conv(spatial_dims: int, c_in: int, c_out: int, kernel_size: int | Sequence[int]) -> nn.Module:
    """A convolution that keeps the grid, with odd kernels."""
    kernel = per_axis(kernel_size, spatial_dims)
    return conv(spatial_dims, c_in, c_out, kernel, padding=tuple(size // 2 for size in kernel))


class Parts:
    """Makes the modules of one U-Net from its options."""

    def __init__(
        self,
        spatial_dims: int,
        attention: Attention,
        kernels: Kernels,
        blocks: BlockOptions,
        *,
        embedding_channels: int,
        spade_channels: int | None,
        context_channels: int | None,
    ) -> None:
        self.blocks, self.attention, self.context_channels = blocks, attention, context_channels
        self.norm = partial(group_norm, groups=blocks.norm_groups, eps=blocks.norm_eps)
        self.map_norm: Callable = self.norm
        if spade_channels is not None:
            spade = {"map_channels": spade_channels, "groups": 8, "kernel_size": kernels.spade_kernel}
            self.map_norm = partial(SPADE, spatial_dims, **spade)
        kernel = per_axis(kernels.kernel_size, spatial_dims)
        self.res = partial(
            ResBlock,
            spatial_dims,
            embedding_channels=embedding_channels,
            kernel_size=kernel,
            shortcut=blocks.shortcut,
            dropout=blocks.dropout,
            scale_shift=blocks.scale_shift,
            zero_init_last=blocks.zero_init_last,
            use_checkpoint=blocks.use_checkpoint,
        )
        resampling = {
            "stride": kernels.strides,
            "kind": kernels.resample,
            "flat_kernel": min(kernel) == 1,
        }
        self.down = partial(Downsample, spatial_dims, **resampling)
        self.up = partial(Upsample, spatial_dims, **resampling)

    def make(self, step: UNetStep, c_in: int) -> nn.Module:
        """The module of a step that `c_in` channels reach."""
        if step.kind == "unit":
            res = self.res(c_in, step.out_channels, norm=self.map_norm if step.sees_map else self.norm)
            return Unit(res, self.attention_of(step.attention, step.out_channels))
        if step.kind == "attention":
            return self.attention_of(step.attention, c_in)
        return self.down(c_in, c_in) if step.kind == "down" else self.up(c_in, c_in)

    def attention_of(self, where: str, width: int) -> nn.Module | None:
        """where: "none", "level" or "middle"."""
        of_levels = self.attention.attention or self.full_attention
        build = {"none": None, "level": of_levels, "middle": self.attention.mid_attention or of_levels}[where]
        return build(width) if build else None

    def full_attention(self, width: int) -> nn.Module:
        heads = {"num_heads": self.attention.num_heads, "head_channels": self.attention.head_channels}
        options = heads | {"groups": self.blocks.norm_groups}
        if self.context_channels is not None:
            return TransformerBlock(width, context_channels=self.context_channels, **options)
        return AttentionBlock(width, zero_init_last=self.blocks.zero_init_last, **options)


def register(root: nn.Module, name: str, module: nn.Module) -> None:
    """Registers `module` in `root` under a dotted name, with lists and containers in between where there are
    none.
    """
    parts = name.split(".")
    for part, after in zip(parts, parts[1:], strict=False):
        if part not in root._modules:
            root.add_module(part, nn.ModuleList() if after.isdigit() else nn.Module())
        root = root._modules[part]
    root.add_module(parts[-1], module)


def run_steps(
    steps: Sequence[PlacedStep],
    h: Tensor,
    e: Tensor | dict[str, Projected],
    maps: Any,
    context: Tensor | None,
    kept: list[Tensor] | None = None,
) -> Tensor:
    """Runs steps of a plan on h (B, C, *s), where e comes from `Entrance.embedded`. `kept` is the stack of
    the skips, an empty one by default; what the steps keep is put on it.
    """
    kept = [] if kept is None else kept
    for step, module in steps:
        if step.kind == "keep":
            kept.append(h)
        elif step.kind == "join":
            h = torch.cat([h, kept.pop()], dim=1)
        elif step.kind == "unit":
            own = e[step.place] if isinstance(e, dict) else e
            h = module(h, own, maps.get(step.place) if isinstance(maps, dict) else maps, context)
        elif step.kind == "attention":
            h = module(h, context)
        else:
            h = module(h)
    return h


def map_modulations(
    steps: Sequence[PlacedStep], strides: Sequence[int], spade: Tensor, size: Sequence[int]
) -> Modulations:
    """What the units of these steps compute from a map (B, C, *any) alone, for latents of `size`."""
    maps, size = {}, torch.Size(size)
    for step, module in steps:
        if step.kind == "down":
            size = torch.Size(n // s for n, s in zip(size, strides, strict=True))
        elif step.kind == "up":
            size = torch.Size(n * s for n, s in zip(size, strides, strict=True))
        elif step.kind == "unit" and step.sees_map:
            maps[step.place] = module.res.modulations(spade, size)
    return maps


def projected(steps: Sequence[PlacedStep], e: Tensor) -> dict[str, Projected]:
    layers = {step.place: module.res.embedding for step, module in steps if step.kind == "unit"}
    weight, bias = (torch.cat([getattr(layer, name) for layer in layers.values()]) for name in PARAMETERS)
    parts = F.linear(e, weight, bias).split([layer.out_features for layer in layers.values()], dim=1)
    return dict(zip(layers, map(Projected, parts), strict=True))


class Entrance(nn.Module):
    """How a U-Net begins: the modules `time`, `stem` and `stem_attention` (or None), and the stem's block
    `begin`.
    """

    sinusoidal_channels: int
    steps: list[PlacedStep]

    def embedded(self, t: Tensor, condition: Any) -> Tensor | dict[str, Projected]:
        """What time and condition become (B, embedding_channels), as every unit reads it; or what the units'
        layers make of it, by their places, in one product. That is for weights that have been rounded for a
        GPU: in float32 on a CPU it would change the order of sums in a gradient, and so a seeded run.
        """
        e = self.time(sinusoidal_embedding(t, self.sinusoidal_channels).to(self.time[0].weight.dtype))
        e = F.silu(e if condition.embedding is None else e + condition.embedding)
        return e if self.time[0].weight.dtype == torch.float32 else projected(self.steps, e)

    def entered(self, z_t: Tensor, condition: Any) -> Tensor:
        """z_t and what is concatenated to it, after the stem."""
        h = z_t if condition.concat is None else torch.cat([z_t, condition.concat.to(z_t.dtype)], dim=1)
        h = self.begin(h)
        return h if self.stem_attention is None else self.stem_attention(h)

    def begun(self, z_t: Tensor) -> Tensor | Biased:
        apart = is_compiling() and getattr(self.stem_attention, "takes_biased", False)
        return without_bias(self.stem, z_t) if apart else self.stem(z_t)


class UNet(Entrance):
    """Predicts (B, out_channels, *s) from z_t, the time and the condition.

    spade_channels, context_channels: of the condition's map and tokens; None where there are none.
    options: the fields of `unet_plan.Arrangement` (widths and skips), `Attention`, `Kernels`, `BlockOptions`
    and `Embeddings`, flat as in a config.
    """

    rounds_together = True

    def __init__(
        self,
        spatial_dims: int,
        *,
        in_channels: int,
        out_channels: int,
        spade_channels: int | None = None,
        context_channels: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        groups = grouped("UNet", options, Arrangement, Attention, Kernels, BlockOptions, Embeddings)
        shape, attention, kernels, blocks, embeddings = groups
        stem, width = shape.stem_channels, embeddings.embedding_channels
        parts = Parts(
            spatial_dims,
            attention,
            kernels,
            blocks,
            embedding_channels=width,
            spade_channels=spade_channels,
            context_channels=context_channels,
        )
        self.spatial_dims, self.sinusoidal_channels = spatial_dims, embeddings.sinusoidal_channels
        self.in_channels, self.out_channels = in_channels, out_channels
        self.time = nn.Sequential(
            nn.Linear(self.sinusoidal_channels, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.stem = same_conv(spatial_dims, in_channels, stem, kernels.stem_kernel)
        self.stem_attention = attention.stem_attention(stem) if attention.stem_attention else None
        incoming, last = incoming_channels(shape.plan, stem)
        for step in in_order_of_construction(shape.plan):
            register(self, step.place, parts.make(step, incoming[step.place]))
        self.head_norm = parts.norm(last)
        self.head = same_conv(spatial_dims, last, out_channels, kernels.kernel_size)
        if blocks.zero_init_last:
            zero_init(self.head)
        self.begin = Function(self.begun, (self.stem,))
        self.end = Function(self.ended, (self.head_norm, self.head))
        # the plan with its modules, which are registered under their places
        self.steps = [
            (step, self.get_submodule(step.place) if step.place else None) for step in chain(*shape.plan)
        ]
        num_downsamplings = sum(step.kind == "down" for step, _ in self.steps)
        self.strides = per_axis(kernels.strides, spatial_dims)
        self.downsampling = tuple(stride**num_downsamplings for stride in self.strides)

    def forward(self, z_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """z_t (B, Cz, *s), t (B,) float in [0, 1000), condition -> (B, out_channels, *s).

        Raises InputError where s does not divide by `downsampling`. `condition.spade` is the map (B, C, *any)
        or, for a map that stays the same, what `modulations` has made of it.
        """
        self.check_size(z_t)
        e = self.embedded(t, condition)
        h = run_steps(self.steps, self.entered(z_t, condition), e, condition.spade, condition.context)
        return self.end(h)

    def ended(self, h: Tensor) -> Tensor:
        return self.head(F.silu(self.head_norm(h)))

    def check_size(self, z_t: Tensor) -> None:
        for size, factor in zip(z_t.shape[2:], self.downsampling, strict=True):
            if size % factor:
                raise InputError(
                    f"latents of {tuple(z_t.shape[2:])} do not divide by {self.downsampling}, the network's "
                    "downsampling; crop or pad the images, or train a network with fewer levels"
                )

    def modulations(self, spade: Tensor, size: Sequence[int]) -> Modulations:
        """What the units compute from a map (B, C, *any) alone, for latents of `size`.

        A sampler that calls the network many times under one map computes it once.
        """
        return map_modulations(self.steps, self.strides, spade, size)
