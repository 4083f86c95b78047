"""The bound against a Gaussian whose answer is known: x ~ N(0, 0.3), where the best noise_hat is linear in
z_t.
"""

import math

import numpy as np
import pytest
import torch

from medldm.diffusion.condition import Condition
from medldm.diffusion.sampler import AncestralSampler
from medldm.diffusion.schedule import fixed_linear_schedule, learned_nnet_schedule, sqrt_linear_schedule
from medldm.diffusion.variational import VariationalObjective, bits

VARIANCE = 0.3
SCHEDULE = fixed_linear_schedule(-13.3, 5.0)
# Means over these four pairs are those over x ~ N(0, 0.3) and noise ~ N(0, 1) of every quadratic: no sampling
# error.
X = math.sqrt(VARIANCE) * torch.tensor([[1.0], [1.0], [-1.0], [-1.0]], dtype=torch.float64)
NOISE = torch.tensor([[1.0], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
TABLE = {5: "48.15", 50: "1.962", 250: "1.025", 1000: "0.8680", 10000: "0.8220"}


def oracle(schedule, variance=VARIANCE):
    """E[noise | z_t] from the network's time, which is 1000 t on this schedule."""

    def network(z, t, condition):
        gamma = schedule.gamma(t.double() / 1000)[:, None]
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        return sigma * z / (variance * alpha**2 + sigma**2)

    return network


def diffusion(times, steps=None, schedule=SCHEDULE):
    """(n,) nats at `times`, averaged over x and noise."""
    n = len(times)
    nats = VariationalObjective().diffusion(
        oracle(schedule), schedule, X.repeat(n, 1), Condition(), t=times.repeat_interleave(4),
        noise=NOISE.repeat(n, 1), steps=steps,
    )  # fmt: skip
    return nats.unflatten(0, (n, 4)).mean(1)


def bound(steps):
    objective = VariationalObjective()
    recon, prior = objective.gaussian_recon(SCHEDULE, X).mean(), objective.prior(SCHEDULE, X).mean()
    if steps is None:
        nodes, weights = np.polynomial.legendre.leggauss(400)
        t, weights = torch.tensor((nodes + 1) / 2), torch.tensor(weights / 2)
        return recon, prior, (weights * diffusion(t)).sum()
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps
    return recon, prior, diffusion(t, steps).mean()


def as_printed(value, text):
    return f"{float(value):.{len(text.split('.')[1])}f}"


@pytest.mark.parametrize(("steps", "expected"), TABLE.items())
def test_the_discrete_bound_is_the_published_table(steps, expected):
    assert as_printed(sum(bound(steps)), expected) == expected


def test_the_continuous_bound_is_the_exact_likelihood():
    recon, prior, diffusion_term = bound(None)
    assert as_printed(recon, "-5.2311") == "-5.2311"
    assert as_printed(prior, "0.0010") == "0.0010"
    exact = 0.5 * math.log(2 * math.pi * math.e * VARIANCE)
    assert as_printed(recon + prior + diffusion_term, "0.8170") == "0.8170" == as_printed(exact, "0.8170")


def test_the_discrete_bound_falls_to_the_continuous_one():
    totals = [float(sum(bound(steps))) for steps in (5, 50, 250, 1000, 10000, 100000)]
    limit = float(sum(bound(None)))
    assert all(a > b for a, b in zip(totals, totals[1:], strict=False)) and totals[-1] > limit
    assert totals[-1] - limit == pytest.approx((totals[-2] - limit) / 10, rel=0.01)  # first order in 1 / T


@pytest.mark.parametrize("steps", [5, 50, 250])
def test_exact_sums_every_step_from_the_first_to_the_last(steps):
    got = VariationalObjective(num_timesteps=steps).exact(
        oracle(SCHEDULE), SCHEDULE, X, Condition(), noise=NOISE
    )
    assert as_printed(got.total.mean(), TABLE[steps]) == TABLE[steps]


def test_monte_carlo_agrees_with_the_exact_bound():
    generator = torch.Generator().manual_seed(0)
    n = 40_000
    x = math.sqrt(VARIANCE) * torch.randn(n, 1, dtype=torch.float64, generator=generator)
    objective = VariationalObjective(num_timesteps=50)
    t = objective.sample_times(n, SCHEDULE, generator=generator)
    noise = torch.randn(x.shape, dtype=x.dtype, generator=generator)
    nats = objective.diffusion(oracle(SCHEDULE), SCHEDULE, x, Condition(), t=t, noise=noise, steps=50)
    error = nats.std() / n**0.5
    assert abs(nats.mean() - bound(50)[2]) < 3 * error
    losses = objective(oracle(SCHEDULE), SCHEDULE, x, Condition(), t=t, noise=noise)
    assert losses["loss"].item() == pytest.approx(
        float(bound(50)[0] + bound(50)[1] + nats.mean()) / math.log(2), abs=0.02
    )


def estimator_variance(antithetic, batch, draws=4000):
    objective = VariationalObjective(antithetic=antithetic)
    generator = torch.Generator().manual_seed(1)
    grid = torch.linspace(0, 1, 4001, dtype=torch.float64)
    curve = diffusion(grid).numpy()
    times = [objective.sample_times(batch, SCHEDULE, generator=generator).numpy() for _ in range(draws)]
    return np.var([np.interp(t, grid.numpy(), curve).mean() for t in times])


def test_antithetic_times_lower_the_variance_of_the_estimate():
    ratios = {n: estimator_variance(False, n) / estimator_variance(True, n) for n in (1, 8, 64)}
    assert ratios[1] == pytest.approx(1, abs=0.15)
    assert ratios[8] > 10
    assert ratios[64] > 50


@pytest.mark.parametrize("n", [1, 49, 64, 98, 103])
def test_antithetic_times_fall_one_into_each_bin(n):
    t = VariationalObjective().sample_times(n, SCHEDULE, generator=torch.Generator().manual_seed(n))
    assert t.shape == (n,) and sorted((t * n).floor().int().tolist()) == list(range(n))


def test_times_of_a_discrete_bound_are_never_zero():
    objective = VariationalObjective(num_timesteps=7)
    t = objective.place(torch.tensor([0.0, 0.5, 1 - 1e-16], dtype=torch.float64), SCHEDULE)
    assert t.tolist() == pytest.approx([1 / 7, 4 / 7, 1])


def test_the_ancestral_sampler_draws_from_the_closed_form_posterior():
    x, z, t, s = 0.7, torch.full((200_000, 1), 0.4, dtype=torch.float64), 0.6, 0.55
    gamma_t, gamma_s = (float(SCHEDULE.gamma(torch.tensor(v, dtype=torch.float64))) for v in (t, s))
    alpha_t, alpha_s = ((1 / (1 + math.exp(g))) ** 0.5 for g in (gamma_t, gamma_s))
    var_t, var_s = 1 - alpha_t**2, 1 - alpha_s**2
    var_ts = var_t - (alpha_t / alpha_s) ** 2 * var_s
    mean = alpha_t / alpha_s * var_s / var_t * 0.4 + alpha_s * var_ts / var_t * x
    variance = var_ts * var_s / var_t
    a, b, _, d = AncestralSampler(num_steps=1).coefficients(
        torch.tensor([gamma_t, gamma_s], dtype=torch.float64)
    )
    assert float(a * 0.4 + b * x) == pytest.approx(mean, rel=1e-12)
    assert float(d**2) == pytest.approx(variance, rel=1e-12)
    drawn = (
        a * z + b * x + d * torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(0))
    )
    assert drawn.mean().item() == pytest.approx(mean, abs=4 * (variance / len(z)) ** 0.5)
    assert drawn.var().item() == pytest.approx(variance, rel=0.02)


def test_sampling_with_the_oracle_returns_the_data_distribution():
    objective = VariationalObjective()
    denoise = objective.denoiser(oracle(SCHEDULE), SCHEDULE, Condition())
    noise = torch.randn(20_000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    sampler = AncestralSampler(num_steps=1500, clean_last_step=False)
    z = sampler(denoise, SCHEDULE, noise, torch.Generator().manual_seed(3))
    assert z.mean().item() == pytest.approx(0, abs=0.02)
    assert z.var().item() == pytest.approx(VARIANCE, rel=0.03)


def test_sampling_can_start_on_the_way():
    """From z_t of a known x the oracle that knows x leads back to x."""
    x = torch.tensor([[0.3], [-1.2]], dtype=torch.float64)
    sampler = AncestralSampler(num_steps=100)
    first = sampler.first_step(SCHEDULE, 0.8)
    times = sampler.time_grid(SCHEDULE).times
    assert float(times[first]) == pytest.approx(0.8)
    z = sampler(lambda z, t: x.expand_as(z), SCHEDULE, torch.randn_like(x), first=first)
    torch.testing.assert_close(z, x)


def test_a_latent_diffusion_of_any_schedule_reports_bits_per_dimension():
    schedule = sqrt_linear_schedule(1000, beta_start=0.0015, beta_end=0.0195)
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))

    def network(z, t, condition):  # the best answer for a standard normal
        gamma = schedule.gamma((t + 1) / 1000).reshape(-1, 1, 1, 1)
        return torch.sigmoid(gamma).sqrt() * z

    objective = VariationalObjective()
    assert objective.steps(schedule) == 1000
    got = objective.exact(network, schedule, x, Condition(), generator=torch.Generator().manual_seed(1))
    exact = 0.5 * math.log(2 * math.pi) + 0.5 * float(x.square().mean())
    # DDPM's first steps double the noise: loose by about sum (gap of gamma)^2 / 4 = 0.6 bits.
    assert 0 < bits(got.total.mean(), 75).item() - exact / math.log(2) < 0.7
    assert objective(network, schedule, x, Condition())["bpd_total"].isfinite()


def test_beta_weighs_the_loss_and_leaves_the_report_alone():
    plain, weighted = VariationalObjective(num_timesteps=50), VariationalObjective(num_timesteps=50, beta=2.0)
    t = torch.full((4,), 0.5, dtype=torch.float64)
    args = (oracle(SCHEDULE), SCHEDULE, X, Condition())
    a, b = (o(*args, t=t, noise=NOISE) for o in (plain, weighted))
    assert a["bpd_total"] == b["bpd_total"]
    rest = (a["bpd_prior"] + a["bpd_diffusion"]).item()
    assert b["loss"].item() == pytest.approx(a["loss"].item() - rest / 2)


def test_bits_count_the_dimensions_of_the_image():
    assert bits(torch.tensor(10 * math.log(2)), 10).item() == pytest.approx(1)


@pytest.mark.parametrize(
    "options", [{"num_timesteps": 5, "times": "continuous"}, {"num_timesteps": 0}, {"beta": 0.0}]
)
def test_settings_without_meaning_are_the_users_mistake(options):
    with pytest.raises(ValueError, match="^(num_timesteps|beta)="):
        VariationalObjective(**options)


@pytest.mark.parametrize("interior", ["variance", "bound"])
@pytest.mark.parametrize("num_timesteps", [None, 20])
def test_a_learned_schedule_lowers_the_bound_or_its_variance(interior, num_timesteps):
    """Trained with the oracle: the discrete bound falls, or the spread of the continuous estimate over t
    does.
    """
    schedule = learned_nnet_schedule(
        -13.3, 5.0, endpoints="fixed", interior=interior, num_features=64
    ).double()
    objective = VariationalObjective(num_timesteps=num_timesteps)
    u = (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    t = objective.place(u, schedule) if num_timesteps else u

    def profile():
        n = len(t)
        return objective.diffusion(
            oracle_by_gamma(schedule), schedule, X.repeat(n, 1), Condition(), t=t.repeat_interleave(4),
            noise=NOISE.repeat(n, 1), steps=num_timesteps,
        ).unflatten(0, (n, 4)).mean(1)  # fmt: skip

    before = profile().detach()
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        profile().mean().backward()
        optimizer.step()
    after = profile().detach()
    if num_timesteps is None:
        assert after.mean().item() == pytest.approx(before.mean().item(), rel=0.03)
    if interior == "variance":
        assert after.std() < 0.75 * before.std()
    elif num_timesteps is None:
        torch.testing.assert_close(after, before, rtol=0, atol=1e-6)  # the bound does not depend on the share
    elif interior == "bound":
        assert after.mean() < 0.93 * before.mean()
    assert float(schedule.gamma(torch.zeros(()))) == pytest.approx(-13.3, abs=1e-4)


def oracle_by_gamma(schedule):
    """The oracle from the network's time of a learned schedule, which is gamma itself, rescaled."""

    def network(z, t, condition):
        curve = schedule.curve
        gamma = (curve.gamma_min + t.double() / 1000 * (curve.gamma_max - curve.gamma_min))[:, None]
        alpha, sigma = torch.sigmoid(-gamma).sqrt(), torch.sigmoid(gamma).sqrt()
        return sigma * z / (VARIANCE * alpha**2 + sigma**2)

    return network
