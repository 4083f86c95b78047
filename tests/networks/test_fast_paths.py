"""What is fast is also equal: the quantiser's search, memory layouts."""

import pytest
import torch

from medldm.devices import CODES_PER_BLOCK
from medldm.diffusion.condition import Condition
from medldm.networks import quantizer as module
from medldm.networks.autoencoder import VQAutoencoder
from medldm.networks.convolution import conv, conv_transpose
from medldm.networks.factorised import NUM_PLACES, Rotary
from medldm.networks.layers import (
    AttentionBlock,
    Downsample,
    ResBlock,
    Upsample,
    pointwise,
)
from medldm.networks.norms import GroupNorm, group_norm
from medldm.networks.quantizer import VectorQuantizer, exact_matmul, nearest_codes
from medldm.networks.unet import UNet
from medldm.planning.trace import StepTrace

LAYOUTS = {2: torch.channels_last, 3: torch.channels_last_3d}


@pytest.mark.parametrize("num_codes", [1, 127, 128, 129, 1000])
@pytest.mark.parametrize("code_dim", [1, 4, 8])
@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_nearest_codes_equal_the_full_distance_matrix(num_codes, code_dim, kind, monkeypatch):
    monkeypatch.setitem(CODES_PER_BLOCK, "cpu", CODES_PER_BLOCK[kind])
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", {"cpu": 1024 * 37})  # several chunks, the last one short
    generator = torch.Generator().manual_seed(num_codes)
    x = torch.randn(301, code_dim, generator=generator)
    codebook = torch.randn(num_codes, code_dim, generator=generator)
    chosen = nearest_codes(x, codebook)
    distances = torch.cdist(x.double(), codebook.double()).square()
    excess = distances.gather(1, chosen[:, None])[:, 0] - distances.amin(1)
    assert excess.max() < 1e-5  # where two codes are equally near in float32, either is right
    assert (chosen == distances.argmin(1)).float().mean() > 0.99


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_equal_codes_give_the_first_one(kind, monkeypatch):
    monkeypatch.setitem(CODES_PER_BLOCK, "cpu", CODES_PER_BLOCK[kind])
    codebook = torch.arange(400.0).remainder(40)[:, None]  # every value ten times, in all blocks
    x = torch.arange(40.0)[:, None]
    assert nearest_codes(x, codebook).tolist() == list(range(40))


def test_tf32_is_off_in_the_search_and_back_on_after_it():
    torch.set_float32_matmul_precision("high")
    try:
        with exact_matmul():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_blocks_keep_channels_last(spatial_dims):
    layout = LAYOUTS[spatial_dims]
    x = torch.randn(2, 8, *(4,) * spatial_dims).to(memory_format=layout)
    blocks = [
        GroupNorm(2, 8),
        ResBlock(spatial_dims, 8, 16, norm=group_norm),
        AttentionBlock(8, num_heads=2),
        Downsample(spatial_dims, 8, 8),
        Upsample(spatial_dims, 8, 8),
    ]
    for block in blocks:
        out = block.to(memory_format=layout)(x)
        assert out.is_contiguous(memory_format=layout), type(block).__name__


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_pointwise_equals_the_convolution_in_both_layouts(spatial_dims):
    layer = getattr(torch.nn, f"Conv{spatial_dims}d")(6, 5, 1)
    x = torch.randn(2, 6, *(3,) * spatial_dims)
    for layout in (torch.contiguous_format, LAYOUTS[spatial_dims]):
        out = pointwise(layer, x.to(memory_format=layout))
        torch.testing.assert_close(out, layer(x))
        assert out.is_contiguous(memory_format=layout)
    assert pointwise(torch.nn.Identity(), x) is x


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_unet_and_its_gradients_do_not_depend_on_the_layout(spatial_dims):
    torch.manual_seed(0)
    network = UNet(
        spatial_dims, in_channels=3, out_channels=2, stem_channels=8, channels=[8, 16], num_res_blocks=1,
        num_heads=2, sinusoidal_channels=8, embedding_channels=16, zero_init_last=False,
    )  # fmt: skip
    size = (8,) * spatial_dims
    z, concat, t = torch.randn(2, 2, *size), torch.randn(2, 1, *size), torch.tensor([3.0, 700.0])

    def results() -> list[torch.Tensor]:
        out = network(z, t, Condition(concat, None, None, None))
        return [out, *torch.autograd.grad(out.square().mean(), list(network.parameters()))]

    plain = results()
    network.to(memory_format=LAYOUTS[spatial_dims])
    for a, b in zip(plain, results(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_autoencoder_does_not_depend_on_the_layout(spatial_dims):
    torch.manual_seed(0)

    def quantizer(code_dim: int) -> VectorQuantizer:
        return VectorQuantizer(16, code_dim, init="normal")

    network = VQAutoencoder(
        spatial_dims, quantizer=quantizer, latent_channels=4, stem_channels=8, channels=[8, 16],
        strides=[2, 2], num_heads=2,
    ).eval()  # fmt: skip
    x = torch.randn(2, 1, *(16,) * spatial_dims)
    with torch.no_grad():
        plain, _ = network(x)
        network.to(memory_format=LAYOUTS[spatial_dims])
        torch.testing.assert_close(network(x)[0], plain, rtol=1e-3, atol=1e-4)


KINDS = [
    (conv, [1, 3, 3], 1),
    (conv, [1, 3, 3], [1, 2, 2]),
    (conv_transpose, [1, 4, 4], [1, 2, 2]),
]


@pytest.mark.parametrize(("make", "kernel", "stride"), KINDS)
def test_kernels_within_slices_run_as_those_of_images_without_a_copy(make, kernel, stride):
    layer = make(3, 3, 5, kernel, stride=stride, padding=[0, 1, 1]).to(memory_format=torch.channels_last_3d)
    x = torch.randn(2, 3, 4, 6, 8)
    expected = layer(x)  # in the other layout, a convolution of volumes
    with StepTrace() as trace:
        out = layer(x.to(memory_format=torch.channels_last_3d))
    torch.testing.assert_close(out, expected)
    assert out.is_contiguous(memory_format=torch.channels_last_3d)
    assert [(op.name, op.spatial_dims, op.num_calls) for op in trace.cost.operations.values()] == [
        ("_to_copy", 0, 1),  # that of this test
        ("convolution", 2, 1),
    ]


def test_kernels_across_slices_and_the_borders_of_volumes_stay_as_they_are():
    x = torch.randn(1, 2, 4, 6, 6).to(memory_format=torch.channels_last_3d)
    layers = [
        conv(3, 2, 2, 3, padding=1),
        conv(3, 2, 2, [1, 3, 3], padding=[0, 1, 1], padding_mode="replicate"),
    ]
    for layer in layers:
        plain = torch.nn.Conv3d(
            2, 2, layer.kernel_size, padding=layer.padding, padding_mode=layer.padding_mode
        )
        plain.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), plain(x))


def test_rotary_angles_are_those_of_their_formula_beyond_the_table_too():
    rotary = Rotary(8)
    assert not rotary.state_dict()
    x = torch.randn(1, NUM_PLACES + 3, 2, 8)
    out = rotary(x)
    places, frequencies = torch.arange(NUM_PLACES + 3.0), 10_000.0 ** (-torch.arange(4) / 4)
    turned = torch.view_as_complex(torch.stack([x[..., :4], x[..., 4:]], -1))
    turned = turned * torch.polar(torch.ones(1), places[:, None, None] * frequencies)
    torch.testing.assert_close(out, torch.cat([turned.real, turned.imag], -1), atol=1e-4, rtol=1e-4)
    assert torch.equal(rotary(x[:, :NUM_PLACES]), out[:, :NUM_PLACES])
    with StepTrace() as trace:
        rotary(x[:, :9])
    assert trace.cost.num_kernels == 7  # four products, two sums, one concatenation: no angles
