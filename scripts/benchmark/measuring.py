"""Measures time, work and memory of callables in turns, so that a busy machine disturbs all of them alike."""

import contextlib
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medldm.devices import choose_settings, mixed_precision, pick_device
from medldm.planning.trace import StepTrace

DEVICE = pick_device()
Run = Callable[[], object]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock = CLOCKS["wall"]


def choose_clock(name: str) -> None:
    """wall, or cpu: the process's own CPU seconds, which with one thread hardly depend on what else runs."""
    global clock
    clock = CLOCKS[name]


class Measured(NamedTuple):
    row: str
    variant: str
    value: float  # seconds, unless unit says otherwise
    spread: tuple[float, float]  # the fastest and the slowest time
    unit: str
    gflop: float | None = None
    peak_share: float | None = None  # of the float32 matmul peak; bf16 where the work runs in bf16
    memory_mib: float | None = None
    ratio: float | None = None  # the value of the reference over this one
    memory_ratio: float | None = None


def wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def seconds(run: Run) -> float:
    wait()
    start = clock()
    run()
    wait()
    return clock() - start


def work_and_memory(run: Run) -> tuple[float, float]:
    """GFLOP of matrix products and convolutions, and MiB of peak extra memory, of one call."""
    if DEVICE.type == "cuda":
        run()
        wait()
        torch.cuda.reset_peak_memory_stats()
        start = torch.cuda.memory_allocated()
        with StepTrace() as trace:
            run()
        return trace.cost.flops / 1e9, (torch.cuda.max_memory_allocated() - start) / 2**20
    with StepTrace() as trace:
        run()
    return trace.cost.flops / 1e9, trace.cost.peak_bytes / 2**20


def matmul_peak(dtype: torch.dtype) -> float:
    """The GFLOP/s of matrix products: the best of eight."""
    size = 8192 if DEVICE.type == "cuda" else 2048 if dtype == torch.float32 else 512
    a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
    with torch.no_grad():
        return 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(8)) / 1e9


def compare(
    row: str, variants: dict[str, Run], *, repeats: int, peak: float, reference: str | None = None, tick: Run
) -> list[Measured]:
    """Runs all variants in turn, `repeats` times. Gives medians, and ratios to `reference`."""
    work = {}
    for name, run in variants.items():
        work[name] = work_and_memory(run)
        tick()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, run in variants.items():
            times[name].append(seconds(run))
            tick()
    result = []
    for name, samples in times.items():
        (gflop, memory), value = work[name], statistics.median(samples)
        ratio = memory_ratio = None
        if reference is not None:
            ratio = statistics.median([r / s for r, s in zip(times[reference], samples, strict=True)])
            memory_ratio = work[reference][1] / max(memory, 1e-9)
        result.append(
            Measured(
                row, name, value, (min(samples), max(samples)), "s", gflop, gflop / value / peak, memory,
                ratio, memory_ratio,
            )
        )  # fmt: skip
    return result


def best_precision() -> contextlib.AbstractContextManager:
    """The precision of `medldm train` with precision=auto."""
    return mixed_precision(DEVICE, choose_settings().precision)


def train_step(module: nn.Module, loss: Callable[[], Tensor], precision: Callable) -> None:
    """A forward and backward pass. The step of the optimiser, which is the same for all, is left out."""
    with precision():
        value = loss()
    value.backward()
    module.zero_grad(set_to_none=True)
