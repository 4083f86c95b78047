"""Gradients that are not finite: the update is left out and counted, and training stops with a diagnosis."""

import logging

import pytest
import torch

from medldm.callbacks import SkipNonFinite
from medldm.errors import InputError
from tests.training import FACTS, LDM, PIXELS, PLAIN_SGD, VQVAE, build, fit, make_batches

GAN = ("model.adversarial.start=0",)


def weights_of(module):
    return {name: value.detach().clone() for name, value in module.named_parameters()}


def spoiled(batches, *places):
    for place in places:
        batches[place]["image"] = torch.full_like(batches[place]["image"], torch.nan)
    return batches


@pytest.mark.parametrize("overrides", [(LDM, *PIXELS), (VQVAE, *GAN)], ids=["diffusion", "autoencoder"])
def test_a_training_without_such_gradients_keeps_its_bits(overrides):
    plain, guarded = build(*overrides, facts=FACTS), build(*overrides, facts=FACTS)
    fit(plain, make_batches(3, 2))
    fit(guarded, make_batches(3, 2), SkipNonFinite())
    ours, theirs = plain.state_dict(), guarded.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_spoiled_batch_changes_no_weight_and_no_moment(caplog):
    once, twice = build(LDM, *PIXELS, facts=FACTS), build(LDM, *PIXELS, facts=FACTS)
    fit(once, make_batches(1, 2), SkipNonFinite())
    with caplog.at_level(logging.WARNING):
        fit(twice, spoiled(make_batches(2, 2), 1), SkipNonFinite(), log_every_n_steps=1)
    assert "1 updates up to step 2 had gradients that are not finite and were left out" in caplog.text
    ours, theirs = weights_of(once), weights_of(twice)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for a, b in zip(
        once.trainer.optimizers[0].state.values(), twice.trainer.optimizers[0].state.values(), strict=True
    ):
        assert all(torch.equal(a[key], b[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


def test_an_optimiser_that_is_not_fused_gets_zeros():
    once, twice = build(LDM, *PIXELS, *PLAIN_SGD, facts=FACTS), build(LDM, *PIXELS, *PLAIN_SGD, facts=FACTS)
    fit(once, make_batches(1, 2), SkipNonFinite())
    fit(twice, spoiled(make_batches(2, 2), 1), SkipNonFinite())
    ours, theirs = weights_of(once), weights_of(twice)
    assert all(torch.allclose(ours[name], theirs[name], rtol=1e-3) for name in ours)
    assert all(value.isfinite().all() for value in theirs.values())


@pytest.mark.parametrize(
    ("overrides", "layer"),
    [
        (
            (LDM, *PIXELS),
            "120 of 120 gradients are not finite, the first of conditioner.encoder.layers.0.weight",
        ),
        (
            (VQVAE, *GAN),
            "128 of 130 gradients are not finite, the first of discriminators.0.stages.0.0.weight",
        ),
    ],
    ids=["diffusion", "autoencoder"],
)
def test_after_some_in_a_row_training_stops_and_says_where(overrides, layer):
    module = build(*overrides, facts=FACTS)
    before = weights_of(module)
    with pytest.raises(InputError) as caught:
        fit(module, spoiled(make_batches(4, 2), 0, 1, 2, 3), SkipNonFinite(3), log_every_n_steps=1)
    line = str(caught.value)
    assert "training diverged before step 3: 3 updates in a row" in line and "train/loss" in line
    assert layer in line, line
    assert "\n" not in line
    assert all(torch.equal(before[name], value) for name, value in weights_of(module).items())
