"""From counts to seconds and to what fits: a card's peaks, and the roofline of every operation.

Williams, Waterman and Patterson 2009: an operation takes at least the larger of its work over the peak rate
and its bytes over the bandwidth.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from medldm.planning.trace import Cost, Operation

ADAM_BYTES = 28  # read and write of a float32 weight and two moments, and the gradient's read, per parameter


@dataclass(frozen=True)
class Card:
    """What a device can do: memory in GiB that a job can use, bandwidth in GB/s, peaks in TFLOP/s."""

    memory_gib: float
    bandwidth: float
    bf16: float | None  # dense matrix products; None where the device multiplies no bf16
    fp32: float
    tf32: float | None = None  # float32 products as `medldm train` lets a GPU do them

    def peak(self, dtype: torch.dtype) -> float:
        if dtype in (torch.bfloat16, torch.float16):
            return self.bf16 or self.fp32
        return self.tf32 or self.fp32


@dataclass(frozen=True)
class Habits:
    """What kernels reach in practice, as shares of a card's peaks: fitted to measured steps."""

    conv2d: float
    conv3d: float
    product: float
    bandwidth: float
    launch_us: float  # host time between two kernels: the floor of an operation

    def share(self, op: Operation) -> float:
        return {0: self.product, 2: self.conv2d}.get(op.spatial_dims, self.conv3d)


def roofline_seconds(cost: Cost, card: Card) -> float:
    """Least time of a step: no operation faster than its peaks allow, and nothing in between."""
    return sum(max(compute_seconds(op, card), op.num_bytes / (card.bandwidth * 1e9)) for op in each(cost))


def expected_seconds(cost: Cost, card: Card, habits: Habits) -> float:
    """Time of a step at the usual shares of the peaks; launches bound small operations."""
    total = 0.0
    for op in each(cost):
        work = compute_seconds(op, card) / habits.share(op)
        traffic = op.num_bytes / (card.bandwidth * 1e9 * habits.bandwidth)
        total += max(work, traffic, op.num_calls * habits.launch_us * 1e-6)
    return total


def each(cost: Cost) -> Sequence[Operation]:
    return list(cost.operations.values())


def compute_seconds(op: Operation, card: Card) -> float:
    return op.flops / (card.peak(op.dtype) * 1e12)


def optimiser_seconds(num_trainable: int, card: Card) -> float:
    """The seconds of a fused Adam step, which is memory traffic alone."""
    return num_trainable * ADAM_BYTES / (card.bandwidth * 1e9)


def largest_batch(memories: Sequence[tuple[int, float]], limit_gib: float) -> int:
    """The largest batch within `limit_gib` on the line through two (batch, GiB) points; 0 where not even one
    image fits.
    """
    (n1, m1), (n2, m2) = memories
    slope = (m2 - m1) / (n2 - n1)
    return max(0, int((limit_gib - (m1 - n1 * slope)) / slope)) if slope > 0 else n2
