import math
from functools import partial

import pytest
import torch

from medldm.diffusion.sampler import AncestralSampler, DDIMSampler, DPMSolverSampler
from medldm.diffusion.schedule import (
    cosine_schedule,
    discrete_times,
    fixed_linear_schedule,
    sqrt_linear_schedule,
)

DATA_STD = 0.5
SAMPLERS = {
    "ancestral": AncestralSampler,
    "ddim": DDIMSampler,
    "dpm_solver": DPMSolverSampler,
    "dpm_solver_sde": partial(DPMSolverSampler, eta=1.0),
}
SCHEDULES = {
    "sqrt_linear": lambda: sqrt_linear_schedule(1000, beta_start=0.0015, beta_end=0.0195),
    "cosine": lambda: cosine_schedule(1000),
    "fixed_linear": lambda: fixed_linear_schedule(-13.3, 5.0),
}


def gaussian_denoiser(schedule, std=DATA_STD):
    """E[x | z_t] for x ~ N(0, std^2)."""

    def denoise(z, t):
        alpha, sigma, *_ = schedule.scales(schedule.gamma(t), z)
        return alpha * std**2 / (alpha**2 * std**2 + sigma**2) * z

    return denoise


def exact_std(sampler, schedule, std=DATA_STD):
    """Standard deviation of a linear sampler's result by its own recursion, without sampling."""
    grid = sampler.time_grid(schedule)
    a, b, c, d = sampler.coefficients(grid.gamma)
    one = torch.ones(1, dtype=torch.float64)
    gains = torch.stack([gaussian_denoiser(schedule, std)(one, t[None])[0] for t in grid.times])
    z = torch.zeros(sampler.num_steps + 1, dtype=torch.float64)  # coefficients of the independent noises
    z[-1] = 1
    previous = torch.zeros_like(z)
    for k in range(sampler.num_steps):
        x0 = gains[k] * z
        z = a[k] * z + b[k] * x0 + (0 if c is None else c[k] * previous)
        if d is not None:
            z[k] = d[k]
        previous = x0
    return z.norm().item()


def draw(sampler, schedule, n=20_000):
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(n, 1, 1, 1, dtype=torch.float64, generator=generator)
    return sampler(gaussian_denoiser(schedule), schedule, noise, generator)


# Long steps narrow the result of ancestral sampling and DDIM: theirs, not an error of the code (MONAI's
# unspaced DDPM widens to 0.97 at 20 steps). DPM-Solver++ is second order and nearly exact.
TOLERANCES = {
    "ancestral": {1000: 0.008, 50: 0.07, 20: 0.12},
    "ddim": {1000: 0.004, 50: 0.05, 20: 0.10},
    "dpm_solver": {1000: 0.002, 50: 0.004, 20: 0.016},
    "dpm_solver_sde": {1000: 0.002, 50: 0.009, 20: 0.026},
}


@pytest.mark.parametrize("num_steps", [1000, 50, 20])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_gaussian_data_comes_back_with_its_deviation(sampler, schedule, num_steps):
    tolerance = TOLERANCES[sampler][num_steps]
    sampler, schedule = SAMPLERS[sampler](num_steps=num_steps), SCHEDULES[schedule]()
    exact = exact_std(sampler, schedule)
    assert exact == pytest.approx(DATA_STD, abs=tolerance)
    n = 2_000 if num_steps == 1000 else 20_000
    assert draw(sampler, schedule, n).std().item() == pytest.approx(exact, rel=4 / (2 * n) ** 0.5)


def test_ancestral_step_equals_the_closed_form_posteriors():
    schedule = SCHEDULES["sqrt_linear"]()
    sampler = AncestralSampler(num_steps=1000)
    grid = sampler.time_grid(schedule)
    got = sampler.coefficients(grid.gamma)
    roots = torch.linspace(0.0015**0.5, 0.0195**0.5, 1000, dtype=torch.float64)
    betas = roots**2
    alpha_bar = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    # Eq. 7, Ho et al. 2020
    x0 = (before.sqrt() * betas / (1 - alpha_bar)).flip(0)
    z = ((1 - betas).sqrt() * (1 - before) / (1 - alpha_bar)).flip(0)
    std = (betas * (1 - before) / (1 - alpha_bar)).sqrt().flip(0)
    assert torch.equal(grid.times, discrete_times(1000).flip(0))
    for mine, theirs in ((got.x0, x0), (got.z, z), (got.noise, std)):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_a_respaced_ancestral_step_is_the_posterior_over_the_longer_interval():
    schedule = SCHEDULES["sqrt_linear"]()
    sampler = AncestralSampler(num_steps=50)
    grid = sampler.time_grid(schedule)
    alpha, sigma, *_ = schedule.scales(schedule.gamma(grid.times), grid.times)
    a_t, s_t, a_s, s_s = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
    a_ts = a_t / a_s
    var_ts = s_t**2 - a_ts**2 * s_s**2
    got = sampler.coefficients(grid.gamma)
    torch.testing.assert_close(got.z[:-1], a_ts * s_s**2 / s_t**2, rtol=0, atol=1e-13)
    torch.testing.assert_close(got.x0[:-1], a_s * var_ts / s_t**2, rtol=0, atol=1e-13)
    torch.testing.assert_close(got.noise[:-1], (var_ts * s_s**2 / s_t**2).sqrt(), rtol=0, atol=1e-13)


@pytest.mark.parametrize("num_steps", [7, 1000])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_ddim_with_eta_one_is_ancestral_sampling(schedule, num_steps):
    gamma = AncestralSampler(num_steps=num_steps).time_grid(SCHEDULES[schedule]()).gamma
    ancestral = AncestralSampler(num_steps=num_steps).coefficients(gamma)
    ddim = DDIMSampler(num_steps=num_steps, eta=1.0).coefficients(gamma)
    for name in ("z", "x0", "noise"):
        torch.testing.assert_close(getattr(ddim, name), getattr(ancestral, name), rtol=0, atol=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_stochastic_dpm_solver_is_ancestral_sampling_plus_a_second_order_term(schedule):
    gamma = AncestralSampler(num_steps=20).time_grid(SCHEDULES[schedule]()).gamma
    ancestral = AncestralSampler(num_steps=20).coefficients(gamma)
    solver = DPMSolverSampler(num_steps=20, eta=1.0).coefficients(gamma)
    torch.testing.assert_close(solver.z, ancestral.z, rtol=0, atol=1e-12)
    torch.testing.assert_close(solver.noise, ancestral.noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(solver.x0 + solver.x0_previous, ancestral.x0, rtol=0, atol=1e-12)
    assert (solver.x0_previous[1:-1] < 0).all()


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 3, 4, 2, 6)])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 20, 1500])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_oracle_denoiser_is_recovered_in_2d_and_3d(sampler, num_steps, shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    schedule = SCHEDULES["cosine"]()
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    got = SAMPLERS[sampler](num_steps=num_steps)(lambda z, t: x, schedule, noise)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace", "logsnr", "karras"])
def test_every_combination_gives_finite_samples(sampler, schedule, spacing):
    schedule = SCHEDULES[schedule]()
    for clean in (True, False):
        made = SAMPLERS[sampler](num_steps=9, spacing=spacing, clean_last_step=clean)
        assert draw(made, schedule, n=8).isfinite().all()


def test_dpm_solver_is_second_order_and_ddim_first_order():
    schedule = fixed_linear_schedule(-6.0, 5.0)
    denoise = gaussian_denoiser(schedule)
    ends = torch.tensor([1.0, 0.0], dtype=torch.float64)
    alpha, sigma, *_ = schedule.scales(schedule.gamma(ends), ends)
    deviation = (alpha**2 * DATA_STD**2 + sigma**2).sqrt()
    exact = (deviation[1] / deviation[0]).item()  # solution of the probability-flow ODE from z = 1

    def error(sampler, num_steps):
        made = SAMPLERS[sampler](num_steps=num_steps, spacing="trailing", clean_last_step=False)
        z = made(denoise, schedule, torch.ones(1, 1, 1, 1, dtype=torch.float64)).item()
        return abs(z - exact)

    for sampler, order in (("ddim", 1), ("dpm_solver", 2)):
        orders = [math.log2(error(sampler, n) / error(sampler, 2 * n)) for n in (80, 160)]
        assert orders == pytest.approx([order] * 2, abs=0.2), sampler
    assert error("dpm_solver", 20) < error("ddim", 160)


def test_leading_spacing_is_compvis_uniform_stride():
    schedule = SCHEDULES["sqrt_linear"]()

    def steps(num_steps, spacing):
        times = DDIMSampler(num_steps=num_steps, spacing=spacing).time_grid(schedule).times
        return (times * 1000 - 1).round().int().flip(0).tolist()

    assert steps(200, "leading") == list(range(1, 1000, 5))
    assert steps(50, "leading") == list(range(1, 1000, 20))
    assert steps(50, "trailing") == list(range(19, 1000, 20))
    assert steps(1000, "leading") == steps(1000, "trailing") == steps(1000, "linspace") == list(range(1000))
    assert steps(2, "linspace") == [0, 999]
    for num_steps in (3, 7, 300, 999):
        for spacing in ("leading", "trailing", "linspace"):
            got = steps(num_steps, spacing)
            assert got == sorted(set(got)) and set(got) <= set(range(1000))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_logsnr_spacing_steps_equally_in_gamma_between_both_ends(schedule):
    schedule = SCHEDULES[schedule]()
    grid = DPMSolverSampler(num_steps=12).time_grid(schedule)
    assert grid.times[[0, -1]].tolist() == pytest.approx([1, 0.001], abs=1e-12)
    steps = grid.gamma[:-1].diff()
    torch.testing.assert_close(steps, steps.mean().expand_as(steps), rtol=2e-3, atol=0)


def test_without_a_clean_last_step_ddim_ends_at_the_first_alpha_bar():
    sampler = DDIMSampler(num_steps=200, spacing="leading", clean_last_step=False, eta=1.0)
    grid = sampler.time_grid(SCHEDULES["sqrt_linear"]())
    assert torch.sigmoid(-grid.gamma[-1]).item() == pytest.approx(0.9985, abs=1e-12)
    # ALDM's measured last step: .9992 x0_hat + .0273 noise_hat + .0274 fresh noise
    last = sampler.coefficients(grid.gamma)
    alpha, sigma = (torch.sigmoid(sign * grid.gamma[-2]).sqrt() for sign in (-1, 1))
    assert (last.x0[-1] + alpha * last.z[-1]).item() == pytest.approx(0.9992, abs=1e-4)
    assert (sigma * last.z[-1]).item() == pytest.approx(0.0273, abs=1e-4)
    assert last.noise[-1].item() == pytest.approx(0.0274, abs=1e-4)


def test_a_seeded_generator_makes_samples_reproducible():
    schedule = SCHEDULES["cosine"]()
    sampler = AncestralSampler(num_steps=10)
    assert torch.equal(draw(sampler, schedule, n=4), draw(sampler, schedule, n=4))


def test_callback_sees_every_step():
    seen = []
    schedule = SCHEDULES["cosine"]()
    noise = torch.randn(2, 1, 4, 4)
    DDIMSampler(num_steps=5)(
        gaussian_denoiser(schedule), schedule, noise, callback=lambda k, x0: seen.append((k, x0.shape))
    )
    assert seen == [(k, noise.shape) for k in range(1, 6)]


def test_half_precision_noise_is_sampled_in_float32():
    schedule, seen = SCHEDULES["cosine"](), []

    def denoise(z, t):
        seen.append(z.dtype)
        return gaussian_denoiser(schedule)(z, t)

    z = DDIMSampler(num_steps=4)(denoise, schedule, torch.randn(2, 1, 4, 4).bfloat16())
    assert z.dtype == torch.bfloat16 and set(seen) == {torch.float32}


def test_clamp_bounds_the_result():
    z = DDIMSampler(num_steps=4, clamp=2.0)(
        lambda z, t: 10 * z, SCHEDULES["cosine"](), torch.randn(2, 1, 8, 8)
    )
    assert z.abs().max() == 2


@pytest.mark.parametrize(
    "keys",
    [
        {"num_steps": 0},
        {"num_steps": 10**9},  # whose times alone would fill the memory
        {"num_steps": 5, "spacing": "odd"},
        {"num_steps": 5, "clamp_percentile": 0.9},
    ],
)
def test_bad_keys_are_the_users_mistake(keys):
    told = "num_steps=0|num_steps=1000000000 .* at most 100,000|spacing=odd|clamp_percentile=0.9"
    with pytest.raises(ValueError, match=told):
        AncestralSampler(**keys)
