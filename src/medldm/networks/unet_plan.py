"""What a U-Net runs, step by step: a plan, from which both its construction and its forward follow.

A plan is a list of sections (a level on the way down, the middle, a level on the way up), and a section is a
list of steps. Each arrangement of the skips is one function that writes a plan; a new arrangement is a new
entry of `ARRANGEMENTS`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from medldm.networks.options import check_one_of


class UNetStep(NamedTuple):
    """One step of a plan.

    kind: "keep" puts what has been computed on a stack and "join" concatenates the stack's top to it; "unit"
    (a residual block, with attention after it where `attention` says so), "attention", "down" and "up" run a
    module.
    place: the module's name in the network, and so in checkpoints.
    out_channels: width that a unit gives; other modules keep the width.
    attention: "none", "level" or "middle", whichever the network builds under that name.
    sees_map: whether a unit's norms see the condition's map.
    """

    kind: str
    place: str = ""
    out_channels: int = 0
    attention: str = "none"
    sees_map: bool = True


Sections = list[list[UNetStep]]
KEEP, JOIN = UNetStep("keep"), UNetStep("join")
MODULE_KINDS = ("attention", "unit", "down", "up")  # in the order in which a section's modules are made


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Widths and depth of a U-Net, and how its skips run.

    stem_channels: width of the first convolution. channels: width of each level.
    num_res_blocks: units of each level on the way down.
    skips: "block", "level" or "output", see `plan_block`, `plan_level` and `plan_output`.
    mid_channels: width of the middle, None for that of the last level.
    up_channels (skips="level" alone): width of each level on the way up, the lowest first.
    num_mid_units (skips="level" alone): pairs of attention and unit in the middle.
    attention_levels: levels whose units have attention after them, None for all.
    """

    stem_channels: int
    channels: Sequence[int]
    num_res_blocks: int = 2
    skips: str = "block"
    mid_channels: int | None = None
    up_channels: Sequence[int] | None = None
    num_mid_units: int = 2
    attention_levels: Sequence[int] | None = None

    def __post_init__(self) -> None:
        check_one_of("skips", self.skips, tuple(ARRANGEMENTS))
        if self.skips == "level" and len(self.up_channels or ()) != len(self.channels):
            raise ValueError(
                f"up_channels={self.up_channels}: skips=level needs one width for each of the "
                f"{len(self.channels)} levels of channels"
            )

    @property
    def plan(self) -> Sections:
        return ARRANGEMENTS[self.skips](self)

    @property
    def width_of_middle(self) -> int:
        return self.mid_channels or self.channels[-1]

    def units(
        self, section: str, level: int, widths: Sequence[int], *, sees_map: bool = True
    ) -> list[UNetStep]:
        """Units of these widths on the resolution of a level, in the section "down.I" or "up.I"."""
        attends = self.attention_levels is None or level in self.attention_levels
        attention = "level" if attends else "none"
        return [
            UNetStep("unit", f"{section}.units.{i}", width, attention, sees_map)
            for i, width in enumerate(widths)
        ]

    def units_down(self, level: int) -> list[UNetStep]:
        widths = [self.channels[level]] * self.num_res_blocks
        return self.units(f"down.{level}", level, widths, sees_map=False)

    def levels_up(self) -> Iterator[tuple[str, int]]:
        """(section, level) from the lowest resolution to the highest."""
        for i, level in enumerate(reversed(range(len(self.channels)))):
            yield f"up.{i}", level


def kept(steps: Sequence[UNetStep]) -> list[UNetStep]:
    """The steps, each with its output kept."""
    return [part for step in steps for part in (step, KEEP)]


def joined(steps: Sequence[UNetStep]) -> list[UNetStep]:
    """The steps, each with what was kept last joined to its input."""
    return [part for step in steps for part in (JOIN, step)]


def middle(shape: Arrangement) -> list[UNetStep]:
    """Two units with attention between them."""
    width = shape.width_of_middle
    return [UNetStep("unit", "mid.0", width, "middle"), UNetStep("unit", "mid.1", width)]


def plan_block(shape: Arrangement) -> Sections:
    """A skip from the stem and from every unit and downsampling; the way up mirrors the way down with one
    more unit in each level. The last level has no downsampling. Ho et al. 2020; Dhariwal and Nichol 2021.
    """
    plan = [[KEEP]]
    for level in range(len(shape.channels)):
        is_last = level == len(shape.channels) - 1
        resampling = [] if is_last else [UNetStep("down", f"down.{level}.resample")]
        plan.append(kept(shape.units_down(level) + resampling))
    plan.append(middle(shape))
    for section, level in shape.levels_up():
        units = shape.units(section, level, [shape.channels[level]] * (shape.num_res_blocks + 1))
        plan.append(joined(units) + ([UNetStep("up", f"{section}.resample")] if level else []))
    return plan


def plan_output(shape: Arrangement) -> Sections:
    """A skip from every unit, and from the stem to one more unit at the end. As many units up as down; the
    last one of a level has the width of the next. Ho et al. 2022, "Video Diffusion Models"; Med-LSDM.
    """
    plan = [[KEEP]]
    for level in range(len(shape.channels)):
        is_last = level == len(shape.channels) - 1
        resampling = [] if is_last else [UNetStep("down", f"down.{level}.resample")]
        plan.append(kept(shape.units_down(level)) + resampling)
    plan.append(middle(shape))
    for section, level in shape.levels_up():
        above = shape.channels[level - 1] if level else shape.stem_channels
        widths = [shape.channels[level]] * (shape.num_res_blocks - 1) + [above]
        units = shape.units(section, level, widths)
        plan.append(joined(units) + ([UNetStep("up", f"{section}.resample")] if level else []))
    return [*plan, [JOIN, UNetStep("unit", "last", shape.stem_channels, sees_map=False)]]


def plan_level(shape: Arrangement) -> Sections:
    """A skip from the input of every level, joined after the upsampling that leads back to its resolution.
    Every level, the last one too, ends in a downsampling. The middle is a unit, then pairs of attention and
    unit.
    """
    plan = []
    for level in range(len(shape.channels)):
        plan.append([KEEP, *shape.units_down(level), UNetStep("down", f"down.{level}.resample")])
    width = shape.width_of_middle
    plan.append([UNetStep("unit", "mid.0", width)])
    pairs = [
        (
            UNetStep("attention", f"mid_attention.{i}", attention="middle"),
            UNetStep("unit", f"mid.{i + 1}", width),
        )
        for i in range(shape.num_mid_units)
    ]
    plan.append(list(chain(*pairs)))
    for (section, level), width in zip(shape.levels_up(), shape.up_channels or (), strict=True):
        units = shape.units(section, level, [width] * shape.num_res_blocks)
        plan.append([UNetStep("up", f"{section}.resample"), JOIN, *units])
    return plan


ARRANGEMENTS = {"block": plan_block, "level": plan_level, "output": plan_output}


def in_order_of_construction(plan: Sections) -> list[UNetStep]:
    """The steps that have modules, as these are made: section by section, and in each by kind. A seed gives
    every weight its value by this order, and an optimiser's state belongs to parameters by their number.
    """
    modules = ([step for step in section if step.place] for section in plan)
    return [
        step
        for section in modules
        for step in sorted(section, key=lambda step: MODULE_KINDS.index(step.kind))
    ]


def incoming_channels(plan: Sections, stem_channels: int) -> tuple[dict[str, int], int]:
    """The width that reaches the module at each place, and the width at the end of the plan."""
    width, stack, incoming = stem_channels, [], {}
    for step in chain(*plan):
        if step.kind == "keep":
            stack.append(width)
        elif step.kind == "join":
            width += stack.pop()
        else:
            incoming[step.place] = width
            width = step.out_channels or width
    return incoming, width
