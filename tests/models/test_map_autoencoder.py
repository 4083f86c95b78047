"""The autoencoder of semantic maps, and diffusion under its latents."""

from functools import partial

import pytest
import torch

from medldm.build import build_module
from medldm.errors import InputError
from medldm.models.autoencoder import AutoencoderModule
from tests.helpers import compose_part

FACTS = {"spatial_dims": 3, "image_channels": 1, "num_classes": 3}


def module(**options):
    build = compose_part("network/vqgan3d")
    sizes = {"stem_channels": 8, "channels": [8, 8], "norm_groups": 4}
    autoencoder = build(3, image_channels=options.pop("channels", 3), **sizes)
    return AutoencoderModule(autoencoder, optimizer=partial(torch.optim.SGD, lr=0.1), **options)


def test_a_map_is_reconstructed_from_its_one_hot_planes():
    model = module(reconstructs="mask", pixel_loss="cross_entropy")
    mask = torch.randint(0, 3, (2, 1, 8, 8, 8))
    x = model.target({"mask": mask})
    assert x.shape == (2, 3, 8, 8, 8) and torch.equal(x.argmax(1, keepdim=True), mask)
    certain = x * 50
    assert float(model.pixel_loss(certain, x)) < 1e-6
    torch.testing.assert_close(model.pixel_loss(torch.zeros_like(x), x), torch.tensor(3.0).log())
    assert model.score(certain, x)["dice"].eq(1).all()
    assert model.score(certain.roll(1, 1), x)["dice"].eq(0).all()
    assert model.validation_metrics[-1] == "val/dice"


@pytest.mark.parametrize(
    "options", [{"reconstructs": "mask", "perceptual_weight": 1.0}, {"pixel_loss": "cross_entropy"}]
)
def test_combinations_without_a_meaning_are_refused(options):
    with pytest.raises(ValueError, match="reconstructs"):
        module(**options)


def test_a_dataset_without_masks_has_no_maps_to_encode():
    model = {"kind": "autoencoder", "reconstructs": "mask"}
    with pytest.raises(InputError, match="reconstructs=mask: the dataset has no masks"):
        build_module(model, FACTS | {"num_classes": None})


def test_half_precision_maps_to_finite_codes():
    model = module(channels=1)
    h = torch.randn(1, 8, 4, 4, 4).half() * 300
    quantized = model.autoencoder.train().quantize(h)
    assert quantized.z.isfinite().all() and quantized.loss.isfinite()
    assert model.autoencoder.quantizer.codebook.isfinite().all()
