"""Samplers of few evaluations and EDM's preconditioning, against the formulas of their papers."""

import math

import pytest
import torch

from medldm.diffusion.condition import Condition
from medldm.diffusion.objective import DenoisingObjective, Preconditioning
from medldm.diffusion.paths import LinearInterpolation, VarianceExploding, VariancePreserving
from medldm.diffusion.sampler import DDIMSampler, EulerSampler, HeunSampler, MidpointSampler
from medldm.diffusion.schedule import (
    cosine_schedule,
    exploding_schedule,
    fixed_linear_schedule,
    flow_schedule,
)

MEAN, STD = 0.3, 0.5  # of the data
SCHEDULES = {
    "preserving": lambda: fixed_linear_schedule(-8.0, 6.0),
    "linear": flow_schedule,
    "exploding": lambda: exploding_schedule(0.02, 10.0),
}
PATHS = [VariancePreserving(), LinearInterpolation(), VarianceExploding()]


def posterior_mean(z, alpha, sigma):
    """E[x | z] for x ~ N(MEAN, STD^2)."""
    return MEAN + alpha * STD**2 * (z - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def gaussian_denoiser(schedule):
    def denoise(z, t):
        alpha, sigma, *_ = schedule.scales(schedule.gamma(t), z)
        return posterior_mean(z, alpha, sigma)

    return denoise


def draw(sampler, schedule, start=1.5):
    return sampler(gaussian_denoiser(schedule), schedule, torch.tensor([[start]], dtype=torch.float64)).item()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: type(path).__name__)
def test_euler_is_ddim_without_noise_on_every_path(path):
    gamma = torch.tensor([9.0, 3.0, 0.5, -4.0, -torch.inf], dtype=torch.float64)
    euler = EulerSampler(num_steps=4).coefficients(gamma, path)
    ddim = DDIMSampler(num_steps=4).coefficients(gamma, path)
    torch.testing.assert_close(euler.z, ddim.z, rtol=1e-15, atol=0)
    torch.testing.assert_close(euler.x0, ddim.x0, rtol=0, atol=1e-15)
    assert euler.noise is ddim.noise is None


def textbook(kind, times, velocity, z):
    """Runge-Kutta over falling times of which the last is 0; one evaluation in the last step, and in the
    first where the number of evaluations is even.
    """
    single = {len(times) - 2} | ({0} if kind.endswith("even") else set())
    for k, (t, s) in enumerate(zip(times, times[1:], strict=False)):
        v = velocity(z, t)
        if k not in single and kind.startswith("heun"):
            v = (v + velocity(z + (s - t) * v, s)) / 2
        elif k not in single and kind.startswith("midpoint"):
            v = velocity(z + (s - t) / 2 * v, (t + s) / 2)
        z = z + (s - t) * v
    return z


@pytest.mark.parametrize("num_steps", [1, 2, 4, 7, 10])
@pytest.mark.parametrize(
    ("kind", "sampler"), [("euler", EulerSampler), ("heun", HeunSampler), ("midpoint", MidpointSampler)]
)
def test_on_a_straight_path_the_samplers_are_those_of_the_textbook(kind, sampler, num_steps):
    """z_t = (1 - t) x + t noise, dz / dt = (z - x_hat) / t, in float64."""
    margin = 1e-9

    def velocity(z, t):
        t = min(max(t, margin), 1 - margin)
        return (z - posterior_mean(z, 1 - t, t)) / t

    steps = num_steps if kind == "euler" else num_steps // 2 + 1
    parity = "even" if num_steps % 2 == 0 else "odd"
    expected = textbook(f"{kind} {parity}", [1 - k / steps for k in range(steps + 1)], velocity, 1.5)
    assert draw(sampler(num_steps=num_steps), flow_schedule(margin=margin)) == pytest.approx(
        expected, abs=1e-6
    )


@pytest.mark.parametrize("num_steps", [1, 4, 11, 35])
def test_on_edms_path_heun_is_algorithm_1_of_karras_et_al(num_steps):
    steps, rho = num_steps // 2 + 1, 7
    low, high = 0.002 ** (1 / rho), 80 ** (1 / rho)
    sigmas = [(high + i / max(1, steps - 1) * (low - high)) ** rho for i in range(steps)] + [0.0]  # Eq. 5
    parity = "even" if num_steps % 2 == 0 else "odd"
    expected = textbook(f"heun {parity}", sigmas, lambda z, s: (z - posterior_mean(z, 1, s)) / s, 80 * 1.5)
    schedule = exploding_schedule(0.002, 80.0)
    sampler = HeunSampler(num_steps=num_steps, spacing="karras")
    assert draw(sampler, schedule) == pytest.approx(expected, abs=1e-9)
    if num_steps == 35:  # the deterministic sampler of the paper: 18 steps, 35 evaluations
        found = (sampler.time_grid(schedule).gamma[:-1] / 2).exp().unique().flip(0)
        published = [80, 57.586, 40.786, 28.375, 19.352, 12.910, 8.401, 5.315, 3.257, 1.923, 1.088, 0.5853]
        assert found[:12].tolist() == pytest.approx(published, rel=1e-3)


# Over all levels the leading error of the midpoint in log sigma cancels on Gaussian data: third order.
HALVES = {
    "preserving": lambda: fixed_linear_schedule(-2.0, 6.0),
    "linear": flow_schedule,
    "exploding": lambda: exploding_schedule(0.3, 10.0),
}


@pytest.mark.parametrize("name", HALVES)
@pytest.mark.parametrize(("sampler", "order"), [(EulerSampler, 1), (HeunSampler, 2), (MidpointSampler, 2)])
def test_orders_of_convergence(name, sampler, order):
    schedule = HALVES[name]()
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    alpha, sigma, *_ = schedule.path.scales(schedule.gamma(ends))
    prior = schedule.path.prior_std(schedule.gamma(ends[0]))
    deviation = (alpha**2 * STD**2 + sigma**2).sqrt()
    # Along the ODE (z_t - alpha_t m) / sd(z_t) stays what it is.
    exact = (alpha[1] * MEAN + deviation[1] * (1.5 * prior - alpha[0] * MEAN) / deviation[0]).item()

    def error(num_steps):
        return abs(draw(sampler(num_steps=num_steps, clean_last_step=False), schedule) - exact)

    orders = [math.log2(error(n + 1) / error(2 * n + 1)) for n in (160, 320)]
    assert orders == pytest.approx([order] * 2, abs=0.25)


@pytest.mark.parametrize("sampler", [HeunSampler, MidpointSampler])
@pytest.mark.parametrize("num_steps", [1, 2, 5, 8, 1000])
def test_evaluations_are_counted_and_stand_on_whole_steps(sampler, num_steps):
    sampler = sampler(num_steps=num_steps)
    times = sampler.time_grid(cosine_schedule(1000)).times
    steps = 1000 * times
    assert len(times) == num_steps
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-9)
    assert (times.diff() <= 0).all()
    x, noise = torch.randn(2, 2, 3, 4, 2, 6, generator=torch.Generator().manual_seed(0))
    found = sampler(lambda z, t: x, cosine_schedule(1000), noise)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


def test_a_pair_of_evaluations_is_not_entered_in_its_middle():
    """8 evaluations: one, three pairs, one; the pairs begin at 1, 3 and 5."""
    sampler, schedule = HeunSampler(num_steps=8), fixed_linear_schedule(-8.0, 6.0)
    times = sampler.time_grid(schedule).times
    assert [sampler.first_step(schedule, t.item()) for t in times[[0, 1, 3, 5, 7]]] == [0, 1, 3, 5, 7]
    assert sampler.first_step(schedule, 0.0) == 7


# ---- EDM --------------------------------------------------------------------------------------------------


def test_preconditioning_has_the_papers_numbers():
    """Table 1, Karras et al. 2022, at sigma = 1 and 80 and data of deviation 0.5."""
    sigma = torch.tensor([1.0, 80.0], dtype=torch.float64)
    skip, out, into = Preconditioning.at(torch.ones(2, dtype=torch.float64), sigma, 0.5)
    assert skip.tolist() == pytest.approx([0.25 / 1.25, 0.25 / 6400.25])
    assert out.tolist() == pytest.approx([0.5 / math.sqrt(1.25), 40 / math.sqrt(6400.25)])
    assert into.tolist() == pytest.approx([1 / math.sqrt(1.25), 1 / math.sqrt(6400.25)])


def test_the_networks_time_is_linear_in_the_papers():
    """c_noise = log(sigma) / 4, here stretched to [0, 1000] as every network of medldm is told its time."""
    schedule = exploding_schedule(0.002, 80.0)
    t = torch.tensor([0.0, 0.3, 0.9], dtype=torch.float64)
    gamma = schedule.gamma(t)
    c_noise = gamma / 2 / 4
    ends = torch.tensor([0.002, 80.0], dtype=torch.float64).log() / 4
    expected = 1000 * (c_noise - ends[0]) / (ends[1] - ends[0])
    torch.testing.assert_close(schedule.network_time(t, gamma).double(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("weight", [None, 5.0])
def test_the_loss_is_edms_weighted_error_of_the_image(weight):
    """lambda(sigma) = (sigma^2 + s^2) / (sigma s)^2 makes it the plain error of F; min-SNR replaces it."""
    schedule, std = exploding_schedule(0.002, 80.0), 0.5
    objective = DenoisingObjective("preconditioned", data_std=std, min_snr_gamma=weight)
    x, noise = torch.randn(2, 3, 400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    sigma, seen = (schedule.gamma(t) / 2).exp(), []

    def network(z, time, condition):
        seen.append(z)
        return torch.sin(z)

    loss = objective(network, schedule, x, Condition(), t=t, noise=noise)["loss"]
    z = x + sigma[:, None] * noise
    variance = sigma[:, None] ** 2 + std**2
    torch.testing.assert_close(seen[0], z / variance.sqrt())
    x_hat = std**2 / variance * z + sigma[:, None] * std / variance.sqrt() * torch.sin(z / variance.sqrt())
    weights = variance[:, 0] / (sigma * std) ** 2 if weight is None else (1 / sigma**2).clamp(max=weight)
    torch.testing.assert_close(loss, (weights * (x_hat - x).square().mean(1)).mean())
    denoised = objective.denoiser(network, schedule, Condition())(z, t)
    torch.testing.assert_close(denoised, x_hat)


@pytest.mark.parametrize("name", SCHEDULES)
def test_on_gaussian_data_a_network_that_says_nothing_is_the_posterior_mean(name):
    """Skip alone is E[x | z] for x ~ N(0, s^2), and what is left has unit variance: the loss is 1."""
    schedule, std = SCHEDULES[name](), 0.7
    objective = DenoisingObjective("preconditioned", data_std=std)
    x = std * torch.randn(64, 4000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.1, 0.9, 64, dtype=torch.float64)
    loss = objective(lambda z, time, _: torch.zeros_like(z), schedule, x, Condition(), t=t)["loss"]
    assert loss.item() == pytest.approx(1, abs=0.02)


def test_where_the_variance_is_preserved_it_is_velocity_prediction_with_its_sign_turned():
    schedule = fixed_linear_schedule(-8.0, 6.0)
    x, noise = torch.randn(2, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scales = schedule.scales(schedule.gamma(torch.linspace(0.1, 0.9, 5, dtype=torch.float64)), x)
    ours = DenoisingObjective("preconditioned", data_std=1.0).target(x, noise, scales)
    torch.testing.assert_close(ours, -DenoisingObjective("velocity").target(x, noise, scales))


@pytest.mark.parametrize("name", ["linear", "exploding", "cosine"])
def test_log_normal_levels_have_their_quantiles(name):
    """log sigma of 1000 antithetic times are 1000 quantiles of N(-1.2, 1.2^2); on a table, its nearest."""
    schedule = cosine_schedule(1000) if name == "cosine" else SCHEDULES[name]()
    options = {"density": "log_normal", "level_mean": -1.2, "level_std": 1.2, "antithetic": True}
    objective = DenoisingObjective("velocity", **options)
    t = objective.sample_times(1000, schedule, generator=torch.Generator().manual_seed(0)).double()
    levels = (schedule.gamma(t) / 2).sort().values
    expected = -1.2 + 1.2 * torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)
    torch.testing.assert_close(levels[20:-20], expected[20:-20], atol=0.05, rtol=0)
    if name == "cosine":
        torch.testing.assert_close(1000 * t, (1000 * t).round(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"prediction": "preconditioned"}, "data_std=None must be a number above 0"),
        ({"prediction": "velocity", "data_std": 1.0}, "data_std=1.0 has no effect"),
        ({"prediction": "velocity", "density": "log_normal"}, "level_std=None must be a number above 0"),
        ({"prediction": "velocity", "level_std": 1.0}, "level_std=1.0 has no effect"),
        ({"prediction": "velocity", "level_mean": 1.0}, "level_mean=1.0: density=log_normal reads"),
    ],
)
def test_settings_without_their_partner_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        DenoisingObjective(**options)
