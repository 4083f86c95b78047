"""Counts of a traced step against numbers worked out by hand, and against what PyTorch really allocates."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medldm.networks.convolution import conv
from medldm.planning.roofline import Card, Habits, expected_seconds, largest_batch, roofline_seconds
from medldm.planning.step import as_on_cuda
from medldm.planning.trace import AttentionAsOnCUDA, AutocastAsOnCUDA, StepTrace

CARD = Card(memory_gib=1.0, bandwidth=1.0, bf16=4e-6, fp32=1e-6)  # 1 GB/s, 4 and 1 MFLOP/s


def traced(run) -> StepTrace:
    with FakeTensorMode(allow_non_fake_inputs=True), StepTrace() as trace:
        run()
    return trace


def test_a_product_counts_its_work_and_its_three_matrices():
    cost = traced(lambda: torch.empty(8, 32) @ torch.empty(32, 4)).cost
    assert cost.num_kernels == 1
    assert cost.flops == 2 * 8 * 32 * 4
    assert cost.num_bytes == 4 * (8 * 32 + 32 * 4 + 8 * 4)


def test_views_and_allocations_are_no_kernels_and_a_broadcast_axis_is_read_once():
    def run() -> None:
        x = torch.empty(4, 1).expand(4, 1000).transpose(0, 1)
        x + torch.empty(1000, 4)

    cost = traced(run).cost
    assert cost.num_kernels == 1
    assert cost.num_bytes == 4 * (4 + 4000 + 4000)


def test_a_copy_reads_its_source_and_writes_its_destination():
    def run() -> None:
        low, exact = torch.empty(100, dtype=torch.bfloat16), torch.empty(100)
        low.copy_(exact)
        torch._foreach_copy_([low, low], [exact, exact])
        exact.zero_()

    cost = traced(run).cost
    assert cost.num_kernels == 3
    assert cost.num_bytes == 3 * (200 + 400) + 400


def test_norms_biases_and_their_gradients_are_kernels_of_their_own():
    def run() -> None:
        x, layer, norm = torch.empty(1, 8, 6, 6, requires_grad=True), nn.Conv2d(8, 8, 1), nn.GroupNorm(2, 8)
        norm(layer(x)).backward(torch.empty(1, 8, 6, 6))

    cost = traced(run).cost
    found = {op.name: (op.num_calls, op.num_kernels) for op in cost.operations.values()}
    assert found["convolution"] == (1, 2) and found["convolution_backward"] == (1, 2)
    assert found["bias_gradient"] == (1, 1)
    assert found["native_group_norm"] == (1, 3) and found["native_group_norm_backward"] == (1, 5)
    assert cost.num_kernels == sum(kernels for _, kernels in found.values())


def test_the_peak_is_of_tensors_alive_at_one_time():
    def run() -> None:
        x = torch.ones(1000)  # 4,000 bytes, kept
        for _ in range(5):
            x = x * 2  # two of them alive at most

    assert traced(run).cost.peak_bytes == 8000


def test_a_convolution_may_copy_its_tensors():
    layer = nn.Conv3d(2, 3, 3, padding=1, bias=False)

    def run() -> None:
        with torch.no_grad():
            nn.functional.conv3d(torch.empty(1, 2, 4, 4, 4), torch.empty(3, 2, 3, 3, 3), padding=1)

    cost = traced(run).cost
    image, weight, out = 4 * 2 * 64, 4 * layer.weight.numel(), 4 * 3 * 64
    assert cost.peak_bytes == image + weight + out
    assert cost.peak_bytes_with_workspace == 2 * (image + weight + out)
    assert cost.flops == 2 * 3 * 64 * 2 * 27


def test_autocast_is_as_on_cuda():
    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            h = nn.functional.conv2d(torch.empty(1, 4, 8, 8), torch.empty(4, 4, 1, 1))
            types.append(h.dtype)
            types.append(nn.functional.interpolate(h, scale_factor=2.0).dtype)
            types.append(nn.functional.max_pool2d(h, 2).dtype)
            types.append(nn.functional.group_norm(h, 2).dtype)

    types: list = []
    with FakeTensorMode(), AutocastAsOnCUDA():
        run()
    assert types == [torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32]


def test_the_roofline_is_the_slower_of_work_and_traffic():
    small = traced(lambda: torch.empty(8, 32) @ torch.empty(32, 4)).cost
    assert roofline_seconds(small, CARD) == pytest.approx(2048 / 1e6)  # 1 MFLOP/s is the slower
    copy = traced(lambda: torch.empty(1000) + 1).cost
    assert roofline_seconds(copy, CARD) == pytest.approx(8000 / 1e9)
    habits = Habits(conv2d=0.5, conv3d=0.5, product=0.25, bandwidth=0.5, launch_us=1.0)
    assert expected_seconds(small, CARD, habits) == pytest.approx(4 * 2048 / 1e6)
    assert expected_seconds(copy, CARD, habits) == pytest.approx(16000 / 1e9)


@pytest.mark.parametrize(("limit", "batch"), [(10.0, 4), (9.9, 3), (2.0, 0), (4.0, 1)])
def test_the_largest_batch_is_read_off_a_line(limit, batch):
    assert largest_batch([(1, 4.0), (3, 8.0)], limit) == batch


def test_a_convolution_of_volumes_is_counted_in_bf16_as_a_gpu_computes_it():
    """A CPU computes it in float32, from rounded operands."""
    layer = conv(3, 2, 4, 3, padding=1)
    with as_on_cuda(), torch.autocast("cpu", torch.bfloat16):
        cost = traced(lambda: layer(torch.empty(1, 2, 4, 4, 4))).cost
    assert {op.dtype for op in cost.operations.values() if op.flops} == {torch.bfloat16}
    assert cost.num_kernels == 3 + 2  # input, weight and bias are rounded; the bias is added by itself


def test_attention_is_laid_out_as_its_queries_as_on_cuda():
    slices_first = torch.empty(4, 6, 2, 8).permute(1, 2, 0, 3)  # (B, heads, L, c)
    with FakeTensorMode(allow_non_fake_inputs=True), AttentionAsOnCUDA():
        out = nn.functional.scaled_dot_product_attention(*(slices_first.clone() for _ in range(3)))
    assert out.permute(2, 0, 1, 3).is_contiguous()
