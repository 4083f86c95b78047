"""From a job and a card to the lines that a person reads: memory, work, time, and what would fit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from medldm.devices import find_hardware
from medldm.planning.roofline import (
    Card,
    Habits,
    expected_seconds,
    largest_batch,
    optimiser_seconds,
    roofline_seconds,
)
from medldm.planning.step import Job, num_trainable, state_bytes, traced_step
from medldm.planning.trace import Cost

GIB = 2**30


class Memory(NamedTuple):
    """What one step takes, in GiB."""

    state: float  # weights, moments, moving average, buffers, the batch
    activations: float  # tensors of the step, gradients with them
    workspace: float  # an allowance for convolutions

    @property
    def allocated(self) -> float:
        return sum(self)


@dataclass(frozen=True)
class Estimate:
    """One step of one batch on one card."""

    batch_size: int
    memory: Memory
    cost: Cost
    roofline: float  # seconds
    expected: float
    eager: Cost  # of the same calls, uncompiled

    @property
    def uncompiled(self) -> str:
        return f"{self.eager.num_kernels} kernels, {self.eager.num_bytes / 1e9:.3g} GB"

    def row(self) -> str:
        total, cost = self.memory, self.cost
        return (
            f"{self.batch_size:>5}  {total.allocated:>9.2f}  {total.state:>6.2f} {total.activations:>7.2f} "
            f"{total.workspace:>6.2f}  {cost.flops / 1e12:>7.3g}  {cost.num_bytes / 1e9:>7.3g}  "
            f"{cost.num_kernels:>7}  {1e3 * self.roofline:>9.3g}  {1e3 * self.expected:>9.3g}"
        )


HEADER = (
    "batch  GiB in all   state   step  scratch   TFLOP       GB  kernels  least ms  expected ms\n"
    "                    (weights, Adam, EMA / tensors of the step / convolutions)"
)


@dataclass(frozen=True)
class Planner:
    """Estimates of one job on one card, from shapes alone."""

    job: Job
    card: Card
    habits: Habits
    bf16: bool
    on_cuda: bool
    averages: bool  # a moving average of the weights is kept
    compiles: bool = False  # blocks are compiled

    def estimate(self, batch_size: int) -> Estimate:
        options = {"bf16": self.bf16, "on_cuda": self.on_cuda}
        traced = traced_step(self.job, batch_size, **options, compiles=self.compiles)
        cost, module, eager = traced.cost, traced.module, traced.cost
        if self.compiles:
            cost, eager = traced.compiled, traced_step(self.job, batch_size, **options).cost
            cost.take_peaks(eager)
        state = state_bytes(module, averages=self.averages) + traced.batch_bytes
        scratch = cost.peak_bytes_with_workspace - cost.peak_bytes if self.on_cuda else 0
        optimiser = optimiser_seconds(num_trainable(module), self.card)
        return Estimate(
            batch_size,
            Memory(*(x / GIB for x in (state, cost.peak_bytes, scratch))),
            cost,
            roofline_seconds(cost, self.card) + optimiser,
            expected_seconds(cost, self.card, self.habits) + optimiser,
            eager,
        )

    def largest(self, found: Estimate, limit_gib: float) -> int:
        """The largest batch within the card's memory, on the line through this estimate and another one."""
        other = self.estimate(1 if found.batch_size > 1 else 2)
        return largest_batch([(e.batch_size, e.memory.allocated) for e in (found, other)], limit_gib)


def settings(cfg: Mapping[str, Any], gpu: str) -> tuple[Card, Habits]:
    """Card and habits of the config's tables."""
    kind = "cpu" if gpu == "cpu" else "gpu"
    return Card(**cfg["cards"][gpu]), Habits(**cfg["habits"][kind])


def this_device() -> str:
    """Name of this machine's device among the cards; a6000 for a GPU that is none of them."""
    if not find_hardware().is_gpu:
        return "cpu"
    name = torch.cuda.get_device_name().lower().replace(" ", "")
    known = ("rtx3090", "a6000", "a100", "h100", "h200")
    return next((card for card in known if card in name), "a6000")


def operations_table(cost: Cost, count: int = 10) -> Sequence[str]:
    """The operations that move most bytes."""
    largest = sorted(cost.operations.values(), key=lambda op: -op.num_bytes)[:count]
    return [
        f"  {op.name:<42} {str(op.dtype).removeprefix('torch.'):<9} x{op.num_calls:<6} "
        f"{op.flops / 1e12:>8.3f} TFLOP {op.num_bytes / 1e9:>8.2f} GB"
        for op in largest
    ]
