"""Translation between latents: what is trained, what is frozen, and which class a fake has."""

import pytest
import torch
import torch.nn.functional as F

from medldm.build import build_module
from medldm.errors import InputError
from medldm.losses import AdversarialLoss
from tests.training import PLAIN_SGD, fit
from tests.translation import (
    FACTS_3D,
    JOINT,
    LDM,
    MSSPADE,
    VQGAN,
    K,
    build_stage,
    describe_stage,
    make_pairs,
    model_config,
)

NO_GAN = ("model.adversarial=null", "model.discriminators=null")
IMAGE = ("model/translation_loss@model.objective=image", "model.adversarial.kind=hinge")


@pytest.fixture(scope="module")
def autoencoder():
    return describe_stage(VQGAN)


@pytest.fixture(scope="module")
def translator(autoencoder):
    return describe_stage(MSSPADE, first_stage=autoencoder)


def build(*overrides, first_stage):
    module = build_stage(MSSPADE, *overrides, first_stage=first_stage)
    module.first_stage.is_fitted.fill_(True)
    if module.adversarial is not None:
        module.adversarial.start = 0
    return module


def state_of(module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


def changed(before: dict, module) -> set[str]:
    return {name for name, value in module.state_dict().items() if not torch.equal(value, before[name])}


def test_the_fake_class_is_the_one_after_the_modalities():
    loss = AdversarialLoss("multiclass")
    logits = torch.full((2, K + 1, 1, 1, 1), 0.0)
    fake = logits.clone()
    fake[:, K] = 50.0  # certain that they are fakes
    real = logits.clone()
    real[0, 0], real[1, 2] = 50.0, 50.0
    label = torch.tensor([0, 2])
    assert loss.discriminator_loss(real, fake, label).item() == pytest.approx(0, abs=1e-6)
    for k in range(K):
        fake_k = logits.clone()
        fake_k[:, k] = 50.0
        assert loss.discriminator_loss(real, fake_k, label).item() == pytest.approx(25)
    assert loss.generator_loss(fake, label).item() == pytest.approx(50)
    assert loss.generator_loss(real, label).item() == pytest.approx(0, abs=1e-6)


def test_logits_are_averaged_over_space_before_the_softmax():
    logits = torch.randn(2, K + 1, 2, 3, 2)
    label = torch.tensor([1, 0])
    loss = AdversarialLoss("multiclass").generator_loss(logits, label)
    torch.testing.assert_close(loss, F.cross_entropy(logits.mean((2, 3, 4)), label))


def test_the_latent_objective_is_l1_and_cycle(autoencoder):
    module = build(*NO_GAN, "model.objective.cycle_weight=0.5", first_stage=autoencoder).eval()
    batch = make_pairs(1)[0]
    found = module.objective(module, batch, None)
    stage = module.first_stage
    z_source, z_target = stage.encode(batch["source"]), stage.encode(batch["image"])
    z_hat = module.translator(z_source, batch["label"])
    back = module.translator(z_hat, batch["source_label"])
    expected = (z_hat - z_target).abs().mean() + 0.5 * (back - z_source).abs().mean()
    torch.testing.assert_close(found.total, expected)
    assert found.losses.keys() == {"latent", "cycle"} and found.total.requires_grad


def test_the_image_objective_has_the_papers_terms(autoencoder):
    weights = [f"model.objective.{k}={v}" for k, v in (
        ("pixel_weight", 2), ("identity_weight", 3), ("quantizer_weight", 5), ("cycle_weight", 7),
        ("perceptual_weight", 11))]  # fmt: skip
    module = build(*IMAGE, *weights, "model.first_stage.normalisation=none", first_stage=autoencoder).eval()
    module.draw_slices = lambda x, i: (0, torch.zeros(len(x), dtype=torch.long))
    batch = make_pairs(1)[0]
    found = module.objective(module, batch, lambda x: module.draw_slices(x, 0))
    network, x = module.autoencoder, batch["image"]
    q_source, q = (network.quantize(network.encode(v)) for v in (batch["source"], x))
    z_hat = module.translator(q_source.z, batch["label"])
    x_hat = network.decode(z_hat)
    perceptual = module.objective.perceptual(x_hat[:, :, 0], x[:, :, 0])
    terms = (
        2 * (x_hat - x).abs().mean(),
        3 * (network.decode(q.z) - x).abs().mean(),
        5 * (q_source.loss + q.loss) / 2,
        7 * (module.translator(z_hat, batch["source_label"]) - q_source.z).abs().mean(),
        11 * perceptual,
    )
    torch.testing.assert_close(found.total, sum(terms))
    step = module.generator_step(batch, 0, factor=1.0)
    assert step.losses.keys() == {
        "loss", "pixel", "identity", "quantizer", "cycle", "perceptual", "adversarial"
    }  # fmt: skip
    assert torch.equal(step.real, x)


def test_latent_training_leaves_the_autoencoder_as_it_was(autoencoder):
    module = build(first_stage=autoencoder)
    before = state_of(module)
    trainer = fit(module, make_pairs(3))
    moved = changed(before, module)
    assert not [name for name in moved if name.startswith("first_stage.")]
    assert any(name.startswith("translator.") for name in moved)
    assert any(name.startswith("discriminators.") for name in moved)
    steps = [{int(s["step"]) for s in optimizer.state.values()} for optimizer in trainer.optimizers]
    assert trainer.global_step == 3 and steps == [{3}, {3}]
    assert not any(p.requires_grad for p in module.autoencoder.parameters())


def test_image_training_trains_encoder_decoder_and_codebook(autoencoder):
    module = build(*IMAGE, first_stage=autoencoder)
    assert module.ema_modules is None
    before = state_of(module)
    fit(module, make_pairs(2))
    moved = changed(before, module)
    for part in ("stem.weight", "head.weight", "quantizer.codebook"):
        assert f"first_stage.autoencoder.{part}" in moved
    assert not module.eval().autoencoder.training


@pytest.mark.parametrize("overrides", [(), IMAGE], ids=["latent", "image"])
def test_neither_backward_leaves_gradients_on_the_other_side(autoencoder, overrides):
    module = build(*overrides, first_stage=autoencoder)
    seen = []

    def grads(side):
        return [None if p.grad is None else p.grad.clone() for p in side.parameters()]

    def backward(loss):
        sides = (torch.nn.ModuleList(module.generator), module.discriminators)
        before = [grads(side) for side in sides]
        loss.backward()
        after = [grads(side) for side in sides]
        seen.append([any(
            (x is None) != (y is None) or (x is not None and not torch.equal(x, y))
            for x, y in zip(a, b, strict=True)) for a, b in zip(before, after, strict=True)])  # fmt: skip

    module.manual_backward = backward
    module.accumulate_grad_batches = 2
    fit(module, make_pairs(2))
    assert seen == [[True, False], [False, True]] * 2


def test_accumulation_equals_one_larger_batch(autoencoder):
    modules = [build(*NO_GAN, *PLAIN_SGD, first_stage=autoencoder) for _ in range(2)]
    modules[1].accumulate_grad_batches = 2
    batch = make_pairs(1, size=4)[0]
    halves = [{k: v[2 * i : 2 * i + 2] for k, v in batch.items()} for i in range(2)]
    before = state_of(modules[0])
    fit(modules[0], [batch])
    fit(modules[1], halves)
    assert changed(before, modules[0])
    for (name, a), b in zip(modules[0].named_parameters(), modules[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4, msg=name)


def test_image_space_training_does_not_decode_requantised_latents(autoencoder):
    with pytest.raises(ValueError, match="set it to false"):
        build(*IMAGE, "model.first_stage.requantize=true", first_stage=autoencoder)


def test_a_translators_checkpoint_starts_image_space_training(translator):
    module = build_stage(JOINT, first_stage=translator)
    assert module.first_stage.translator is None
    assert module.objective.trains_autoencoder and module.first_stage.latent == "quant"
    with pytest.raises(InputError, match="other sizes than model.translator"):
        build_stage(JOINT, "model.translator.norm_on_shortcut=true", first_stage=translator)


def test_diffusion_takes_autoencoder_and_translator_from_one_checkpoint(translator):
    module = build_stage(LDM, first_stage=translator)
    stage = module.first_stage
    assert stage.translator is not None and not any(p.requires_grad for p in stage.parameters())
    assert not [name for name in dict(module.ema_modules.named_parameters()) if "translator" in name]
    module.train()
    assert not stage.translator.training and not stage.autoencoder.training
    batch = make_pairs(1)[0]
    images = module.sample(batch, batch["case_id"], (4, 4, 4))
    assert images.shape == batch["image"].shape


def test_an_autoencoder_is_no_translator(autoencoder):
    with pytest.raises(InputError, match="holds no translator"):
        build_stage(LDM, "model/first_stage=vq_scaled", first_stage=autoencoder)


def test_other_modalities_than_the_translators_are_named(translator):
    facts = FACTS_3D | {"label_values": ["t1", "t2", "flair"]}
    with pytest.raises(InputError, match=r"translates between \['t1', 't2', 'pd'\], the data has"):
        build_module(model_config(LDM), facts, translator)


def test_data_without_modalities_are_named(autoencoder):
    with pytest.raises(InputError, match="at least two modalities"):
        build_module(model_config(MSSPADE), FACTS_3D | {"num_labels": 0}, autoencoder)


def test_translations_do_not_depend_on_their_batch(autoencoder):
    module = build(first_stage=autoencoder).eval()
    batch = make_pairs(1, size=3)[0] | {"label": torch.tensor([2, 0, 1])}
    together = module.translated(batch)[1]
    for i in range(3):
        one = {k: v[i : i + 1] for k, v in batch.items()}
        torch.testing.assert_close(together[i : i + 1], module.translated(one)[1], atol=1e-4, rtol=1e-4)
