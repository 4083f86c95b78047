import pytest
import torch
from torch import nn

from medldm.diffusion.latent import FirstStage, PixelStage, channel_moments
from medldm.errors import InputError
from medldm.networks.layers import conv, conv_transpose
from medldm.networks.quantizer import VectorQuantizer


class TinyVQ(nn.Module):
    """The interface of VQAutoencoder, with the real quantiser."""

    latent_channels = 3

    def __init__(self, spatial_dims=2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.spatial_dims = spatial_dims
        self.downsampling = (2,) * spatial_dims
        self.encoder = conv(spatial_dims, 1, 3, kernel_size=2, stride=2)
        self.decoder = conv_transpose(spatial_dims, 3, 1, kernel_size=2, stride=2)
        self.quantizer = VectorQuantizer(16, 3, ema_decay=0.99, restart_threshold=1.0, init="normal")
        self.dropout = nn.Dropout(0.5)

    def encode(self, x):
        return self.dropout(self.encoder(x))

    def quantize(self, h):
        return self.quantizer(h)

    def decode(self, z, mask=None):
        x = self.decoder(z)
        return x if mask is None else x + mask


def images(spatial_dims=2, n=64):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 1, *(8,) * spatial_dims, generator=generator)
    return x * torch.linspace(0.5, 2, n).reshape((n,) + (1,) * (spatial_dims + 1)) + 1


def fitted(spatial_dims=2, **kwargs):
    stage = FirstStage(TinyVQ(spatial_dims), **kwargs)
    stage.fit(stage.encode_raw(part) for part in images(spatial_dims).split(10))
    return stage


@pytest.mark.parametrize("latent", ["prequant", "quant"])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_latents_have_mean_zero_and_deviation_one_after_fit(spatial_dims, latent):
    stage = fitted(spatial_dims, latent=latent)
    z = stage.encode(images(spatial_dims))
    mean, std = channel_moments([z])
    torch.testing.assert_close(mean, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(std, torch.ones(3, dtype=torch.float64), rtol=1e-5, atol=0)
    assert z.shape[2:] == stage.latent_shape((8,) * spatial_dims)
    assert stage.is_fitted


def test_streamed_moments_equal_those_of_the_whole():
    x = torch.randn(30, 3, 4, 5) + 100
    mean, std = channel_moments(x.split(7))
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)))
    torch.testing.assert_close(std, x.double().std((0, 2, 3), correction=0))


def test_codebook_range_maps_the_codes_to_the_unit_interval():
    stage = FirstStage(TinyVQ(), latent="quant", normalisation="codebook_range")
    assert not stage.is_fitted
    stage.fit([])
    codes = stage.autoencoder.quantizer.codebook
    z = stage.normalize(codes.t()[None, :, :, None])
    assert (z.min().item(), z.max().item()) == pytest.approx((-1, 1), abs=1e-6)


def test_no_normalisation_leaves_latents_alone():
    stage = FirstStage(TinyVQ(), normalisation="none")
    assert stage.is_fitted
    assert torch.equal(stage.encode(images()), stage.encode_raw(images()))


@pytest.mark.parametrize("latent", ["prequant", "quant"])
def test_roundtrip_and_cache_go_through_the_same_place(latent):
    stage = fitted(latent=latent)
    h = stage.encode_raw(images())
    raw = stage.autoencoder.quantize(h).z if latent == "quant" else h
    assert torch.equal(stage.normalize(h), stage.encode(images()))
    torch.testing.assert_close(stage.denormalize(stage.normalize(h)), raw, rtol=0, atol=1e-5)
    if latent == "prequant":  # encode and decode form the autoencoder's own forward
        expected = stage.autoencoder.decode(stage.autoencoder.quantize(h).z)
        torch.testing.assert_close(stage.decode(stage.encode(images())), expected, rtol=0, atol=1e-5)


def test_requantize_is_a_choice_and_masks_reach_the_decoder():
    snapped, raw = fitted(requantize=True), fitted(requantize=False)
    z = raw.encode(images())
    assert not torch.allclose(snapped.decode(z), raw.decode(z))
    torch.testing.assert_close(raw.decode(z), raw.autoencoder.decode(raw.encode_raw(images())))
    torch.testing.assert_close(raw.decode(z, torch.ones(64, 1, 8, 8)), raw.decode(z) + 1)


def test_training_mode_and_sampling_leave_the_codebook_and_dropout_alone():
    stage = fitted()
    model = nn.ModuleList([stage, nn.Linear(1, 1)]).train()
    assert model[1].training and not any(module.training for module in stage.modules())
    before = {key: value.clone() for key, value in stage.state_dict().items()}
    for _ in range(3):
        x = stage.decode(stage.encode(images()) + torch.randn(64, 3, 4, 4))
    assert not x.requires_grad and not any(p.requires_grad for p in stage.parameters())
    assert all(torch.equal(value, before[key]) for key, value in stage.state_dict().items())


def test_statistics_are_saved_with_the_stage():
    stage, other = fitted(), FirstStage(TinyVQ())
    other.load_state_dict(stage.state_dict())
    assert other.is_fitted and torch.equal(other.encode(images()), stage.encode(images()))


def test_a_constant_channel_is_not_amplified():
    stage = FirstStage(TinyVQ())
    stage.fit([torch.tensor([1.0, 2.0, 3.0]).reshape(1, 3, 1, 1).expand(4, 3, 2, 2)])
    assert stage.scale.tolist() == [1, 1, 1] and stage.shift.tolist() == [1, 2, 3]


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_pixel_stage_is_the_identity(spatial_dims):
    stage, x = PixelStage(1, spatial_dims=spatial_dims), images(spatial_dims)
    assert torch.equal(stage.decode(stage.encode(x)), x)
    assert torch.equal(stage.denormalize(stage.normalize(stage.encode_raw(x))), x)
    assert stage.latent_shape(x.shape[2:]) == tuple(x.shape[2:])
    assert (stage.latent_channels, stage.downsampling) == (1, (1,) * spatial_dims)


def test_mistakes_are_told_in_one_line():
    with pytest.raises(ValueError, match="^latent=odd"):
        FirstStage(TinyVQ(), latent="odd")
    with pytest.raises(InputError, match="crop or pad"):
        FirstStage(TinyVQ()).latent_shape((7, 8))
    with pytest.raises(InputError, match="training split"):
        FirstStage(TinyVQ()).fit([])
