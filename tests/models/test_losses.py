import math

import pytest
import torch
from torch import nn

from medldm import losses
from medldm.losses import AdversarialLoss, PerceptualLoss, adaptive_weight, feature_matching, random_slices
from medldm.models.adversarial import AdversarialModule
from medldm.networks import lpips
from medldm.networks.discriminator import PatchDiscriminator
from tests.helpers import compose_config

REAL, FAKE = torch.tensor([2.0, 0.0]), torch.tensor([-2.0, 0.5])


@pytest.mark.parametrize(
    ("kind", "discriminator", "generator"),
    [
        ("hinge", 0.5 * (0.5 + 0.75), 0.75),  # relu(1 - [2, 0]) = [0, 1], relu(1 + [-2, 0.5]) = [0, 1.5]
        (
            "vanilla",
            0.25 * sum(math.log1p(math.exp(v)) for v in (-2.0, 0.0, -2.0, 0.5)),
            0.75,
        ),
        ("lsgan", 0.5 * ((1 + 1) / 2 + (4 + 0.25) / 2), (9 + 0.25) / 2),
    ],
)
def test_adversarial_losses_have_their_closed_forms(kind, discriminator, generator):
    loss = AdversarialLoss(kind)
    torch.testing.assert_close(loss.discriminator(REAL, FAKE), torch.tensor(discriminator))
    torch.testing.assert_close(loss.generator(FAKE), torch.tensor(generator))


def test_a_discriminator_of_classes_leaves_unknown_real_samples_out():
    loss, generator = AdversarialLoss("multiclass"), torch.Generator().manual_seed(0)
    real, fake = (torch.randn(4, 4, 2, 2, generator=generator) for _ in range(2))
    label, is_known = torch.tensor([0, -1, 2, -1]), torch.tensor([True, False, True, False])
    known = loss.generator_loss(fake[is_known], label[is_known])
    assert torch.equal(loss.generator_loss(fake, label), known)
    assert torch.equal(known, nn.functional.cross_entropy(fake[is_known].mean((2, 3)), label[is_known]))
    made = nn.functional.cross_entropy(fake.mean((2, 3)), torch.full((4,), 3))  # all of them are fakes
    told = nn.functional.cross_entropy(real[is_known].mean((2, 3)), label[is_known])
    torch.testing.assert_close(loss.discriminator_loss(real, fake, label), 0.5 * (told + made))
    fake.requires_grad_()
    loss.generator_loss(fake, torch.full((4,), -1)).backward()
    assert not fake.grad.any()


def test_a_discriminator_that_cannot_tell_pays_ln2():
    zero = torch.zeros(3)
    assert AdversarialLoss("vanilla").discriminator(zero, zero).item() == pytest.approx(math.log(2))


def test_an_unknown_adversarial_loss_is_named():
    with pytest.raises(ValueError, match="wgan.*hinge, vanilla, lsgan"):
        AdversarialLoss("wgan")


def test_the_discriminator_counts_from_start_and_ramps():
    loss = AdversarialLoss(start=10, ramp=4)
    assert [loss.factor(n) for n in (0, 9, 10, 11, 13, 14, 99)] == [0, 0, 0.25, 0.5, 1, 1, 1]
    assert [AdversarialLoss(start=10).factor(n) for n in (9, 10)] == [0, 1]


def test_feature_matching_leaves_the_logits_out_and_the_real_side_alone():
    real = [torch.zeros(2, requires_grad=True), torch.zeros(1), torch.zeros(1)]
    fake = [torch.full((2,), 3.0, requires_grad=True), torch.ones(1), torch.full((1,), 1e6)]
    loss = feature_matching(real, fake)
    assert loss.item() == 4  # 3 + 1: the published loss sums the maps
    loss.backward()
    assert real[0].grad is None and fake[0].grad is not None


@pytest.mark.parametrize(
    ("experiment", "mean_weight"),
    [("folder_vqgan", 4.0), ("phantom_vqgan", 0.5), ("autopet_vqgan_published", 16.0)],
)
def test_presets_weigh_feature_matching_as_before_and_the_published_one_as_published(experiment, mean_weight):
    """Weights are in units of a mean over maps. The presets had a sum of them before; the published weight is
    4 times the sum of 4 maps.
    """
    model = compose_config("train", f"experiment=medlsdm/{experiment}").model
    counts = {len(part.channels) for part in (model.discriminators.slice, model.discriminators.volume)}
    assert model.adversarial.feature_matching_weight * counts.pop() == pytest.approx(mean_weight, rel=1e-6)
    assert not counts


class Critic(nn.Module):
    """Three maps and a logit that are multiples of the image."""

    spatial_dims = 2

    def __init__(self, scale, weight) -> None:
        super().__init__()
        self.scale, self.weight = scale, weight

    def forward(self, x):
        return [self.scale * k * x for k in (1, 2, 3)] + [self.scale * x]


@pytest.mark.parametrize(("kind", "smallest"), [("lpips_vgg", 16), ("lpips_alex", 31)])
def test_the_smallest_image_of_a_perceptual_network(monkeypatch, tmp_path, kind, smallest):
    monkeypatch.setattr(lpips, "find_weights", lambda *_: lpips.FoundWeights(tmp_path, "0", None))
    monkeypatch.setattr(lpips.LPIPS, "load_backbone", lambda self, found: None)
    loss = PerceptualLoss(kind)
    assert loss.smallest_size == smallest
    image = torch.zeros(1, 1, smallest, smallest)
    assert loss(image, image).item() == 0
    with pytest.raises(RuntimeError, match="too small"):
        loss(image[..., 1:], image[..., 1:])


def test_the_axes_that_a_discriminator_of_slices_needs():
    """Slices along an axis do not show its length; those along several show every axis."""

    class Stage(AdversarialModule):
        size_factors = (2, 2, 2)

    flat = PatchDiscriminator(2, channels=[2], strides=[2], norm="none")  # 4 at least
    solid = PatchDiscriminator(3, channels=[2, 2], strides=[2, 2], norm="none")  # 8 at least

    def needed(*discriminators, slice_axes=(0,)):
        adversarial = AdversarialLoss()
        return Stage(
            optimizer=None, discriminators=discriminators, adversarial=adversarial, slice_axes=slice_axes
        ).smallest_size

    assert (flat.smallest_size, solid.smallest_size) == (4, 8)
    assert needed(flat) == (1, 4, 4)
    assert needed(flat, slice_axes=(0, 1, 2)) == (4, 4, 4)
    assert needed(flat, solid) == (8, 8, 8)


def test_each_discriminator_has_a_weight_of_its_own_and_features_count_apart():
    adversarial = AdversarialLoss("hinge", weight=0.5, feature_matching_weight=2.0)
    critics = [Critic(1.0, 1.0), Critic(10.0, 0.25)]
    module = AdversarialModule(optimizer=None, discriminators=critics, adversarial=adversarial)
    x, x_hat = torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.1)
    losses = module.adversarial_losses(x, x_hat, (0, torch.zeros(1)))
    assert losses["adversarial"].item() == pytest.approx(-(1.0 * 0.1 + 0.25 * 1.0))
    assert losses["feature_matching"].item() == pytest.approx((1 + 2 + 3) * (0.1 + 1.0))
    total = module.adversarial_term({}, x_hat.sum(), x, x_hat, (0, torch.zeros(1)), factor=0.5, last_layer=x)
    assert total.item() == pytest.approx(0.5 * 0.5 * -0.35 + 2.0 * 0.5 * 6.6)


def test_adaptive_weight_is_the_ratio_of_gradient_norms():
    w = torch.ones(4, requires_grad=True)
    weight = adaptive_weight(3 * w.sum(), 0.5 * w.sum(), w)  # norms 6 and 1
    assert weight.item() == pytest.approx(6 / (1 + 1e-4))
    assert not weight.requires_grad


def test_adaptive_weight_is_clipped():
    w = torch.ones(4, requires_grad=True)
    assert adaptive_weight(1e3 * w.sum(), 0 * w.sum(), w).item() == 1e4


def test_random_slices_take_one_slice_a_sample():
    x = torch.arange(2 * 1 * 3 * 4 * 5.0).reshape(2, 1, 3, 4, 5)
    for axis, index in ((0, [2, 0]), (1, [3, 1]), (2, [0, 4])):
        expected = torch.stack([x[i].select(axis + 1, k) for i, k in enumerate(index)])
        assert torch.equal(random_slices(x, axis, torch.tensor(index)), expected)


def test_the_perceptual_network_is_frozen_unregistered_and_in_eval_mode_inside_train():
    loss = PerceptualLoss("random_conv")
    network = loss.build()
    holder = nn.Sequential(loss).train()
    assert not network.training
    assert not list(holder.parameters()) and not holder.state_dict()
    x = torch.rand(1, 1, 16, 16)
    assert loss(x, x) == 0


def test_lpips_stays_in_eval_mode_inside_train(monkeypatch, tmp_path):
    found = lpips.FoundWeights(tmp_path / "weights", "0", None)
    monkeypatch.setattr(lpips, "find_weights", lambda *_: found)
    monkeypatch.setattr(lpips.LPIPS, "load_backbone", lambda self, found: None)
    loss = losses.PerceptualLoss("lpips_alex")
    network = loss.build().train()
    dropouts = [m for m in network.modules() if isinstance(m, nn.Dropout)]
    assert dropouts and not any(m.training for m in dropouts)
    x, y = torch.rand(2, 1, 1, 64, 64)
    assert torch.equal(loss(x, y), loss(x, y))
