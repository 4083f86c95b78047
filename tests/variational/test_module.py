import copy
import math

import pytest
import torch
from omegaconf import OmegaConf

from medldm.build import build_module
from medldm.diffusion.condition import Condition
from medldm.diffusion.likelihood import Bernoulli, DiscretizedGaussian, binary_entropy, grey
from medldm.diffusion.sampler import AncestralSampler
from medldm.diffusion.variational import bits, gradient_difference
from medldm.errors import InputError
from medldm.models.common import case_generators, case_noise, warmup_cosine
from medldm.networks.codec import MLPCodec
from medldm.networks.scorenet import ScoreNet, fourier_features
from medldm.shrinking import shrink
from tests.helpers import compose_config, num_parameters

FACTS = {
    "spatial_dims": 2,
    "image_channels": 1,
    "num_classes": None,
    "num_views": 0,
    "num_phases": 0,
    "num_labels": 2,
    "image_size": [32, 32],
}
IMAGES = ["chestxray", "chestxray_conv", "chestxray_pixel", "colab"]


def build(experiment, *overrides, tiny=True, **facts):
    torch.manual_seed(0)
    cfg = compose_config("train", f"experiment=medvdm/{experiment}", *overrides)
    model = OmegaConf.to_container(cfg.model, resolve=True)
    return build_module(shrink(model) if tiny else model, FACTS | facts).eval()


def randomised(module, scale=0.1):
    """The module with its zero-initialised layers filled, so that everything matters."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        if not name.startswith("schedule") and parameter.abs().max() == 0:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return module


def images(n=4, size=32):
    generator = torch.Generator().manual_seed(2)
    small = torch.rand(n, 1, 4, 4, generator=generator) * 2 - 1
    return torch.nn.functional.interpolate(small, size=(size, size), mode="bilinear").clamp(-1, 1)


def drawer(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda shape, sample=torch.randn: sample(n, *shape, generator=generator)


@pytest.mark.parametrize("experiment", IMAGES)
def test_every_operation_of_every_model(experiment):
    module, x = randomised(build(experiment)), images()
    batch = {"image": x, "label": torch.tensor([0, 1, 0, 1])}
    condition = module.condition(batch)
    assert module.shortcut(x, condition).shape == x.shape
    assert module.recon(x, condition, t=0.8).shape == x.shape
    generated = module.generate(3, (32, 32), seed=1)
    assert generated.shape == (3, 1, 32, 32) and generated.abs().max() <= 1
    assert torch.equal(generated, module.generate(3, (32, 32), seed=1))
    assert module.vlb_exact(x, condition, num_timesteps=3).total.shape == (4,)
    figures = module.figures(batch)
    assert {"schedule", "noising"} == figures.keys()
    assert all(f.dtype == torch.uint8 and f.shape[0] == 3 for f in figures.values())
    assert [row.shape for row in module.picture(batch)] == [x.shape] * 4


@pytest.mark.parametrize("experiment", IMAGES)
def test_the_loss_reaches_every_part(experiment):
    module, x = randomised(build(experiment)), images(8)
    batch = {"image": x, "label": torch.tensor([0, 1] * 4)}
    t = module.objective.sample_times(8, module.schedule)
    losses = module.bound_losses(x, module.condition(batch), t, drawer(8))
    losses["loss"].backward()
    untouched = [n for n, p in module.named_parameters() if p.requires_grad and p.grad is None]
    # Unused: the conditioning of an unconditional codec, and quantiser-free parts have none.
    assert not untouched
    assert losses["bpd_total"].item() == pytest.approx(
        sum(losses[f"bpd_{name}"].item() for name in ("recon", "prior", "diffusion")), rel=1e-5
    )


def test_extra_losses_stay_outside_the_reported_bound():
    module, x = build("chestxray"), images()
    plain = build("chestxray", "model.mse_weight=0", "model.gradient_weight=0")
    plain.load_state_dict(module.state_dict())
    t = torch.full((4,), 0.5, dtype=torch.float64)
    a, b = (m.bound_losses(x, Condition(), t, drawer(4)) for m in (module, plain))
    assert a["bpd_total"] == b["bpd_total"]
    assert b["loss"].item() == pytest.approx(b["bpd_total"].item(), rel=1e-5)
    assert a["loss"].item() == pytest.approx((b["loss"] + a["mse"] + a["gradient"]).item(), rel=1e-5)


@pytest.mark.parametrize("experiment", ["chestxray", "chestxray_conv", "chestxray_cpu"])
@pytest.mark.parametrize("extra", ["mse", "gradient"])
def test_extra_losses_move_the_decoder(experiment, extra):
    """They do so under every likelihood: a grey level that is rounded to 1 of 256 has no gradient."""
    module = randomised(build(experiment, f"model.{extra}_weight=1"))
    x, t = images(), torch.full((4,), 0.5, dtype=torch.float64)
    losses = module.bound_losses(
        x, module.condition({"image": x, "label": torch.zeros(4).long()}), t, drawer(4)
    )
    grads = torch.autograd.grad(losses[extra], list(module.codec.parameters()), allow_unused=True)
    assert sum(g.abs().sum() for g in grads if g is not None) > 1e-3
    if "soft" not in str(getattr(module.likelihood, "target", "")):
        assert losses["mse"].item() == pytest.approx(
            ((module.likelihood.expected(decoded(module, x)) - module.likelihood.observe(x)) / 2)
            .square()
            .mean()
            .item(),
            rel=1e-5,
        )


def decoded(module, x):
    """What `bound_losses` decodes from the noise of `drawer(4)`."""
    draw, condition = drawer(4), module.condition({"image": x, "label": torch.zeros(4).long()})
    f = module.encode(module.likelihood.observe(x), condition)
    draw(tuple(f.shape[1:]))
    noise = draw(tuple(f.shape[1:]))
    return module.decoder_output(module.objective.decoder_input(module.schedule, f, noise), condition)


def test_the_seed_preset_has_the_published_sizes():
    codec = MLPCodec(2, image_channels=1, image_size=(256, 256), condition_channels=64)
    encoder = sum(num_parameters(m) for m in (codec.encoder_in, codec.encoder, codec.encoder_out))
    decoder = sum(num_parameters(m) for m in (codec.decoder_in, codec.decoder, codec.decoder_out))
    assert round(encoder / 1e6, 1) == 20.4 and round(decoder / 1e6, 1) == 40.4
    colab = MLPCodec(2, image_channels=1, image_size=(256, 256), condition_channels=64, num_blocks=(3, 3))
    encoder = sum(num_parameters(m) for m in (colab.encoder_in, colab.encoder, colab.encoder_out))
    assert round(encoder / 1e6, 1) == 18.6
    score = ScoreNet(2, in_channels=64, out_channels=64, embedding_channels=64)
    assert round(num_parameters(score) / 1e6, 1) == 2.1
    module = build("chestxray", tiny=False)
    assert (len(module.codec.encoder), len(module.codec.decoder), len(module.network.blocks)) == (6, 6, 10)
    assert (module.codec.latent_channels, module.network.embedding_channels) == (64, 128)


def test_score_networks_start_from_their_skip():
    z, t = torch.randn(3, 8), torch.tensor([0.0, 400.0, 999.0])
    net = ScoreNet(2, in_channels=8, out_channels=8, embedding_channels=8, num_blocks=2, middle_channels=16)
    for block in net.blocks:
        block.linear2.bias.data.zero_()
    torch.testing.assert_close(net(z, t, Condition()), z + net.input(z))
    pixel, x = build("chestxray_pixel"), images(3)
    assert torch.equal(pixel.network(x, t, Condition()), x)


@pytest.mark.parametrize("film", ["shift", "scale_shift"])
def test_a_label_reaches_codec_and_score_network(film):
    module = randomised(build("colab", f"model.codec.film={film}", f"model.network.film={film}"))
    x, f, t = images(2), torch.randn(2, 32), torch.tensor([500.0, 500.0])
    a, b = (module.condition({"label": torch.full((2,), k)}) for k in (0, 1))
    assert not torch.allclose(module.encode(x, a), module.encode(x, b))
    assert not torch.allclose(module.decoder_output(f, a), module.decoder_output(f, b))
    assert not torch.allclose(module.network(f, t, a), module.network(f, t, b))


def test_guidance_ends_at_the_conditional_and_the_null_that_training_drops_to():
    module = randomised(build("colab"))
    batch = {"label": torch.tensor([1, 0])}
    null = module.condition(batch, None)
    drop = torch.ones(2, 1, dtype=torch.bool)
    assert torch.equal(null.embedding, module.conditioner(batch, None, drop).embedding)
    assert torch.equal(null.embedding, module.embed(torch.tensor([-1, -1])))

    module.expected_image = lambda z, condition: z  # the decoder knows the label at every scale

    def sampled(scale, label):
        sampler = AncestralSampler(num_steps=3, guidance_scale=scale)
        return module.sample({"label": label}, ["a", "b"], (), sampler=sampler)

    def drawn(condition):
        noise, generators = case_noise(["a", "b"], (32,), 0), case_generators(["a", "b"], 0, module.device)
        denoise = module.objective.denoiser(module.network, module.schedule, condition)
        return AncestralSampler(num_steps=3)(denoise, module.schedule, noise, generators)

    one, other = batch["label"], torch.tensor([0, 1])
    assert torch.equal(sampled(0.0, one), drawn(null)) and torch.equal(sampled(0.0, other), drawn(null))
    assert torch.equal(sampled(1.0, one), drawn(module.condition(batch)))
    for scale in (0.0, 2.0):
        assert not torch.allclose(sampled(scale, one), sampled(1.0, one))
    assert not torch.allclose(sampled(1.0, one), sampled(1.0, other))


def test_classify_takes_the_label_with_the_lowest_bound():
    module = randomised(build("colab"), scale=0.3)
    x = images(3)
    totals = []
    for label in (0, 1):
        condition = module.condition({"label": torch.full((3,), label)})
        generator = torch.Generator().manual_seed(0)
        totals.append(module.vlb_exact(x, condition, num_timesteps=4, generator=generator).total)
    assert torch.equal(module.classify(x, 2, num_timesteps=4), torch.stack(totals).argmin(0))


def test_exact_bound_is_the_mean_of_the_drawn_one():
    module = randomised(build("chestxray", "model.objective.num_timesteps=5"), scale=0.02)
    n, x = 2000, images(1).expand(2000, -1, -1, -1)
    with torch.no_grad():
        t = module.objective.sample_times(n, module.schedule, generator=torch.Generator().manual_seed(0))
        losses = module.bound_losses(x, Condition(), t, drawer(n))
        exact = module.vlb_exact(x, Condition(), num_timesteps=5, generator=torch.Generator().manual_seed(3))
    per_dim = bits(exact.total, 32 * 32)
    assert losses["bpd_total"].item() == pytest.approx(per_dim.mean().item(), rel=0.02)


# ---- likelihoods ---------------------------------------------------------------------------------------


def test_a_decoder_that_says_one_half_costs_one_bit():
    x = images()
    for target in ("soft", "threshold"):
        likelihood = Bernoulli(target)
        nats = likelihood.nats(torch.zeros_like(x), likelihood.observe(x), torch.zeros(()))
        assert bits(nats, 1024).tolist() == pytest.approx([1.0] * 4, abs=1e-6)


def test_soft_bits_end_at_the_entropy_of_the_grey_levels():
    x = images()
    likelihood = Bernoulli("soft")
    nats = likelihood.nats(torch.logit(grey(x), eps=1e-6), x, torch.zeros(()))
    torch.testing.assert_close(nats, likelihood.entropy_floor(x), rtol=1e-4, atol=1e-3)
    y = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    assert binary_entropy(y).mean().item() / math.log(2) == pytest.approx(0.721, abs=5e-4)


def test_tossing_keeps_the_grey_level_in_the_mean():
    x = images(1).expand(4000, -1, -1, -1)
    likelihood = Bernoulli("dynamic")
    seen = likelihood.observe(x, torch.rand(x.shape, generator=torch.Generator().manual_seed(0)))
    assert set(seen.unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(grey(seen).mean(0), grey(x[0]), rtol=0, atol=0.05)


@pytest.mark.parametrize("scale", ["learned", "schedule"])
@pytest.mark.parametrize("mean", [-1.4, 0.13, 0.99])
@pytest.mark.parametrize("log_variance", [-8.0, -2.0, 3.0])
def test_grey_levels_have_probabilities_that_sum_to_one(scale, mean, log_variance):
    likelihood = DiscretizedGaussian(num_levels=16, scale=scale)
    if scale == "learned":
        likelihood.log_variance.data.fill_(log_variance)
    levels = likelihood.value(torch.arange(16)).reshape(16, 1)
    output = torch.full((16, 1), mean, requires_grad=True)
    nats = likelihood.nats(output, levels, torch.tensor(log_variance))
    assert torch.exp(-nats).sum().item() == pytest.approx(1, abs=1e-5)
    nats.sum().backward()
    assert output.grad.isfinite().all()


def test_both_discretised_normals_agree_where_the_levels_are_fine():
    learned, schedule = DiscretizedGaussian(), DiscretizedGaussian(scale="schedule")
    output, x = images(), learned.observe(images().flip(0))
    expected = schedule.nats(output, x, torch.tensor(-4.0))
    torch.testing.assert_close(learned.nats(output, x, torch.zeros(())), expected, rtol=0.02, atol=0)


def test_observed_levels_and_shown_images_keep_black_and_white():
    likelihood = DiscretizedGaussian()
    x = torch.tensor([[-1.0, 0.0, 1.0]])
    seen = likelihood.observe(x)
    assert seen.tolist() == [pytest.approx([-255 / 256, 1 / 256, 255 / 256], abs=5e-3)]
    torch.testing.assert_close(likelihood.mean(seen), x, rtol=0, atol=5e-3)


def test_a_sure_decoder_pays_nothing_for_grey_levels():
    likelihood, x = DiscretizedGaussian(scale="schedule"), images()
    seen = likelihood.observe(x)
    assert likelihood.nats(seen, seen, torch.tensor(-16.0)).max() < 0.1


# ---- small parts ---------------------------------------------------------------------------------------


def test_the_gradient_difference_forgives_the_sign_unless_told():
    x = torch.tensor([0.0, 1.0, 0.0, 1.0]).expand(1, 1, 4, 4)
    assert gradient_difference(1 - x, x).item() == 0
    assert gradient_difference(1 - x, x, signed=True).item() == pytest.approx(2)
    assert gradient_difference(torch.zeros_like(x), x, power=2).item() == pytest.approx(1)


def test_fourier_features_are_sines_then_cosines():
    x = torch.tensor([[0.1, -0.3]])
    got = fourier_features(x, 0, 2)
    angles = torch.tensor([0.1, 0.2, -0.3, -0.6]) * 2 * math.pi
    torch.testing.assert_close(got[0], torch.cat([angles.sin(), angles.cos()]))
    assert fourier_features(images(2), 6, 8).shape == (2, 4, 32, 32)


def test_the_learning_rate_warms_up_and_falls_on_the_update_itself():
    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([parameter], lr=1e-4)
    schedule = warmup_cosine(optimizer, warmup=250, total=20_000, final=1e-5)
    multiplier = schedule.lr_lambdas[0]
    assert multiplier(0) == pytest.approx(1 / 250)
    assert multiplier(125) == pytest.approx(126 / 250, rel=1e-3)
    assert multiplier(249) == pytest.approx(1, rel=1e-3)
    assert multiplier(19_000) == pytest.approx(0.00616, rel=0.01)
    assert multiplier(20_000) == pytest.approx(1e-5)


def test_an_mlp_needs_images_of_one_size():
    with pytest.raises(InputError, match=r"data\.image_size"):
        build("chestxray", image_size=None)


def test_labels_that_the_dataset_lacks_are_the_users_mistake():
    with pytest.raises(InputError, match="use_label"):
        build("colab", "model.conditioner.use_label=true", num_labels=0)


def test_a_model_can_learn_four_images_by_heart():
    module = build("chestxray", "model.schedule.gamma_min=-6", "model.likelihood.target=soft")
    module.codec = MLPCodec(
        2, image_channels=1, image_size=(32, 32), latent_channels=64, encoder_channels=64,
        decoder_channels=64, num_blocks=(1, 1), middle_channels=64,
    )  # fmt: skip
    x = images()
    before = copy.deepcopy(module.schedule.state_dict())
    optimizer = torch.optim.Adam(module.parameters(), lr=2e-3)
    for step in range(250):
        t = module.objective.sample_times(4, module.schedule)
        losses = module.bound_losses(x, Condition(), t, drawer(4, step))
        optimizer.zero_grad()
        losses["loss"].backward()
        optimizer.step()
    assert losses["recon_gap"] < 0.01
    assert (module.shortcut(x, Condition()) - x).abs().mean() < 0.1
    assert any(not torch.equal(v, before[k]) for k, v in module.schedule.state_dict().items())
