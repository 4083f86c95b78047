"""Autoguidance by another checkpoint."""

import pytest
import torch

from medldm.build import load_module
from medldm.commands import sample
from medldm.diffusion.sampler import DDIMSampler
from medldm.diffusion.windows import Windows
from medldm.errors import InputError
from tests.helpers import compose_config
from tests.training import make_batches


@pytest.fixture
def pair(diffusion):
    """The average and, as its guide, the weights of the last update."""
    return load_module(diffusion), load_module(diffusion, weights="raw")


def drawn(module, scale, windows=None):
    (batch,) = make_batches(1, 2, 64)
    if windows is not None:
        batch = {key: torch.cat([x, x.flip(-1)], -1) if x.ndim > 1 else x for key, x in batch.items()}
    sampler = DDIMSampler(num_steps=2, guidance_scale=scale)
    shape = module.latent_shape(tuple(batch["image"].shape[2:]))
    return module.sample(batch, ["a", "b"], shape, sampler=sampler, windows=windows)


def test_a_model_that_guides_itself_changes_nothing(pair, diffusion):
    module, _ = pair
    alone = drawn(module, 1.0)
    module.guide_by(load_module(diffusion))
    torch.testing.assert_close(drawn(module, 3.0), alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("windows", [None, Windows((None, 8))])
def test_guidance_of_scale_0_is_the_guide_and_beyond_1_leads_away_from_it(pair, windows):
    module, guide = pair
    for parameter in guide.network.parameters():
        parameter.data += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    keys = module.state_dict().keys()
    strong, weak = drawn(module, 1.0, windows), drawn(guide, 1.0, windows)
    module.guide_by(guide)
    assert module.state_dict().keys() == keys  # a guide is no part of what is saved
    torch.testing.assert_close(drawn(module, 0.0, windows), weak, rtol=0, atol=1e-5)
    assert not torch.equal(drawn(module, 2.0, windows), strong)


def test_a_guide_of_other_latents_is_refused(pair, first_stage):
    module, guide = pair
    with pytest.raises(ValueError, match="no latent diffusion model"):
        module.guide_by(load_module(first_stage))
    guide.first_stage.scale.mul_(2)
    with pytest.raises(ValueError, match="scaled otherwise"):
        module.guide_by(guide)
    guide.first_stage.scale.div_(2)
    guide.description = guide.description | {"model": guide.description["model"] | {"schedule": {}}}
    with pytest.raises(ValueError, match="noised by another schedule"):
        module.guide_by(guide)


def test_the_command_takes_a_guide_and_says_which(prepared, diffusion, tmp_path):
    settings = (f"checkpoint={diffusion}", f"data.root={prepared}", "split=val", "limit=1", "max_slices=1")
    options = ("sampler.num_steps=1", "device=cpu", "png=false", f"sampler.guide={diffusion}")
    with pytest.raises(InputError, match="sampler.guidance_scale=1: the guide has no effect"):
        sample.task(compose_config("sample", *settings, *options, f"output={tmp_path / 'none'}"))
    sample.task(
        compose_config("sample", *settings, *options, f"output={tmp_path}", "sampler.guidance_scale=2")
    )
    about = (tmp_path / "provenance.json").read_text()
    assert f'"guide": "{load_module(diffusion).checkpoint_sha256}"' in about
