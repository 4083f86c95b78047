"""The same step for real, on random data: what this machine's device makes of it."""

import statistics
import time
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import nn

from medldm.devices import peak_memory, wait_for
from medldm.planning.step import Job, random_batch, train_step

WARM_UP = 3


class MeasuredStep(NamedTuple):
    """What one step took on this machine: the median of its seconds, the fastest and slowest, and GiB of
    memory.
    """

    seconds: float  # median
    spread: tuple[float, float]
    allocated_gib: float | None  # None: the device does not tell
    reserved_gib: float | None


def step_times(module: nn.Module, batch: dict, count: int, *, bf16: bool) -> Iterator[float]:
    """The seconds of each step, with the optimiser's part; the first steps, in which libraries choose
    kernels, are among them.
    """
    device = next(module.parameters()).device
    updates = [partial(update, optimizer) for optimizer in module.configure_optimizers()[0]]
    if not module.automatic_optimization:
        module.update_generator, module.update_discriminators = updates[0], updates[-1]

    for _ in range(WARM_UP + count):
        wait_for(device)
        start = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            train_step(module, batch, updates[0])
        wait_for(device)
        yield time.perf_counter() - start


def update(optimizer: torch.optim.Optimizer) -> None:
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured_step(job: Job, batch_size: int, device: torch.device, count: int, *, bf16: bool) -> MeasuredStep:
    """Median time of `count` steps after three to warm up, and the allocator's own figures on a GPU."""
    module = job.build().to(device)
    batch = random_batch(job, module, batch_size, device)
    peak_memory(device, forget=True)
    times = list(step_times(module, batch, count, bf16=bf16))[WARM_UP:]
    allocated, reserved = peak_memory(device)
    return MeasuredStep(statistics.median(times), (min(times), max(times)), allocated, reserved)
