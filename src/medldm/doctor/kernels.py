"""Tests the operations that take most time in training, each against float64 on the host."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from medldm.devices import LAYOUTS, Hardware, wait_for
from medldm.doctor.finding import TO_NOTE, WRONG, Finding

# The relative deviation (L2 norm) that rounding explains, with a margin of about five: a number is rounded by
# up to half a unit in the last place, 2^-9 of it in bf16 and 2^-12 in TF32, in which GPUs multiply float32.
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
TF32_TOLERANCE = 2e-3
TYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bf16"}


class KernelTest(NamedTuple):
    """An operation of float tensors, and the shapes that it takes."""

    name: str
    run: Callable[..., Tensor]
    shapes: tuple[tuple[int, ...], ...]
    has_layouts: bool = False  # whether channels_last is tried too


KERNELS = (
    KernelTest("conv2d", partial(F.conv2d, padding=1), ((2, 16, 32, 32), (32, 16, 3, 3)), has_layouts=True),
    KernelTest(
        "conv3d", partial(F.conv3d, padding=1), ((1, 8, 12, 16, 16), (16, 8, 3, 3, 3)), has_layouts=True
    ),
    KernelTest("attention", F.scaled_dot_product_attention, ((1, 4, 128, 32),) * 3),
    KernelTest("group norm", lambda x: F.group_norm(x, 8), ((2, 32, 16, 16),), True),
)


def deviation(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest of the relative L2 distances; infinity where a number is not finite."""
    worst = 0.0
    for x, y in zip(found, expected, strict=True):
        x = x.detach().double().cpu()
        if not x.isfinite().all():
            return float("inf")
        worst = max(worst, float((x - y).norm() / y.norm()))
    return worst


def run_case(case: KernelTest, inputs: list[Tensor]) -> list[Tensor]:
    """The result and the gradients of its inputs, for a random but fixed gradient that comes in."""
    leaves = [x.detach().clone(memory_format=torch.preserve_format).requires_grad_() for x in inputs]
    out = case.run(*leaves)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out.backward(gradient.to(out))
    return [out, *(x.grad for x in leaves)]


def kernel_findings(
    device: torch.device, hardware: Hardware, cases: Sequence[KernelTest] = KERNELS
) -> Iterator[Finding]:
    """A finding for each operation: how far forward and backward deviate in each precision and layout."""
    for case in cases:
        generator = torch.Generator().manual_seed(0)
        inputs = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in case.shapes]
        expected = [x.detach() for x in run_case(case, inputs)]
        yield judge_kernel(case, list(trials(case, inputs, expected, device)), hardware)


class Trial(NamedTuple):
    """One precision and layout: the deviation of its results, or the error of the backend."""

    dtype: torch.dtype
    layout: str
    deviation: float = 0.0
    error: str = ""

    @property
    def name(self) -> str:
        return f"{TYPE_NAMES[self.dtype]} {self.layout}"


def trials(
    case: KernelTest, inputs: list[Tensor], expected: list[Tensor], device: torch.device
) -> Iterator[Trial]:
    layouts = ("contiguous", "channels_last") if case.has_layouts else ("contiguous",)
    for dtype, layout in product(TOLERANCES, layouts):
        try:
            found = run_case(case, [laid_out(x.to(device, dtype), layout) for x in inputs])
            wait_for(device)
        except RuntimeError as error:  # the backend has no such kernel, or it failed
            yield Trial(dtype, layout, error=str(error).splitlines()[0])
        else:
            yield Trial(dtype, layout, deviation(found, expected))


def judge_kernel(case: KernelTest, tried: Sequence[Trial], hardware: Hardware) -> Finding:
    """The finding about one operation, from its trials in all precisions and layouts."""
    wrong = []
    for trial in tried:
        is_tf32 = trial.dtype == torch.float32 and hardware.is_gpu
        tolerance = TF32_TOLERANCE if is_tf32 else TOLERANCES[trial.dtype]
        if trial.error:
            wrong.append((trial, f"{trial.name}: {trial.error}"))
        elif not trial.deviation <= tolerance:
            text = f"deviates by {trial.deviation:.1e} of the result, {tolerance:.0e} would be rounding"
            wrong.append((trial, f"{trial.name}: {text}"))
    if not wrong:
        worst = {dtype: max(t.deviation for t in tried if t.dtype == dtype) for dtype in TOLERANCES}
        text = ", ".join(f"{TYPE_NAMES[dtype]} {value:.0e}" for dtype, value in worst.items())
        return Finding("kernels", case.name, f"relative deviation {text}")
    # A failure is harmless where `auto` never chooses this on the hardware.
    is_unused = not hardware.multiplies_bf16 and all(trial.dtype == torch.bfloat16 for trial, _ in wrong)
    mend = "train with trainer.precision=32-true channels_last=false, and try another version of torch"
    lines = "; ".join(text for _, text in wrong)
    return Finding("kernels", case.name, lines, TO_NOTE if is_unused else WRONG, mend)


def laid_out(x: Tensor, layout: str) -> Tensor:
    return x.contiguous(memory_format=LAYOUTS[x.ndim]) if layout == "channels_last" else x
