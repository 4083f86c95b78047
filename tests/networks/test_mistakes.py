"""A part names its own arguments; who sets them in a config is told the key."""

import pytest

from medldm.builders.keys import instantiate_parts
from medldm.errors import InputError
from medldm.losses import AdversarialLoss, PerceptualLoss
from medldm.networks.autoencoder import VQAutoencoder
from medldm.networks.codec import NoQuantizer
from medldm.networks.layers import Downsample
from medldm.networks.unet import UNet
from tests.training import LDM, PIXELS, VQVAE, build

UNET = {"in_channels": 1, "out_channels": 1, "stem_channels": 8, "channels": [8], "num_heads": 2}
VQ = {"quantizer": NoQuantizer, "latent_channels": 2, "stem_channels": 8, "channels": [8], "strides": [2]}


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: UNet(2, **UNET, skips="none"), "skips=none is none of block, level, output"),
        (lambda: UNet(2, **UNET, skips="level"), "up_channels=None: skips=level needs one width for each"),
        (lambda: UNet(2, **UNET, resample="conv5"), "resample=conv5 is none of conv4, conv3, conv3_end"),
        (lambda: UNet(2, **UNET | {"num_heads": 3}), "8 channels of attention do not split over 3 heads"),
        (lambda: UNet(2, **UNET | {"num_heads": None}), "attention needs num_heads or head_channels"),
        (lambda: UNet(2, **UNET, kernel_size=[1, 3, 3]), r"\(1, 3, 3\) has 3 entries for 2 spatial axes"),
        (lambda: VQAutoencoder(2, **VQ, layout="x"), "layout=x is none of res_up, up_res, strided"),
        (lambda: VQAutoencoder(2, **VQ, mid=["conv"]), "mid=conv is none of res, attn"),
        (lambda: VQAutoencoder(2, **VQ, image_range="x"), "image_range=x is none of signed, unit"),
        (lambda: VQAutoencoder(2, **VQ | {"strides": []}), "1 channels but 0 strides"),
        (lambda: Downsample(2, 1, 1, kind="x"), "kind=x is none of conv4, conv3, conv3_end"),
        (lambda: PerceptualLoss("vgg"), "network=vgg is none of lpips_vgg, lpips_alex, medicalnet_10"),
        (lambda: AdversarialLoss("wgan"), "kind=wgan is none of hinge, vanilla, lsgan, multiclass"),
    ],
)
def test_a_wrong_argument_is_named_with_its_choices(make, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        make()


@pytest.mark.parametrize("network", [UNet, VQAutoencoder])
def test_an_unknown_and_a_missing_argument_are_told_as_those_of_a_call(network):
    options = UNET if network is UNet else VQ
    said = f"{network.__name__} got an unexpected keyword argument 'depth'"
    with pytest.raises(TypeError, match=said):
        network(2, **options, depth=3)
    with pytest.raises(TypeError, match="missing 1 required keyword-only argument: 'stem_channels'"):
        network(2, **{name: value for name, value in options.items() if name != "stem_channels"})


BOUND = "experiment=medvdm/chestxray_conv"
AUTOENCODER, NETWORK = "model.autoencoder", "model.network"


@pytest.mark.parametrize(
    ("experiment", "override", "said"),
    [
        (VQVAE, f"{AUTOENCODER}.layout=x", f"{AUTOENCODER}.layout=x is none of res_up, up_res, strided"),
        (VQVAE, f"+{AUTOENCODER}.image_range=x", f"{AUTOENCODER}.image_range=x is none of signed, unit"),
        (VQVAE, f"{AUTOENCODER}.quantizer.init=x", f"{AUTOENCODER}: the codebook's init 'x' is none of"),
        (VQVAE, "model.adversarial.kind=wgan", "model.adversarial.kind=wgan is none of hinge"),
        (VQVAE, "model.discriminators.image.norm=x", "model.discriminators.image.norm=x is none of batch"),
        (LDM, f"{NETWORK}.skips=x", f"{NETWORK}.skips=x is none of block, level, output"),
        (LDM, f"{NETWORK}.up_channels=[16]", rf"{NETWORK}.up_channels=\[16\]: skips=level needs one width"),
        (
            BOUND,
            "model.objective.times=discrete",
            "model.objective.times=discrete needs a number of steps; set num_timesteps",
        ),
        (BOUND, "model/schedule=flow", "model.objective: the bound's prior needs a schedule whose path"),
        (LDM, "model.objective.min_snr_gamma=-1", "model.objective.min_snr_gamma=-1 must be positive"),
        (LDM, "model.conditioner.encoder=odd", "model.conditioner: encoder 'odd' is none of"),
        (LDM, "model.conditioner.drop_all_prob=2", r"model.conditioner.drop_all_prob=2 must lie in \[0, 1\]"),
        (
            LDM,
            "+model.conditioner.attributes={age: maybe}",
            "model.conditioner.attributes.age=maybe is none of true, false, auto",
        ),
    ],
)
def test_the_key_of_a_wrong_argument_is_told(experiment, override, said):
    with pytest.raises(InputError, match=f"^{said}"):
        build(experiment, *(PIXELS[:1] if experiment == LDM else ()), override)


def test_the_key_of_a_wrong_argument_of_a_loss_is_told():
    perceptual = {"_target_": "medldm.losses.PerceptualLoss", "network": "vgg"}
    with pytest.raises(InputError, match="^model.perceptual.network=vgg is none of lpips_vgg"):
        instantiate_parts({"kind": "autoencoder", "perceptual": perceptual}, skip=())
