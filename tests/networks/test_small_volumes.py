"""Convolutions of a single small volume on a CPU go to oneDNN where no gradient is recorded."""

import pytest
import torch

from medldm.networks.convolution import conv
from medldm.planning.trace import StepTrace


def names_and_flops(layer, x) -> tuple[set[str], float]:
    with StepTrace() as trace:
        layer(x)
    return {op.name for op in trace.cost.operations.values()}, trace.cost.flops


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": (1, 3, 3), "padding": (0, 1, 1)},
        {"kernel_size": 3, "stride": 2, "padding": 1, "bias": False},
        {"kernel_size": 3, "padding": 2, "dilation": 2},
    ],
)
def test_it_gives_the_same_and_counts_the_same_work(options):
    torch.manual_seed(0)
    layer, x = conv(3, 8, 12, **options), torch.randn(1, 8, 10, 10, 12)
    wanted = layer(x)  # with gradients: by torch's own choice
    torch.testing.assert_close(wanted, layer(x.expand(2, -1, -1, -1, -1))[:1], rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-5)
        names, flops = names_and_flops(layer, x)
    assert names == {"mkldnn_convolution"}
    assert (flops, {"convolution"}) == names_and_flops(layer, x)[::-1] and flops > 0


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((2, 4, 8, 8, 8), {}),  # a batch
        ((1, 4, 4, 4, 4), {}),  # few places, where a copy of the weights would cost more
        ((1, 4, 8, 8, 8), {"kernel_size": 1, "padding": 0}),
        ((1, 4, 8, 8, 8), {"groups": 2}),
        ((1, 4, 8, 8, 8), {"padding_mode": "replicate"}),
    ],
)
def test_all_others_are_left_to_torch(shape, options):
    layer = conv(3, 4, 4, **{"kernel_size": 3, "padding": 1} | options)
    with torch.no_grad():
        assert "mkldnn_convolution" not in names_and_flops(layer, torch.randn(shape))[0]
        with torch.autocast("cpu", torch.bfloat16):
            assert "mkldnn_convolution" not in names_and_flops(layer, torch.randn(1, *shape[1:]))[0]
        assert "mkldnn_convolution" not in names_and_flops(layer.double(), torch.randn(shape).double())[0]
