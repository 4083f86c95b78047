"""Exact figures of the published networks."""

import pytest
import torch

from medldm.diffusion.condition import Condition
from medldm.networks.unet import UNet
from tests.helpers import compose_part, num_parameters


@pytest.mark.parametrize(("preset", "heads"), [("unet_cardiac_as_run", 16), ("unet_cardiac_published", 8)])
def test_report_unet_has_103_5_million_parameters(preset, heads):
    with torch.device("meta"):
        network = compose_part(f"network/{preset}")(2, in_channels=4 + 1, out_channels=4)
    assert num_parameters(network) == 103_525_380
    assert {m.num_heads for m in network.modules() if hasattr(m, "num_heads")} == {heads}


def test_report_unet_keeps_the_inputs_of_its_levels_as_skips():
    with torch.device("meta"):
        network = compose_part("network/unet_cardiac_as_run")(2, in_channels=5, out_channels=4)
    assert [level.units[0].res.conv1.in_channels for level in network.up] == [512 + 512, 384 + 384, 256 + 256]
    assert [level.resample.conv.in_channels for level in network.down] == [384, 512, 768]


@pytest.mark.parametrize(
    ("preset", "channels", "count"), [("vqvae_as_run", 4, 21_959_405), ("vqvae_published", 3, 21_954_780)]
)
def test_report_autoencoder_matches_its_figures(preset, channels, count):
    with torch.device("meta"):
        network = compose_part(f"network/{preset}")(spatial_dims=2, image_channels=1)
    codebook = network.quantizer.codebook
    assert codebook.shape == (16384, channels)
    assert network.downsampling == (8, 8)
    assert num_parameters(network) - codebook.numel() == count  # 21.95M, as its authors print it


def test_block_unet_reproduces_the_aldm_count():
    with torch.device("meta"):
        network = UNet(
            3,
            in_channels=12,
            out_channels=4,
            stem_channels=128,
            channels=[128, 128, 256],
            num_res_blocks=1,
            attention_levels=[1, 2],
            head_channels=32,
        )
    assert num_parameters(network) == 33_195_268


def test_autoencoder_accepts_the_printed_codebook_size():
    build = compose_part("network/vqvae_published")
    build.keywords["quantizer"].keywords["num_codes"] = 16834  # as printed; any integer is legal
    network = build(spatial_dims=2, image_channels=1)
    x_hat, quantized = network.eval()(torch.randn(1, 1, 32, 32))
    assert x_hat.shape == (1, 1, 32, 32)
    assert quantized.z.shape == (1, 3, 4, 4)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("skips", ["block", "level"])
def test_unet_takes_every_kind_of_condition(spatial_dims, skips):
    extra = {"mid_channels": 16, "up_channels": [16, 8]} if skips == "level" else {}
    network = UNet(
        spatial_dims,
        in_channels=3 + 2,
        out_channels=3,
        stem_channels=8,
        channels=[16, 24],
        skips=skips,
        num_res_blocks=1,
        num_heads=2,
        sinusoidal_channels=8,
        embedding_channels=16,
        spade_channels=4,
        context_channels=6,
        zero_init_last=False,
        **extra,
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)  # some start at zero
    grid = (8,) * spatial_dims
    z, t = torch.randn(2, 3, *grid), torch.tensor([0.0, 999.0])
    full = Condition(
        torch.randn(2, 2, *grid), torch.randn(2, 16), torch.randn(2, 4, *grid), torch.randn(2, 5, 6)
    )
    out = network(z, t, full)
    assert out.shape == z.shape
    hint = torch.randn(2, 1, *grid)
    assert torch.equal(network(z, t, full._replace(hint=hint)), out)  # a control branch alone reads it
    for field in ("concat", "embedding", "spade", "context"):
        other = full._replace(**{field: torch.randn_like(getattr(full, field))})
        assert not torch.allclose(network(z, t, other), out), field


@pytest.mark.parametrize("layout", ["res_up", "up_res", "strided"])
@pytest.mark.parametrize("strides", [[2, 2], [[1, 2, 2], 2]])
def test_autoencoder_layouts_in_3d_with_anisotropic_strides(layout, strides):
    from functools import partial

    from medldm.networks.autoencoder import VQAutoencoder
    from medldm.networks.quantizer import VectorQuantizer

    network = VQAutoencoder(
        3,
        quantizer=partial(VectorQuantizer, 8),
        latent_channels=3,
        stem_channels=4,
        channels=[8, 8],
        strides=strides,
        layout=layout,
        num_heads=2,
        decoder_map_channels=5,
        use_checkpoint=True,
    )
    x, onehot = torch.randn(2, 1, 4, 8, 8), torch.rand(2, 5, 4, 8, 8)
    x_hat, quantized = network(x, onehot)
    assert x_hat.shape == x.shape
    assert quantized.z.shape[2:] == tuple(
        s // f for s, f in zip(x.shape[2:], network.downsampling, strict=True)
    )
    x_hat.mean().backward()
    assert network.stem.weight.grad.abs().sum() > 0
