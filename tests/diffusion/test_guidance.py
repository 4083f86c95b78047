"""Guidance needs a condition, and a null that training has seen."""

import pytest
import torch
from tests.helpers import stated

from medldm.diffusion.condition import check_drop
from medldm.diffusion.conditioner import NullConditioner, SpatialConditioner
from medldm.diffusion.objective import autoguided
from medldm.diffusion.sampler import AncestralSampler, DDIMSampler, check_guidance, override_sampler
from medldm.diffusion.translation import TranslationConditioner
from medldm.errors import InputError, told_of


def spatial(**probs):
    attributes = (
        {"use_view": True, "known": stated(num_views=2), "embedding_dim": 8}
        if probs.pop("view", False)
        else {}
    )
    return SpatialConditioner(4, downsampling=(8, 8), **probs, **attributes)


def translation(prob):
    return TranslationConditioner(latent_channels=2, num_labels=3, embedding_dim=8, drop_all_prob=prob)


@pytest.mark.parametrize(
    ("conditioner", "is_trained"),
    [
        (spatial(drop_all_prob=0.1), True),
        (spatial(drop_all_prob=0.1, view=True), True),
        (spatial(drop_edges_prob=0.1, drop_mask_prob=0.1), True),  # both at once, now and then
        (spatial(drop_edges_prob=0.1, drop_mask_prob=0.1, view=True), False),  # but never the view
        (spatial(drop_mask_prob=0.1), False),
        (spatial(), False),
        (translation(0.1), True),
        (translation(0.0), False),
    ],
)
def test_guidance_takes_a_null_that_training_drops_to(conditioner, is_trained):
    drops = conditioner.sample_drop(4000, torch.Generator().manual_seed(0))
    assert bool(drops.all(1).any()) == is_trained == conditioner.trains_null
    assert tuple(n for n, d in zip(conditioner.groups, drops.any(0), strict=True) if d) == (
        conditioner.dropped_groups
    )
    check_guidance(DDIMSampler(num_steps=2), conditioner)
    check_guidance(DDIMSampler(num_steps=2, guidance_scale=2, untrained_null=True), conditioner)
    for scale in (0.0, 2.0):
        sampler = DDIMSampler(num_steps=2, guidance_scale=scale)
        if is_trained:
            check_guidance(sampler, conditioner)
        else:
            with pytest.raises(ValueError, match=f"guidance_scale={scale:g}: training never dropped"):
                check_guidance(sampler, conditioner)


def test_guidance_needs_something_to_guide_by():
    sampler = AncestralSampler(num_steps=2, guidance_scale=3)
    with pytest.raises(ValueError, match="guidance_scale=3: the model has no condition"):
        check_guidance(sampler, NullConditioner())
    conditioner = spatial(drop_all_prob=0.1)
    check_guidance(sampler, conditioner, ("edges",))
    with pytest.raises(ValueError, match="drop leaves no condition"):
        check_guidance(sampler, conditioner, ("mask", "edges"))


def test_only_what_training_withheld_can_be_withheld():
    check_drop(spatial(drop_all_prob=0.1), ("edges", "mask"))
    check_drop(spatial(drop_mask_prob=0.1), ("mask",))
    with pytest.raises(InputError, match=r"drop=\[edges\]: training never withheld it"):
        check_drop(spatial(drop_mask_prob=0.1), ("mask", "edges"))
    with pytest.raises(InputError, match="no condition text"):
        check_drop(spatial(drop_all_prob=0.1), ("text",))


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({"guidance_rescale": 0.7}, "guidance_rescale"),
        ({"guidance_rescale": 0.7, "guidance_scale": 0.0}, "guidance_rescale"),
        ({"guidance_rescale": 1.7, "guidance_scale": 2.0}, "guidance_rescale"),
        ({"clamp": 0.0}, "clamp"),
        ({"clamp": 1.0, "clamp_percentile": 1.5}, "clamp_percentile"),
    ],
)
def test_a_sampler_setting_without_effect_or_meaning_is_refused(given, key):
    with pytest.raises(InputError, match=f"sampler.*{key}"), told_of("sampler"):
        override_sampler(DDIMSampler(num_steps=2), {"kind": None} | given)


@pytest.mark.parametrize("scale", [0.0, 1.5, 3.0])
def test_autoguidance_leads_away_from_the_guide(scale):
    """Affine denoisers of condition and z_t: guide + scale (model - guide), by hand."""
    denoise = autoguided(
        lambda condition: lambda z, t: 2 * z + condition,
        lambda condition: lambda z, t: z - condition,
        torch.tensor(1.0),
        torch.tensor(5.0),
        scale=scale,
    )
    z = torch.tensor([[1.0, 2.0]])
    expected = (z - 5) + scale * ((2 * z + 1) - (z - 5))
    torch.testing.assert_close(denoise(z, torch.ones(1)), expected)


def test_a_guide_takes_the_place_of_the_null_and_needs_a_scale():
    conditioner = spatial()  # its null was never trained
    check_guidance(DDIMSampler(num_steps=2, guidance_scale=2), conditioner, has_guide=True)
    with pytest.raises(ValueError, match="guidance_scale=1: the guide has no effect"):
        check_guidance(DDIMSampler(num_steps=2), conditioner, has_guide=True)
