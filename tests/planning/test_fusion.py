"""What the model of a compiler makes of a block's operations, against kernels and bytes counted by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from medldm.planning.trace import StepTrace

N = 4096  # values of the tensors below


def compiled(run, *, in_block: bool = True, backward: bool = False) -> tuple[int, float]:
    """(kernels, bytes / 4 N) of a function of x (1, 4, 32, 32) as one block, and of its gradient."""
    with FakeTensorMode():
        x = torch.empty(1, 4, 32, 32, requires_grad=backward)
        with StepTrace() as trace:
            out = (trace.block(run) if in_block else run)(x)
            if backward:
                out.backward(torch.empty_like(out))
    cost = trace.compiled
    return cost.num_kernels, cost.num_bytes / (4 * N)


def test_a_chain_reads_its_input_once_and_writes_its_output_once():
    assert compiled(lambda x: (x * 2 + 1).relu().exp()) == (1, 2)
    assert compiled(lambda x: (x * 2 + 1).relu().exp(), in_block=False) == (4, 8)


def test_a_convolution_parts_chains():
    def run(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d((x + 1).relu(), torch.empty(4, 4, 1, 1)).exp().neg()

    weight_bytes = 16 / N
    kernels, moved = compiled(run)
    assert kernels == 3 and moved == pytest.approx(2 + (2 + weight_bytes) + 2)


def test_a_norm_is_its_statistics_and_a_chain_that_reads_the_image_again():
    kernels, moved = compiled(lambda x: F.silu(F.group_norm(x, 1)))
    assert kernels == 4 and moved == pytest.approx(
        3, rel=1e-2
    )  # statistics: two numbers, put together by two


def test_a_bias_is_added_by_the_chain_that_follows_unless_the_backward_pass_needs_the_sum():
    def run(x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, torch.empty(4, 4, 1, 1), torch.empty(4)).square()

    small = (16 + 8) / N
    assert compiled(run)[0] == 2 and compiled(run)[1] == pytest.approx(2 + 2 + small)
    # then: convolution 2, sum read and written and square written 3; square's gradient 3, convolution's 3
    kernels, moved = compiled(run, backward=True)
    assert kernels == 4 and moved == pytest.approx(5 + 3 + 3 + 2 * small, rel=1e-2)


def test_a_softmax_along_a_strided_axis_reads_its_rows_twice():
    """Its rows of 128 values do not lie side by side."""
    kernels, moved = compiled(lambda x: x.view(32, 128).softmax(1))
    assert (kernels, moved) == (1, 2)
    kernels, moved = compiled(lambda x: x.view(128, 32).softmax(0))
    assert kernels == 3 and moved == pytest.approx(3, rel=1e-2)


def test_a_softmax_over_few_values_stays_in_its_chain():
    assert compiled(lambda x: (x * 2).softmax(-1) + 1) == (1, 2)


def test_the_backward_pass_computes_again_what_is_cheap():
    """Forward: reads x, writes the output. Backward: reads x, the output and its gradient, writes that of x.
    The results in between, which the gradients of exp and silu need, are written by none.
    """
    assert compiled(lambda x: F.silu(x * 2).exp().square().exp(), backward=True) == (2, 6)


def test_the_gradient_of_a_bias_is_a_reduction_that_is_split_over_the_card():
    """8 results of 512 values each, of a gradient that the block is given."""
    with FakeTensorMode():
        x, weight, bias = torch.empty(1, 8, 16, 32), torch.empty(8, 8, 1, 1), torch.empty(8)
        for value in (weight, bias):
            value.requires_grad_()
        with StepTrace() as trace:
            out = trace.block(F.conv2d)(x, weight, bias)
            before = trace.compiled.num_kernels
            out.backward(torch.empty_like(out))
    moved = {op.name: op.num_kernels for op in trace.compiled.operations.values()}
    assert before == 2 and moved == {"convolution": 1, "convolution_backward": 1, "fused": 1 + 2}


def test_means_of_rows_that_are_spread_over_an_image_are_a_kernel_of_their_own():
    """The rows are 4 x 8 values, the image 4 x 32 x 32."""

    def run(x: torch.Tensor) -> torch.Tensor:
        means = x[0, :, 0, :8].square().mean(1).exp()
        return x * means[None, :, None, None]

    assert compiled(run)[0] == 2
    assert compiled(lambda x: x.flatten(2).softmax(2).exp())[0] == 1


def test_sums_of_sums_are_a_kernel_of_their_own():
    assert compiled(lambda x: x.square().sum(3).exp().sum(2))[0] == 2


def test_kernels_of_the_same_sizes_that_read_the_same_are_one():
    """Two sums of one tensor, and two sums of two tensors."""
    assert compiled(lambda x: (x.sum((2, 3)), x.square().sum((2, 3)))[1])[0] == 1
    assert compiled(lambda x: (torch.empty_like(x).sum((2, 3)), x.square().sum((2, 3)))[1])[0] == 2


def test_kernels_of_the_same_sizes_are_one_unless_one_waits_for_the_other():
    """A sum over an image, and one of its product with a convolution, which is of the image or of what is
    made of the image and the sum by another kernel.
    """

    def sums(x: torch.Tensor, *, waits: bool) -> torch.Tensor:
        total = x.sum((2, 3), keepdim=True)
        h = F.conv2d(x + total if waits else x, torch.empty(4, 4, 1, 1))
        return total + (x * h).sum((2, 3), keepdim=True)

    together, apart = (compiled(lambda x, w=w: sums(x, waits=w))[0] for w in (False, True))
    assert together == 1 + 1 and apart == 1 + 3


def test_pieces_of_one_tensor_are_written_by_the_kernel_that_makes_them():
    kernels, moved = compiled(lambda x: (torch.cat([x.exp(), x.neg()]), x.sin())[1])
    assert (kernels, moved) == (1, 1 + 2 + 1)
    assert compiled(lambda x: (torch.cat([x, x.sin()]), x.sin())[1])[0] == 1


def test_what_is_read_in_another_precision_costs_no_more_to_read_again():
    """The square of x, widened, would be written if the last chain did not read the same x."""

    def run(x: torch.Tensor) -> torch.Tensor:
        wide = x.bfloat16().double()
        square = wide.square() + 1
        h = F.conv2d(square.float(), torch.empty(4, 4, 1, 1))
        return h * wide + square

    kernels, moved = compiled(run)
    small = 16 / N
    # written once in float32 for the convolution; x is read twice
    assert kernels == 3 and moved == pytest.approx(2 + (2 + small) + (1 + 1 + 2))


def test_a_reduction_goes_on_with_its_results():
    """A sum of 4,096 values is split in two kernels, and the second takes its exponential."""
    assert compiled(lambda x: x.sum())[0] == compiled(lambda x: x.sum().exp())[0] == 2
    assert compiled(lambda x: x.sum().exp() * torch.empty(3))[0] == 3


def test_blocks_are_not_fused_with_each_other():
    with FakeTensorMode():
        x = torch.empty(N)
        with StepTrace() as trace:
            trace.block(torch.exp)(trace.block(torch.relu)(x))
    assert trace.compiled.num_kernels == 2 and trace.compiled.num_bytes == 4 * 4 * N


def test_a_gather_reads_what_it_takes():
    with FakeTensorMode():
        table, index = torch.empty(10**6, 8), torch.zeros(16, dtype=torch.long)
        with StepTrace() as trace:
            table[index]
    assert trace.cost.num_bytes == 2 * 16 * 8 * 4 + 16 * 8
