"""Paths from data to noise: objective and samplers against closed forms on Gaussian data."""

import math

import pytest
import torch

from medldm.diffusion.condition import Condition
from medldm.diffusion.objective import PREDICTIONS, DenoisingObjective, Preconditioning
from medldm.diffusion.paths import LinearInterpolation, VarianceExploding, VariancePreserving
from medldm.diffusion.sampler import AncestralSampler, DDIMSampler, DPMSolverSampler
from medldm.diffusion.schedule import exploding_schedule, fixed_linear_schedule, flow_schedule
from medldm.diffusion.variational import VariationalObjective

SCHEDULES = {
    "preserving": lambda: fixed_linear_schedule(-13.3, 9.0),
    "linear": flow_schedule,
    "exploding": lambda: exploding_schedule(0.002, 80.0),
}
PATHS = {
    "preserving": VariancePreserving(),
    "linear": LinearInterpolation(),
    "exploding": VarianceExploding(),
}
MEAN, STD = 0.3, 0.5  # of the data


def posterior_mean(z, alpha, sigma):
    """E[x | z] for x ~ N(MEAN, STD^2)."""
    return MEAN + alpha * STD**2 * (z - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def objective_of(prediction, **options):
    data_std = STD if prediction == "preconditioned" else None
    return DenoisingObjective(prediction, data_std=data_std, **options)


def exact_network(schedule, prediction):
    """What the best network says, as a function of z and its time."""

    def network(z, time, condition):
        t = (time.double() / 1000).reshape(-1, *[1] * (z.ndim - 1))
        alpha, sigma, alpha_slope, sigma_slope = schedule.path.scales(schedule.gamma(t))
        factors = Preconditioning.at(alpha, sigma, STD)
        z = z / factors.into if prediction == "preconditioned" else z
        x_hat = posterior_mean(z, alpha, sigma)
        noise_hat = (z - alpha * x_hat) / sigma
        velocity = alpha_slope * x_hat + sigma_slope * noise_hat
        preconditioned = (x_hat - factors.skip * z) / factors.out
        found = {"image": x_hat, "noise": noise_hat, "velocity": velocity, "preconditioned": preconditioned}
        return found[prediction]

    return network


@pytest.mark.parametrize("name", PATHS)
def test_scales_agree_with_gamma_and_their_derivatives_with_each_other(name):
    gamma = torch.linspace(-12, 12, 49, dtype=torch.float64, requires_grad=True)
    alpha, sigma, alpha_slope, sigma_slope = PATHS[name].scales(gamma)
    torch.testing.assert_close(2 * (sigma / alpha).log(), gamma)
    torch.testing.assert_close(alpha * sigma_slope - sigma * alpha_slope, torch.ones_like(gamma))
    for power, scale in zip(PATHS[name].powers(gamma), (alpha, sigma), strict=True):
        torch.testing.assert_close(power.expand_as(scale), scale.square())
    for scale, slope in ((alpha, alpha_slope), (sigma, sigma_slope)):
        if scale.requires_grad:
            by_gamma = torch.autograd.grad(scale.sum(), gamma, retain_graph=True)[0]
            torch.testing.assert_close(by_gamma, slope * alpha * sigma / 2)  # d s / d gamma


@pytest.mark.parametrize("name", PATHS)
def test_clean_data_have_scales_of_exactly_one_and_zero(name):
    alpha, sigma, *_ = PATHS[name].scales(torch.tensor(-torch.inf))
    assert (alpha.item(), sigma.item()) == (1, 0)


def test_the_published_forms():
    t = torch.tensor([0.25, 0.5, 0.9], dtype=torch.float64)
    flow = flow_schedule(margin=1e-9)
    alpha, sigma, *_ = flow.path.scales(flow.gamma(t))
    torch.testing.assert_close(sigma, t, atol=1e-8, rtol=0)  # z_t = (1 - t) x + t noise
    torch.testing.assert_close(alpha, 1 - t, atol=1e-8, rtol=0)
    exploding = exploding_schedule(0.01, 100.0)
    torch.testing.assert_close(exploding.path.scales(exploding.gamma(t))[1], 10 ** (4 * t - 2))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
def test_what_each_prediction_says_of_the_image(name, prediction):
    schedule, objective = SCHEDULES[name](), objective_of(prediction)
    x, noise = torch.randn(2, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    gamma = schedule.gamma(t)
    scales, z_t = schedule.scales(gamma, x), schedule.add_noise(x, noise, gamma)
    torch.testing.assert_close(objective.x0_hat(objective.target(x, noise, scales), z_t, scales), x)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("min_snr_gamma", [None, 5.0])
def test_the_least_loss_on_gaussian_data_is_the_posterior_variance(name, prediction, min_snr_gamma):
    schedule, objective = SCHEDULES[name](), objective_of(prediction, min_snr_gamma=min_snr_gamma)
    generator, time = torch.Generator().manual_seed(0), 0.45
    x = MEAN + STD * torch.randn(64, 4000, dtype=torch.float64, generator=generator)
    t = torch.full((64,), time, dtype=torch.float64)
    found = objective(exact_network(schedule, prediction), schedule, x, Condition(), t=t, generator=generator)
    alpha, sigma, *_ = (float(v) for v in schedule.path.scales(schedule.gamma(t[0])))
    variance = STD**2 * sigma**2 / (alpha**2 * STD**2 + sigma**2)  # of x given z
    per_image = {
        "image": 1,
        "noise": sigma**2 / alpha**2,
        "velocity": sigma**2,
        "preconditioned": variance,  # so that the least loss is 1
    }[prediction]
    weight = 1 if min_snr_gamma is None else per_image * min(alpha**2 / sigma**2, min_snr_gamma)
    assert float(found["unweighted"]) == pytest.approx(variance / per_image, rel=0.02)
    assert float(found["loss"]) == pytest.approx(weight * variance / per_image, rel=0.02)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("sampler", [DDIMSampler, DPMSolverSampler])
def test_deterministic_samplers_end_at_the_closed_form(name, prediction, sampler):
    """Along the ODE (z_t - alpha_t m) / sd(z_t) stays what it is."""
    schedule = SCHEDULES[name]()
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    denoise = objective_of(prediction).denoiser(exact_network(schedule, prediction), schedule, Condition())
    z = sampler(num_steps=1000, spacing="logsnr")(denoise, schedule, noise)
    alpha, sigma, *_ = schedule.path.scales(schedule.gamma(torch.ones((), dtype=torch.float64)))
    start = noise * schedule.path.prior_std(schedule.gamma(torch.ones((), dtype=torch.float64)))
    expected = MEAN + STD * (start - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
    torch.testing.assert_close(z, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_ancestral_samples_have_the_moments_of_the_data(name):
    schedule, generator = SCHEDULES[name](), torch.Generator().manual_seed(0)
    noise = torch.randn(40_000, 1, dtype=torch.float64, generator=generator)
    denoise = DenoisingObjective("velocity").denoiser(
        exact_network(schedule, "velocity"), schedule, Condition()
    )
    z = AncestralSampler(num_steps=1000, spacing="logsnr")(denoise, schedule, noise, generator)
    assert z.mean().item() == pytest.approx(MEAN, abs=4 * STD / math.sqrt(len(z)))
    assert z.std().item() == pytest.approx(STD, rel=0.03)


def test_one_step_along_a_straight_line_is_eulers():
    """DDIM on the straight line is Euler's method for dz / dt = v."""
    schedule = flow_schedule(margin=1e-9)
    denoise = DenoisingObjective("velocity").denoiser(
        exact_network(schedule, "velocity"), schedule, Condition()
    )
    noise = torch.tensor([[1.5]], dtype=torch.float64)
    z, times = noise.clone(), [1.0, 0.75, 0.5, 0.25, 0.0]
    for t, s in zip(times, times[1:], strict=False):
        velocity = (z - denoise(z, torch.tensor([t], dtype=torch.float64))) / max(t, 1e-9)
        z = z + (s - t) * velocity
    grid = DDIMSampler(num_steps=4).time_grid(schedule).times.tolist()
    assert grid == pytest.approx(times[:4], abs=1e-3)
    torch.testing.assert_close(DDIMSampler(num_steps=4)(denoise, schedule, noise), z, atol=1e-5, rtol=0)


def test_the_bound_refuses_a_path_without_its_prior():
    with pytest.raises(ValueError, match="preserves the variance"):
        VariationalObjective().steps(flow_schedule())


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: flow_schedule(margin=0.0), "margin=0.0 must lie in"),
        (lambda: exploding_schedule(2.0, 1.0), "sigma_min=2.0 must be above 0 and below"),
    ],
)
def test_schedules_without_a_level_are_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_logit_normal_times_have_its_quantiles():
    """Antithetic times of n samples are its n quantiles, whatever the shift between them."""
    objective = DenoisingObjective("velocity", density="logit_normal", antithetic=True)
    t = objective.sample_times(10_000, flow_schedule(), generator=torch.Generator().manual_seed(0)).double()
    logits = torch.logit(t).sort().values
    expected = torch.special.ndtri((torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000)
    torch.testing.assert_close(logits[100:-100], expected[100:-100], atol=1e-2, rtol=0)
    with pytest.raises(ValueError, match="density=normal is none of uniform, logit_normal"):
        DenoisingObjective("velocity", density="normal")
