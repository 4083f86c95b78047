"""Under bf16 a model hands out float32: an image has no steps of 1/256."""

import copy

import pytest
import torch
from torch import nn

from medldm.devices import CPU, GPU, inference_precision, mixed_precision
from medldm.diffusion.sampler import AncestralSampler, DDIMSampler, DPMSolverSampler
from medldm.diffusion.schedule import fixed_linear_schedule
from medldm.errors import InputError
from medldm.models.segmentation import SegmentationModule
from medldm.networks.codec import MLPCodec
from medldm.networks.convolution import Conv3d, ConvTranspose3d, conv, conv_transpose
from medldm.networks.tiling import TiledAutoencoder
from medldm.sampling import Request, predictor_of
from tests.training import FACTS, LDM, PIXELS, VQVAE, build, make_batches


def share_on_bf16(x: torch.Tensor) -> float:
    """The share of the values that bf16 holds exactly; of float32 noise it is one in 65,536."""
    return (x.bfloat16().float() == x).float().mean().item()


@pytest.fixture
def bf16():
    with torch.no_grad(), mixed_precision(torch.device("cpu"), "bf16-mixed"):
        yield


def test_images_and_latents_of_an_autoencoder(bf16):
    net = build(VQVAE).autoencoder.eval()
    x = torch.rand(2, 1, 32, 32) * 2 - 1
    h = net.encode(x)
    z = net.quantize(h).z
    for values in (h, net.decode(z), TiledAutoencoder(net, 8).decode(z), TiledAutoencoder(net, 8).encode(x)):
        assert values.dtype == torch.float32 and share_on_bf16(values) < 0.02


def test_training_keeps_the_mixed_precision_of_the_last_layer():
    net = build(VQVAE).autoencoder.train()
    with mixed_precision(torch.device("cpu"), "bf16-mixed"):
        assert net(torch.rand(2, 1, 32, 32))[0].dtype == torch.bfloat16


def test_images_of_vectors_and_of_a_regression(bf16):
    codec = MLPCodec(2, image_channels=1, image_size=(8, 8), encoder_channels=16, decoder_channels=16)
    assert share_on_bf16(codec.decode(torch.randn(4, 64))) < 0.02
    regression = build("experiment=aldm/brats_regression", facts=FACTS | {"spatial_dims": 3}).eval()
    assert share_on_bf16(regression(torch.rand(1, 1, 16, 16, 16))) < 0.02


@pytest.mark.parametrize("sampler", [AncestralSampler, DDIMSampler, DPMSolverSampler])
def test_the_last_step_of_a_sampler(sampler, bf16):
    layer, dtypes = nn.Conv2d(1, 1, 3, padding=1), []

    def denoise(z, t):
        out = layer(z)
        dtypes.append(out.dtype)
        return out

    z = sampler(num_steps=3)(denoise, fixed_linear_schedule(-10, 5), torch.randn(1, 1, 8, 8))
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float32] and share_on_bf16(z) < 0.05


@pytest.mark.parametrize("conditioner", ["strided_cnn", "spade"])
def test_samples_of_a_diffusion_under_either_precision(conditioner):
    """Conditions computed in bf16 meet a last step in float32."""
    network = ("model/network=unet_block",) if conditioner == "spade" else PIXELS[1:]
    module = build(LDM, PIXELS[0], *network, f"model/conditioner={conditioner}", "model.sampler.num_steps=2")
    module.eval()
    for parameter in module.network.parameters():
        parameter.data = parameter.data + 0.02 * torch.randn(parameter.shape)  # zero-initialised layers too
    predictor = predictor_of(module)
    (batch,) = make_batches(1, 2)
    batch["case_id"] = ["a", "b"]
    exact, mixed = (
        predictor(batch, (16, 16), Request(precision=precision)) for precision in ("32-true", "bf16-mixed")
    )
    assert not torch.equal(exact, mixed)
    assert share_on_bf16(mixed[mixed.abs() < 1]) < 0.05
    assert torch.equal(exact, predictor(batch, (16, 16), Request()))  # auto, on a CPU


def test_the_precision_of_inference():
    assert inference_precision("auto", torch.device("cuda"), GPU) == "bf16-mixed"
    assert inference_precision("auto", torch.device("cpu"), CPU) == "32-true"
    assert inference_precision("bf16-mixed", torch.device("cpu"), CPU) == "bf16-mixed"
    with pytest.raises(InputError, match="precision=fp8 is none of auto, 32-true, bf16-mixed"):
        inference_precision("fp8", torch.device("cpu"), CPU)


@pytest.mark.parametrize("make", [conv, conv_transpose])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((2, 2, 2), {"padding": 1}),
        ((1, 4, 4), {"padding": 1}),
        ((1, 1), {"stride": 2, "padding": 1}),
        ((2, 1), {"stride": 2, "padding": 1}),
    ],
)
def test_gradients_of_bf16_images_of_one_pixel_and_volumes_of_two_slices_are_of_the_rounded_operands(
    make, size, options
):
    """oneDNN of torch 2.15 reads what freed memory holds for this gradient: here NaN."""
    torch.manual_seed(0)
    layer, x = make(len(size), 16, 16, 3, **options), torch.randn(2, 16, *size)
    exact = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in exact.parameters():
            parameter.copy_(parameter.bfloat16())
    wanted = exact(x.bfloat16().float())
    passed = torch.randn(wanted.shape).bfloat16()
    wanted.backward(passed.float())
    for _ in range(10):
        layer.zero_grad()
        with mixed_precision(torch.device("cpu"), "bf16-mixed"):
            y = layer(x)
        for count in (2**7, 2**10, 2**12, 2304, 4608, 6912, 13824, 2**16):
            torch.full((count,), torch.nan)
        y.backward(passed)
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(layer.weight.grad, exact.weight.grad, rtol=2**-8, atol=1e-6)


def test_networks_of_other_libraries_convolve_volumes_as_medldm_does():
    from monai.networks.nets import UNet

    network = UNet(3, 1, 2, channels=[4, 8, 8], strides=[2, 2], num_res_units=1).eval()
    x = torch.randn(1, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    keys, before = list(network.state_dict()), network(x)
    adopted = SegmentationModule(network, num_classes=2, optimizer=torch.optim.SGD).network
    kinds = {type(layer) for layer in adopted.modules()}
    assert {Conv3d, ConvTranspose3d} <= kinds and not {nn.Conv3d, nn.ConvTranspose3d} & kinds
    assert list(adopted.state_dict()) == keys and torch.equal(adopted(x), before)
