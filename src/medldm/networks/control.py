"""A side branch that controls a frozen U-Net. Zhang et al. 2023, "Adding Conditional Control to Text-to-Image
Diffusion Models" (ControlNet), in 2D and 3D.
"""

from copy import deepcopy
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from medldm.networks.compiling import Function
from medldm.networks.layers import conv, zero_init
from medldm.networks.spade import Modulations
from medldm.networks.unet import Entrance, PlacedStep, UNet, map_modulations, register, run_steps

BRANCH = "branch."  # before the places of the branch's units, where both have modulations


def steps_down(steps: list[PlacedStep]) -> list[PlacedStep]:
    """The way down and the middle: all before the first step that goes up or joins a skip."""
    return list(takewhile(lambda placed: placed[0].kind not in ("up", "join"), steps))


def widths_of_controls(steps: list[PlacedStep], stem_channels: int) -> list[int]:
    """The width of every skip that these steps keep, and that of the last step's output."""
    width, widths = stem_channels, []
    for step, _ in steps:
        if step.kind == "keep":
            widths.append(width)
        width = step.out_channels or width
    return [*widths, width]


class ControlBranch(Entrance):
    """A copy of a U-Net's way down and middle, which reads `condition.hint` (B, hint_channels, *s) too.

    The hint enters after the stem through a 1x1 convolution, and what each skip and the middle get leaves
    through another; all of them begin at zero, so that an untrained branch adds nothing.
    """

    def __init__(self, base: UNet, hint_channels: int) -> None:
        super().__init__()
        dims, self.strides = base.spatial_dims, base.strides
        self.sinusoidal_channels = base.sinusoidal_channels
        self.time, self.stem, self.stem_attention = map(deepcopy, (base.time, base.stem, base.stem_attention))
        self.begin = Function(self.begun, (self.stem,))
        down = steps_down(base.steps)
        for step, module in down:
            if module is not None:
                register(self, step.place, deepcopy(module))
        self.steps = [(step, self.get_submodule(step.place) if step.place else None) for step, _ in down]
        stem = base.stem.out_channels
        self.hint = zero_init(conv(dims, hint_channels, stem, kernel_size=1))
        self.controls = nn.ModuleList(
            zero_init(conv(dims, width, width, kernel_size=1)) for width in widths_of_controls(down, stem)
        )
        self.requires_grad_(True)

    def copy_weights(self, base: UNet) -> None:
        """Begin with the weights that the U-Net has now."""
        theirs = base.state_dict()
        own = self.state_dict()
        self.load_state_dict({name: theirs.get(name, value) for name, value in own.items()})

    def forward(self, z_t: Tensor, t: Tensor, condition: Any) -> list[Tensor]:
        """What is added to every skip, in the order in which they are kept, and to the middle."""
        if condition.hint is None:
            raise ValueError("a control branch needs condition.hint (B, C, *s)")
        maps, kept = condition.spade, []
        if isinstance(maps, dict):
            maps = {name.removeprefix(BRANCH): m for name, m in maps.items() if name.startswith(BRANCH)}
        h = self.entered(z_t, condition)
        h = h + self.hint(condition.hint.to(z_t.dtype)).to(h.dtype)
        h = run_steps(self.steps, h, self.embedded(t, condition), maps, condition.context, kept)
        return [control(x) for control, x in zip(self.controls, [*kept, h], strict=True)]


class ControlledUNet(nn.Module):
    """A frozen U-Net, always in eval mode, whose skips and middle a trained branch adds to."""

    rounds_together = True

    def __init__(self, base: UNet, hint_channels: int) -> None:
        super().__init__()
        if not isinstance(base, UNet):
            raise ValueError(f"a {type(base).__name__} has no skips that a control branch could add to")
        self.base = base.requires_grad_(False).eval()
        self.branch = ControlBranch(base, hint_channels)
        self.spatial_dims = base.spatial_dims
        self.in_channels, self.out_channels = base.in_channels, base.out_channels
        self.downsampling = base.downsampling

    @property
    def trained_part(self) -> nn.Module:
        """All that training changes."""
        return self.branch

    def train(self, mode: bool = True) -> "ControlledUNet":
        """The base stays in eval mode whatever `mode` says."""
        super().train(mode)
        self.base.eval()
        return self

    def forward(self, z_t: Tensor, t: Tensor, condition: Any) -> Tensor:
        """As `UNet.forward`, with `condition.hint` (B, hint_channels, *s) beside what the base reads."""
        base, context = self.base, condition.context
        base.check_size(z_t)
        *skips, middle = self.branch(z_t, t, condition)
        down = steps_down(base.steps)
        e, kept = base.embedded(t, condition), []
        h = run_steps(down, base.entered(z_t, condition), e, condition.spade, context, kept)
        kept = [x + control.to(x.dtype) for x, control in zip(kept, skips, strict=True)]
        up = base.steps[len(down) :]
        return base.end(run_steps(up, h + middle.to(h.dtype), e, condition.spade, context, kept))

    def modulations(self, spade: Tensor, size: torch.Size) -> Modulations:
        """What the units of base and branch compute from a map alone, see `UNet.modulations`."""
        own = map_modulations(self.branch.steps, self.branch.strides, spade, size)
        return self.base.modulations(spade, size) | {BRANCH + place: maps for place, maps in own.items()}
