"""Blocks as a GPU calls them: weights rounded at once, compiled, and what happens where that fails."""

import copy
import logging
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import nn

from medldm.commands import train
from medldm.devices import CPU, GPU, choose_loop, choose_settings
from medldm.diffusion.condition import Condition
from medldm.diffusion.encoders import BlockMaximum, MaxPool, SegConv
from medldm.networks import compiling
from medldm.networks.autoencoder import Stack, VQAutoencoder
from medldm.networks.factorised import FactorisedAttention
from medldm.networks.layers import AttentionBlock, ResBlock
from medldm.networks.norms import group_norm
from medldm.networks.quantizer import VectorQuantizer
from medldm.networks.spade import SPADE
from medldm.networks.unet import UNet
from medldm.planning.trace import StepTrace
from medldm.training.run import Run


class Row(nn.Sequential):
    """Blocks each of which adds its own bias."""

    rounds_together = True


def stack(kind: Callable[..., nn.Module] = Row, *, use_checkpoint: bool = False) -> nn.Module:
    torch.manual_seed(0)
    options = {"norm": group_norm, "embedding_channels": 0, "use_checkpoint": use_checkpoint}
    return kind(
        ResBlock(2, 8, 16, **options), AttentionBlock(16, num_heads=2), ResBlock(2, 16, 8, **options)
    ).train()


def gradients(module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    module.zero_grad()
    out.float().square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize("use_checkpoint", [False, True])
def test_weights_rounded_at_once_give_what_autocast_gives(use_checkpoint):
    x = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(1))
    plain, blocks = stack(use_checkpoint=use_checkpoint), stack(use_checkpoint=use_checkpoint)
    seen = []

    def watched(call):
        def run(*args, **kwargs):
            seen.append({name: p.dtype for name, p in call.__self__._parameters.items() if p is not None})
            return call(*args, **kwargs)

        return run

    blocks.insert(0, nn.Conv2d(8, 8, 1)), plain.insert(0, nn.Conv2d(8, 8, 1))
    blocks[0].load_state_dict(plain[0].state_dict())
    blocks[0].is_block = True
    keys = blocks.state_dict().keys()
    compiling.wrap_blocks(blocks, watched)
    for wanted, found in zip(gradients(plain, x), gradients(blocks, x), strict=True):
        assert found.dtype == wanted.dtype and torch.equal(found, wanted)
    # the convolution's, while it ran
    assert seen[0] == {"weight": torch.bfloat16, "bias": torch.float32}
    assert {p.dtype for p in blocks.parameters()} == {torch.float32} and blocks.state_dict().keys() == keys


def unet(dtype: torch.dtype = torch.float32) -> UNet:
    torch.manual_seed(0)
    return UNet(
        2, in_channels=2, out_channels=2, stem_channels=8, channels=[8, 16], num_res_blocks=1, num_heads=2,
        sinusoidal_channels=8, embedding_channels=16, zero_init_last=False,
    ).to(dtype)  # fmt: skip


def unet_gradients(
    network: UNet, dtype: torch.dtype, *, bf16: bool
) -> tuple[list[torch.Tensor], dict[str, int]]:
    """The output and all gradients, and how often operations ran."""
    generator = torch.Generator().manual_seed(1)
    z = torch.randn(2, 2, 8, 8, generator=generator, dtype=dtype)
    t = torch.tensor([3.0, 700.0], dtype=dtype)
    with StepTrace() as trace, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = network(z, t, Condition(None, None, None, None))
        out.double().square().sum().backward()
    ran = {op.name: op.num_calls for op in trace.cost.operations.values()}
    return [out.detach(), *(p.grad for p in network.parameters())], ran


def test_the_units_of_a_unet_read_the_embedding_by_one_product_where_weights_are_rounded(monkeypatch):
    """In float64 they are not float32 either, and both ways agree to its rounding."""
    found, ran = unet_gradients(unet(torch.float64), torch.float64, bf16=False)
    monkeypatch.setattr("medldm.networks.unet.projected", lambda steps, e: e)
    wanted, before = unet_gradients(unet(torch.float64), torch.float64, bf16=False)
    num_units = sum(step.kind == "unit" for step, _ in unet().steps)
    assert before["addmm"] - ran["addmm"] == num_units - 1 > 3
    for value, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("num_ranks", "num_roundings"), [(1, 1), (2, 12)])
def test_a_unet_that_trains_alone_rounds_its_weights_at_once(num_ranks, num_roundings, monkeypatch):
    """Beside other processes block by block, so that gradients are exchanged while others are computed."""
    monkeypatch.setattr(compiling, "num_ranks", lambda: num_ranks)
    network = unet()
    compiling.wrap_blocks(network, lambda call: call)
    assert num_roundings == (1 if num_ranks == 1 else len(list(compiling.outermost_blocks(network))))
    values, ran = unet_gradients(network, torch.float32, bf16=True)
    assert ran["_foreach_copy_"] == 2 * num_roundings  # and as many widenings of gradients
    wanted, _ = unet_gradients(unet(), torch.float32, bf16=True)
    assert {p.dtype for p in network.parameters()} == {torch.float32}
    for value, other in zip(values, wanted, strict=True):
        assert value.dtype == other.dtype
        torch.testing.assert_close(value, other, rtol=0.05, atol=0.05)


def test_frozen_weights_that_are_rounded_with_others_get_no_gradients():
    frozen, trained = torch.ones(3), torch.ones(3, requires_grad=True)
    low = compiling.Rounded.apply(torch.bfloat16, frozen, trained)
    assert [x.requires_grad for x in low] == [False, True]
    (low[0] * low[1]).sum().backward()
    assert frozen.grad is None and torch.equal(trained.grad, torch.ones(3))


def test_a_function_of_a_copied_module_uses_the_copys_weights():
    class Owner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(1, 1, bias=False)
            self.run = compiling.Function(self.applied, (self.layer,))

        def applied(self, x):
            return self.layer(x)

    first = Owner()
    second = copy.deepcopy(first)
    nn.init.constant_(first.layer.weight, 2.0), nn.init.constant_(second.layer.weight, 3.0)
    assert second.run(torch.ones(1)).item() == 3.0 and list(second.state_dict()) == ["layer.weight"]
    assert second.run.parts[0] is second.layer


def test_where_the_compiler_fails_blocks_run_as_they_are_and_one_warning_says_so(monkeypatch, caplog):
    def broken(*args, **kwargs):
        raise RuntimeError("no compiler here\nand more")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", broken)
    monkeypatch.setattr(compiling, "_warned", set())
    x = torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(1))
    with caplog.at_level(logging.WARNING, logger=compiling.__name__):
        for kind in (Row, lambda *blocks: Stack(blocks)):
            plain, blocks = stack(kind), stack(kind)
            compiling.compile_blocks(blocks)
            torch.testing.assert_close(blocks(x), plain(x))  # biases are added in another order
    (record,) = [r for r in caplog.records if r.name == compiling.__name__]
    assert "RuntimeError: no compiler here; blocks run uncompiled" in record.getMessage()


def test_a_loop_hands_out_results_that_the_next_call_does_not_change(monkeypatch):
    """As CUDA graphs do, the compiled network here writes into one buffer."""
    buffer = torch.zeros(2)
    monkeypatch.setattr(compiling, "compiled", lambda call, backend: lambda x: buffer.copy_(call(x)))
    network = nn.Identity()
    compiling.compile_loop(network, records=True)
    first = network(torch.ones(2))
    assert network(torch.full((2,), 5.0)).tolist() == [5, 5] and first.tolist() == [1, 1]


def test_a_loop_becomes_a_cuda_graph_on_a_gpu_alone(monkeypatch):
    """Compiled here as if on each; the compiler's second half tells what it was asked for."""
    asked = []

    def told(graph, inputs, config_patches):
        asked.append(config_patches)
        return graph.forward

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", told)
    for hardware in (GPU, CPU):
        network = nn.Linear(2, 2)
        compiling.compile_loop(network, records=choose_loop(True, hardware=hardware).records)
        x = torch.ones(1, 2)
        torch.testing.assert_close(network(x), network.forward(x), atol=0, rtol=0)
    assert asked == [{"triton.cudagraphs": True}, {"triton.cudagraphs": False}]


@pytest.mark.parametrize("strides", [(2, 2, 2), (1, 2, 2), (2, 1, 2)])
def test_maxima_of_blocks_and_their_gradients_are_those_of_a_volume_also_where_values_are_equal(strides):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (2, 3, 4, 8, 8), generator=generator).float()
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    wanted = nn.functional.max_pool3d(theirs.relu(), strides)
    weights = torch.randn(wanted.shape, generator=generator)
    (wanted * weights).sum().backward()
    for pool in (MaxPool(3, strides), lambda x: BlockMaximum.apply(x, torch.zeros(3), strides)):
        ours.grad = None
        out = pool(ours).relu()  # the order of SegConv, against the published one
        (out * weights).sum().backward()
        assert torch.equal(out, wanted) and torch.equal(ours.grad, theirs.grad)


def test_a_training_compiles_as_its_settings_say_and_keeps_kernels_in_its_folder(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(train, "compile_blocks", lambda module, folder: asked.append(folder))
    run = Run(tmp_path, {}, None, None)
    for hardware in (GPU, CPU):
        train.lay_out(nn.Identity(), choose_settings(channels_last=False, hardware=hardware), run)
    assert asked == [tmp_path / "compiled"]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_gamma_and_beta_of_a_norm_are_one_convolution_where_weights_are_rounded(spatial_dims):
    """In float64 the weights are not float32 either, and both ways agree to its rounding."""
    norm = SPADE(spatial_dims, 6, map_channels=3, hidden_channels=5).double()
    spade = torch.randn(2, 3, *(4,) * spatial_dims, dtype=torch.float64)
    found = norm.modulation(spade, spade.shape[2:])
    hidden = norm.shared(spade).relu()
    torch.testing.assert_close(found.gamma, norm.gamma(hidden))
    torch.testing.assert_close(found.beta, norm.beta(hidden))


@pytest.mark.parametrize(
    "options", [{}, {"relative_bias": True}, {"spatial": "full"}, {"spatial": "none", "head_channels": 30}]
)
def test_attention_with_its_products_in_a_compilers_order_gives_the_same(options):
    torch.manual_seed(0)
    attention = FactorisedAttention(8, zero_init_last=False, **options).double()
    assert_same_when_compiling(attention, torch.randn(2, 8, 5, 8, 8, dtype=torch.float64))


def test_the_gradient_of_a_bias_beside_a_maximum():
    x, bias = torch.randn(2, 3, 4, 6, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    weights = torch.randn(2, 3, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, bias: BlockMaximum.apply(x, bias, (2, 2)) * weights,
        (x.requires_grad_(), bias.requires_grad_()),
    )


@pytest.mark.parametrize("strides", [(2, 4, 4), (4, 4)])
def test_an_encoder_of_maps_as_a_compiler_sees_it_gives_the_same(strides):
    torch.manual_seed(0)
    encoder = SegConv(3, 4, strides).double()
    assert_same_when_compiling(encoder, torch.randn(2, 3, *(8,) * len(strides), dtype=torch.float64))


def as_a_compiler_calls(call):
    def run(*args, **kwargs):
        with compiling.as_if_compiling():
            return call(*args, **kwargs)

    return run


AUTOENCODERS = {
    "2d": (2, {"attention_levels": [1], "mid": ["res", "attn", "res"]}),
    "2d_up_res": (2, {"layout": "up_res", "resample": "conv3", "use_checkpoint": True}),
    "3d_strided": (3, {"layout": "strided", "latent_kernel": None}),
    "3d_spade": (3, {"decoder_map_channels": 3, "latent_kernel": None}),
    "3d_truncated": (3, {"shortcut": "none", "decoder_map_channels": 3}),
}


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_blocks_that_leave_their_biases_to_the_next_give_the_same(name):
    """Of a chain of residual blocks the biases are one offset. Its gradient is one sum, where each bias had
    one.
    """
    dims, options = AUTOENCODERS[name]
    found = []
    for yes in (False, True):
        torch.manual_seed(0)
        network = VQAutoencoder(
            dims, quantizer=partial(VectorQuantizer, 16), latent_channels=3, image_channels=1,
            stem_channels=8, channels=[8, 12], strides=[1, 2], num_res_blocks=[2, 2], norm_groups=4,
            num_heads=2, **options,
        ).double()  # fmt: skip
        layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
        network = network.to(memory_format=layout)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
        x = torch.randn(2, 1, *(8,) * dims, dtype=torch.float64).to(memory_format=layout).requires_grad_()
        mask = None
        if network.decoder_map_channels:
            mask = torch.randn(2, 3, *(8,) * dims, dtype=torch.float64).to(memory_format=layout)
        if yes:
            compiling.wrap_blocks(network, as_a_compiler_calls)
        with StepTrace() as trace:
            z = network.encode(x)
            out = network.decode(z, mask)
            (out.square().sum() + z.sum()).backward()
        gradients = [p.grad for name, p in network.named_parameters() if "quantizer" not in name]
        found.append([z.detach(), out.detach(), x.grad, *gradients])
        sums = [op.num_calls for op in trace.cost.operations.values() if op.name == "bias_gradient"]
        found[-1].append(sum(sums))
    (*wanted, before), (*values, after) = found
    assert after < before - 4
    for value, other in zip(values, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-9, atol=1e-10)


UNETS = {
    "full attention": (2, {"num_heads": 2, "scale_shift": True}),
    "factorised, with a map": (
        3,
        {
            "attention": partial(FactorisedAttention, num_heads=2, head_channels=4),
            "stem_attention": partial(FactorisedAttention, spatial="none", num_heads=2, head_channels=4),
            "kernel_size": [1, 3, 3],
            "strides": [1, 2, 2],
            "spade_channels": 3,
        },
    ),
}


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_whose_blocks_leave_their_biases_to_attention_gives_the_same(name):
    dims, options = UNETS[name]
    layout = {2: torch.channels_last, 3: torch.channels_last_3d}[dims]
    found = []
    for yes in (False, True):
        torch.manual_seed(0)
        network = UNet(
            dims, in_channels=2, out_channels=2, stem_channels=8, channels=[8, 16], num_res_blocks=1,
            sinusoidal_channels=8, embedding_channels=16, norm_groups=4, **options,
        ).double().to(memory_format=layout)  # fmt: skip
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=0.3)
        z = torch.randn(2, 2, *(8,) * dims, dtype=torch.float64).to(memory_format=layout)
        spade = torch.randn(2, 3, *(8,) * dims, dtype=torch.float64).to(memory_format=layout)
        condition = Condition(None, None, spade if "spade_channels" in options else None, None)
        if yes:
            compiling.wrap_blocks(network, as_a_compiler_calls)
        with StepTrace() as trace:
            out = network(z, torch.tensor([3.0, 700.0], dtype=torch.float64), condition)
            out.square().sum().backward()
        found.append([out.detach(), *(p.grad for p in network.parameters())])
        found[-1].append(sorted(op.name for op in trace.cost.operations.values()))
    (*wanted, before), (*values, after) = found
    assert before != after
    for value, other in zip(values, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-8, atol=1e-9)


def assert_same_when_compiling(block: nn.Module, x: torch.Tensor) -> None:
    """To the rounding of float64, and in its operations not the same."""
    found = []
    for yes in (False, True):
        given = x.clone().requires_grad_()
        block.zero_grad()
        with compiling.as_if_compiling(yes), StepTrace() as trace:
            out = block(given)
        (out * torch.linspace(0, 1, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        found.append([out.detach(), given.grad, *(p.grad.clone() for p in block.parameters())])
        found[-1].append(sorted(op.name for op in trace.cost.operations.values()))
    (*wanted, before), (*values, after) = found
    assert before != after
    for value, other in zip(values, wanted, strict=True):
        torch.testing.assert_close(value, other, rtol=1e-10, atol=1e-12)
