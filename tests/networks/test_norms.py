"""Group norms as a compiler sees them, which give what `F.group_norm` gives."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medldm.networks import norms
from medldm.networks.compiling import as_if_compiling, compiled
from medldm.networks.layers import ResBlock
from medldm.networks.norms import SummedInParts, group_norm, group_normed
from medldm.networks.spade import SPADE
from medldm.planning.trace import StepTrace

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def volume(*shape: int) -> torch.Tensor:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}[len(shape)]
    return (2 + drawn(*shape)).detach().to(memory_format=layout).requires_grad_()


@pytest.mark.parametrize("scaled_by", ["nothing", "weights", "maps"])
@pytest.mark.parametrize("embeds", [False, True])
@pytest.mark.parametrize("of_offset", [None, 1, 3])
@pytest.mark.parametrize(("size", "most"), [((5, 6), 1000), ((2, 3, 7), 1000), ((2, 3, 7), 1)])
def test_sums_of_parts_give_the_norm_and_all_gradients(scaled_by, embeds, of_offset, size, most, monkeypatch):
    """With an offset of all samples or of each. The places are 3 parts; they are summed at once, or, where
    that would be more than `most` values, in two steps.
    """
    torch.manual_seed(0)
    monkeypatch.setattr(norms, "NUM_SUMS", 3 * 12 * 3)
    for name in ("LONGEST_ROW", "LONGEST_SUM"):
        monkeypatch.setattr(norms, name, most)
    monkeypatch.setattr(norms, "MOST_AT_ONCE", 3)
    assert norms.in_parts(torch.empty(3, 12, *size), 4).shape[1] == 3
    x, offset = volume(3, 12, *size), None if of_offset is None else drawn(of_offset, 12)
    weights = (None, None) if scaled_by == "nothing" else (drawn(1, 12), drawn(1, 12))
    maps = volume(3, 24, *size) if scaled_by == "maps" else None
    embedding = drawn(3, 24) if embeds else None

    def wide(v: torch.Tensor) -> torch.Tensor:
        return v.reshape(*v.shape, *(1,) * len(size))

    wanted = F.group_norm(x if offset is None else x + wide(offset), 4, eps=1e-3)
    if scaled_by == "weights":
        wanted = wanted * wide(weights[0]) + wide(weights[1])
    if scaled_by == "maps":
        gamma, beta = maps.chunk(2, dim=1)
        wanted = wanted * (1 + gamma + wide(weights[0])) + beta + wide(weights[1])
    if embeds:
        scale, shift = wide(embedding).chunk(2, dim=1)
        wanted = wanted * (1 + scale) + shift
    found = SummedInParts.apply(x, *weights, offset, maps, embedding, 4, 1e-3)
    assert found.stride() == x.stride()
    torch.testing.assert_close(found, wanted, **EXACT)
    given = [v for v in (x, *weights, offset, maps, embedding) if v is not None]
    factors = torch.randn_like(found)
    gradients = [torch.autograd.grad((out * factors).sum(), given) for out in (found, wanted)]
    assert gradients[0][0].stride() == x.stride()
    for value, other in zip(*gradients, strict=True):
        torch.testing.assert_close(value, other, **EXACT)


def test_the_norm_in_bf16_is_that_of_float32_rounded():
    x = (30 + torch.randn(2, 8, 16, 16)).bfloat16().to(memory_format=torch.channels_last)
    with as_if_compiling():
        found = group_normed(x, 2)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, F.group_norm(x.double(), 2).bfloat16(), rtol=2**-7, atol=1e-3)


SPADE_NORM = partial(SPADE, 3, map_channels=2, hidden_channels=4, groups=4)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": group_norm},
        {"norm": group_norm, "embedding_channels": 5},
        {"norm": group_norm, "embedding_channels": 5, "scale_shift": True},
        {"norm": group_norm, "shortcut": "none", "embedding_channels": 5},
        {"norm": SPADE_NORM},
        {"norm": SPADE_NORM, "embedding_channels": 5, "scale_shift": True},
        {"norm": partial(SPADE, 3, map_channels=2, hidden_channels=4), "embedding_channels": 5},
    ],
)
def test_a_block_as_a_compiler_sees_it_gives_the_same(options):
    torch.manual_seed(0)
    block = ResBlock(3, 8, 16, **options).double().to(memory_format=torch.channels_last_3d)
    x, e, spade = volume(2, 8, 2, 4, 4), drawn(2, 5), volume(2, 2, 2, 4, 4)
    found, ran = [], []
    for yes in (False, True):
        block.zero_grad()
        given = [v.detach().requires_grad_() for v in (x, e, spade)]
        with as_if_compiling(yes), StepTrace() as trace:
            out = block(*given)
        (out * torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        found.append([out.detach(), *(p.grad for p in block.parameters()), *(v.grad for v in given)])
        ran.append({op.name for op in trace.cost.operations.values()})
    assert ran[0] != ran[1]
    for value, other in zip(*found, strict=True):
        assert (value is None) is (other is None)
        if value is not None:
            torch.testing.assert_close(value, other, **EXACT)


@pytest.mark.parametrize("scale_shift", [False, True])
def test_an_embedding_leaves_a_block_of_float32_input_in_bf16(scale_shift):
    block = ResBlock(2, 8, 8, norm=group_norm, embedding_channels=5, scale_shift=scale_shift)
    seen = []
    block.conv2.register_forward_pre_hook(lambda layer, given: seen.append(given[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        block(torch.randn(2, 8, 4, 4), torch.randn(2, 5))
    assert seen == [torch.bfloat16]


def test_the_compilers_front_end_follows_a_block_that_is_computed_again():
    """With activation checkpointing; what it follows is then run as it is."""
    torch.manual_seed(0)
    options = {"embedding_channels": 5, "scale_shift": True, "use_checkpoint": True}
    block = ResBlock(2, 8, 8, norm=group_norm, **options).double().to(memory_format=torch.channels_last)
    x, e = volume(2, 8, 4, 4), drawn(2, 5)

    def gradients(run: nn.Module) -> list[torch.Tensor]:
        block.zero_grad()
        out = run(x, e)
        out.square().sum().backward()
        return [out.detach(), *(p.grad.clone() for p in block.parameters())]

    seen = []

    def watched(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        seen.append({str(node.target) for node in graph.graph.nodes})
        return graph

    wanted, found = gradients(block), gradients(compiled(block._call_impl, backend=watched))
    assert len(seen) == 1
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other, **EXACT)
