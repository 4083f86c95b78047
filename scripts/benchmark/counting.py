"""Guards what a training step needs: kernels, bytes and roofline time of whole experiments are counted from
shapes alone, and compared with the counts that are committed beside this file. No GPU is needed.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medldm.commands import plan as planning
from medldm.files import replacing

COUNTS = Path(__file__).with_name("counts.json")
CARD = "rtx3090"
EXPERIMENTS = (
    "cardiac2d/vqvae", "cardiac2d/ldm", "medvdm/chestxray_conv", "medlsdm/autopet_vqgan",
    "medlsdm/autopet_vqgan_spade", "medlsdm/autopet_ldm", "aldm/brats_vqgan", "aldm/brats_msspade",
    "aldm/brats_ldm", "cardiac2d/control", "medlsdm/control",
)  # fmt: skip
SLACK = 1.002  # a larger ratio counts as growth; sums of floats may differ in their last digits


class Count(NamedTuple):
    """One training step at an experiment's own batch, in bf16, on `CARD`: as it runs by default, its blocks
    compiled (counted by the model of `planning.fusion`), and as it would run uncompiled.
    """

    kernels: int
    gigabytes: float
    roofline_ms: float
    uncompiled_kernels: int
    uncompiled_gigabytes: float


def count(experiment: str) -> Count:
    found = planning.plan_of(experiment, f"gpu={CARD}")
    cost, eager = found.cost, found.eager
    return Count(
        cost.num_kernels,
        round(cost.num_bytes / 1e9, 3),
        round(1e3 * found.roofline, 3),
        eager.num_kernels,
        round(eager.num_bytes / 1e9, 3),
    )


def grown(found: Count, known: Mapping[str, float] | None) -> list[str]:
    """The counts that are larger than the committed ones, in words; all of them where none are committed."""
    if known is None:
        return ["no committed counts"]
    return [
        f"{name} {known[name]:g} -> {value:g}"
        for name, value in found._asdict().items()
        if value > SLACK * known[name]
    ]


def check(
    experiments: Sequence[str] = EXPERIMENTS,
    *,
    path: Path = COUNTS,
    update: bool = False,
    tell: Callable[[str], None] = print,
) -> bool:
    """Whether no count has grown. A line for each experiment goes to `tell`; `update` writes the counts
    instead of comparing them.
    """
    known = json.loads(path.read_text()) if path.is_file() else {}
    is_good = True
    for experiment in experiments:
        found = count(experiment)
        changes = [] if update else grown(found, known.get(experiment))
        is_good &= not changes
        numbers = ", ".join(f"{name} {value:g}" for name, value in found._asdict().items())
        tell(
            f"{'GROWN ' if changes else 'ok    '} {experiment}: {numbers}"
            + "".join(f"; {c}" for c in changes)
        )
        if update:
            known[experiment] = found._asdict()
            with replacing(path) as aside:
                aside.write_text(json.dumps(known, indent=1) + "\n")
    return is_good
