import pytest
import torch
from torch import nn

from medldm.diffusion.condition import Condition
from medldm.diffusion.objective import DenoisingObjective, clamped, guided, rescale_to
from medldm.diffusion.sampler import DDIMSampler
from medldm.diffusion.schedule import (
    cosine_schedule,
    discrete_times,
    fixed_linear_schedule,
    sqrt_linear_schedule,
)

PREDICTIONS = ["noise", "image", "velocity"]
SCHEDULE = sqrt_linear_schedule(1000, beta_start=0.0015, beta_end=0.0195)


def network_time(t, schedule):
    return schedule.network_time(t, schedule.gamma(t))


class Answer(nn.Module):
    """A network that gives a fixed answer and remembers what it was asked."""

    def __init__(self, output) -> None:
        super().__init__()
        self.output = output

    def forward(self, z_t, t, condition):
        self.z_t, self.t, self.condition = z_t, t, condition
        return self.output


class ConcatNet(nn.Module):
    """Output depends on z, t and the condition, nonlinearly."""

    calls = 0

    def forward(self, z_t, t, condition):
        self.calls += 1
        self.batch_size = len(z_t)
        t = t.reshape((-1,) + (1,) * (z_t.ndim - 1))
        return torch.tanh(z_t * condition.concat + t / 1000)


def example(shape=(4, 2, 3, 5)):
    generator = torch.Generator().manual_seed(0)
    x, noise = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
    return x, noise, torch.tensor([0.001, 0.1, 0.5, 0.9], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4, 2, 3, 5), (4, 2, 2, 3, 5)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_network_has_no_loss_and_denoises_exactly(prediction, shape):
    x, noise, t = example(shape)
    objective = DenoisingObjective(prediction)
    network = Answer(objective.target(x, noise, SCHEDULE.scales(SCHEDULE.gamma(t), x)))
    losses = objective(network, SCHEDULE, x, Condition(), t=t, noise=noise)
    assert losses["loss"].item() == losses["unweighted"].item() == 0
    z_t = SCHEDULE.add_noise(x, noise, SCHEDULE.gamma(t))
    assert torch.equal(network.z_t, z_t)
    x0_hat = objective.denoiser(network, SCHEDULE, Condition())(z_t, t)
    torch.testing.assert_close(x0_hat, x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_three_predictions_sample_the_same_image(prediction):
    x, noise, _ = example()

    class Perfect(nn.Module):
        def forward(self, z_t, t, condition):
            time = (t.double() + 1) / 1000
            scales = SCHEDULE.scales(SCHEDULE.gamma(time), z_t)
            return objective.target(x, (z_t - scales.alpha * x) / scales.sigma, scales)

    objective = DenoisingObjective(prediction)
    denoise = objective.denoiser(Perfect(), SCHEDULE, Condition())
    z = DDIMSampler(num_steps=10)(denoise, SCHEDULE, noise)
    torch.testing.assert_close(z, x, rtol=0, atol=1e-5)


def test_losses_are_means_over_elements():
    x, noise, t = example()
    network = Answer(noise + 3)
    assert DenoisingObjective("noise", loss="l1")(network, SCHEDULE, x, Condition(), t=t, noise=noise)[
        "loss"
    ].item() == pytest.approx(3)
    assert DenoisingObjective("noise")(network, SCHEDULE, x, Condition(), t=t, noise=noise)[
        "loss"
    ].item() == pytest.approx(9)


def test_min_snr_weights_have_the_papers_form():
    t = discrete_times(1000)
    snr = torch.exp(-SCHEDULE.gamma(t))
    least = snr.clamp(max=5)
    expected = {"image": least, "noise": least / snr, "velocity": least / (snr + 1)}
    for prediction, weight in expected.items():
        got = DenoisingObjective(prediction, min_snr_gamma=5.0).weight(SCHEDULE, SCHEDULE.gamma(t))
        torch.testing.assert_close(got, weight, rtol=1e-12, atol=0)


def test_min_snr_weighs_all_predictions_alike_in_x0():
    """One and the same x0 error costs the same, whatever the network predicts."""
    x, noise, t = example()
    x0_hat = x + 0.1 * noise.flip(0)
    z_t = SCHEDULE.add_noise(x, noise, SCHEDULE.gamma(t))
    alpha, sigma, *_ = SCHEDULE.scales(SCHEDULE.gamma(t), x)
    noise_hat = (z_t - alpha * x0_hat) / sigma
    outputs = {"image": x0_hat, "noise": noise_hat, "velocity": alpha * noise_hat - sigma * x0_hat}
    losses = [
        DenoisingObjective(prediction, min_snr_gamma=5.0)(
            Answer(output), SCHEDULE, x, Condition(), t=t, noise=noise
        )["loss"].item()
        for prediction, output in outputs.items()
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-9)


def test_the_network_is_told_ddpm_steps():
    assert network_time(discrete_times(1000), SCHEDULE).round(decimals=3).tolist() == list(range(1000))
    halves = network_time(discrete_times(500), cosine_schedule(500))
    torch.testing.assert_close(halves, 2.0 * torch.arange(500), rtol=0, atol=1e-3)
    continuous = network_time(torch.tensor([0.0, 0.25]), fixed_linear_schedule(-13.3, 5.0))
    assert continuous.tolist() == [0, 250]


@pytest.mark.parametrize("antithetic", [False, True])
def test_discrete_times_fall_on_every_grid_point_and_nowhere_else(antithetic):
    objective = DenoisingObjective("noise", antithetic=antithetic)
    schedule = cosine_schedule(50)
    t = objective.sample_times(20_000, schedule, generator=torch.Generator().manual_seed(0))
    steps = t * 50 - 1
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-5)
    counts = torch.bincount(steps.round().long(), minlength=50)
    assert len(counts) == 50
    spread = 1 if antithetic else 5 * 400**0.5
    assert (counts - 400).abs().max() <= spread


@pytest.mark.parametrize("n", [1, 49, 98, 103])
def test_antithetic_times_put_one_in_each_bin(n):
    objective = DenoisingObjective("noise", times="continuous", antithetic=True)
    t = objective.sample_times(n, fixed_linear_schedule(-13.3, 5.0))
    assert t.shape == (n,)
    gaps = torch.cat([t.sort().values, t.min()[None] + 1]).diff()
    torch.testing.assert_close(gaps, torch.full((n,), 1 / n), rtol=0, atol=1e-6)


def test_continuous_times_on_a_table_stay_on_its_grid_range():
    t = DenoisingObjective("noise", times="continuous").sample_times(5000, cosine_schedule(10))
    assert 0.1 <= t.min() < 0.11 and 0.99 < t.max() <= 1


def test_generators_make_the_loss_reproducible():
    x = example()[0].float()

    def loss():
        network = Answer(x)
        generator = torch.Generator().manual_seed(3)
        return DenoisingObjective("image")(
            network, SCHEDULE, x + 1, Condition(), generator=generator
        ), network.z_t

    (first, z_first), (second, z_second) = loss(), loss()
    assert first["loss"] == second["loss"] and torch.equal(z_first, z_second)


def test_loss_is_float32_and_has_gradients_under_autocast():
    network = nn.Conv2d(2, 2, 1)
    x = example()[0].float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = DenoisingObjective("velocity", min_snr_gamma=5.0)(
            lambda z, t, condition: network(z), SCHEDULE, x, Condition()
        )
    losses["loss"].backward()
    assert losses["loss"].dtype == torch.float32 and not losses["unweighted"].requires_grad
    assert network.weight.grad.abs().sum() > 0


def test_discrete_times_refuse_a_continuous_schedule():
    with pytest.raises(ValueError, match="^times=discrete needs a schedule with steps"):
        DenoisingObjective("noise", times="discrete").sample_times(2, fixed_linear_schedule(-13.3, 5.0))


@pytest.mark.parametrize(
    "keys",
    [{"prediction": "eps"}, {"prediction": "noise", "loss": "huber"}, {"prediction": "noise", "times": "x"}],
)
def test_unknown_choices_are_the_users_mistake(keys):
    with pytest.raises(ValueError, match="^(prediction|loss|times)="):
        DenoisingObjective(**keys)


def conditions():
    generator = torch.Generator().manual_seed(1)
    concat = torch.randn(4, 2, 3, 5, dtype=torch.float64, generator=generator)
    return Condition(concat=concat), Condition(concat=torch.zeros_like(concat))


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_guidance_on_x0_equals_guidance_on_the_networks_output(prediction):
    z_t, _, t = example()
    condition, null = conditions()
    network, objective = ConcatNet(), DenoisingObjective(prediction)
    got = guided(objective, network, SCHEDULE, condition, null, scale=2.5)(z_t, t)
    assert (network.calls, network.batch_size) == (1, 8)
    time = network_time(t, SCHEDULE)
    with_it, without = network(z_t, time, condition), network(z_t, time, null)
    expected = objective.x0_hat(
        without + 2.5 * (with_it - without), z_t, SCHEDULE.scales(SCHEDULE.gamma(t), z_t)
    )
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("scale", "index"), [(1, 0), (0, 1)])
def test_scales_one_and_zero_are_one_forward_of_the_conditional_and_the_null(scale, index):
    z_t, _, t = example()
    network, objective = ConcatNet(), DenoisingObjective("noise")
    got = guided(objective, network, SCHEDULE, *conditions(), scale=scale)(z_t, t)
    assert (network.calls, network.batch_size) == (1, 4)
    assert torch.equal(got, objective.denoiser(network, SCHEDULE, conditions()[index])(z_t, t))


def test_full_rescale_keeps_the_conditional_deviation():
    z_t, _, t = example()
    network, objective = ConcatNet(), DenoisingObjective("image")
    condition, null = conditions()
    got = guided(objective, network, SCHEDULE, condition, null, scale=4.0, rescale=1.0)(z_t, t)
    conditional = objective.denoiser(network, SCHEDULE, condition)(z_t, t)
    torch.testing.assert_close(got.flatten(1).std(1), conditional.flatten(1).std(1), rtol=1e-9, atol=0)


def test_static_clamp_clips_and_dynamic_clamp_scales():
    x = torch.arange(-10.0, 11.0).reshape(1, 1, 3, 7)
    t = torch.ones(1)
    assert clamped(lambda z, t: z, limit=3.0)(x, t).unique().tolist() == list(range(-3, 4))
    # 90% of 21 magnitudes 0, 1, 1, 2, 2 ..: the 19th is 9, so that +-9 goes to +-3.
    dynamic = clamped(lambda z, t: z, limit=3.0, percentile=0.9)(x, t)
    torch.testing.assert_close(dynamic, x.clamp(-9, 9) / 3)
    small = torch.full((1, 1, 2, 2), 0.5)
    assert torch.equal(clamped(lambda z, t: z, limit=3.0, percentile=0.9)(small, t), small)


def test_half_a_rescale_goes_half_the_way():
    reference, x = torch.tensor([[0.0, 2.0]]), torch.tensor([[0.0, 8.0]])
    torch.testing.assert_close(rescale_to(reference, x, 0.5), x * (1 + 0.25) / 2)
    torch.testing.assert_close(rescale_to(reference, x, 0.0), x)
