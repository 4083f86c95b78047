import copy
import math

import pytest
import torch
from torch import nn

from medldm.diffusion.schedule import (
    NoiseSchedule,
    cosine_schedule,
    discrete_times,
    fixed_linear_schedule,
    linear_schedule,
    sqrt_linear_schedule,
)

ENDS = {"beta_start": 0.0015, "beta_end": 0.0195}
SCHEDULES = {
    "linear": lambda: linear_schedule(1000, **ENDS),
    "sqrt_linear": lambda: sqrt_linear_schedule(1000, **ENDS),
    "cosine": lambda: cosine_schedule(500),
    "fixed_linear": lambda: fixed_linear_schedule(-13.3, 5.0),
}


class LearnedScalar(nn.Module):
    """A stand-in for the learned schedules to come."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.b = nn.Parameter(torch.tensor(-18.3)), nn.Parameter(torch.tensor(-13.3))

    def forward(self, t):
        return self.b.to(t.dtype) + self.w.abs().to(t.dtype) * t


@pytest.fixture(params=SCHEDULES)
def schedule(request):
    return SCHEDULES[request.param]()


def alpha_bar(schedule):
    return torch.sigmoid(-schedule.gamma(discrete_times(schedule.num_timesteps)))


def test_gamma_increases_and_is_finite_on_the_closed_interval(schedule):
    gamma = schedule.gamma(torch.linspace(0, 1, 4001, dtype=torch.float64))
    assert gamma.isfinite().all() and (gamma.diff() > 0).all()


def test_signal_and_noise_variances_sum_to_one(schedule):
    like = torch.zeros(11, 2, 3, 4, 5, dtype=torch.float64)
    alpha, sigma, *_ = schedule.scales(schedule.gamma(torch.linspace(0, 1, 11, dtype=torch.float64)), like)
    assert alpha.shape == (11, 1, 1, 1, 1)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha), rtol=0, atol=1e-15)


def test_published_endpoints_of_the_tables():
    sqrt_linear, linear = alpha_bar(SCHEDULES["sqrt_linear"]()), alpha_bar(SCHEDULES["linear"]())
    assert sqrt_linear[-1].item() == pytest.approx(1.42e-4, rel=4e-3)
    assert linear[-1].item() == pytest.approx(2.57e-5, rel=2e-3)
    assert sqrt_linear[0].item() == pytest.approx(1 - 0.0015, abs=1e-15)
    gamma = SCHEDULES["sqrt_linear"]().gamma(discrete_times(1000))
    assert -gamma[0].item() == pytest.approx(6.50, abs=5e-3)
    assert -gamma[-1].item() == pytest.approx(-8.86, abs=5e-3)
    # ALDM's measured table; index i counts from one there.
    assert sqrt_linear[[249, 499, 749]].tolist() == pytest.approx([0.5105, 0.1158, 0.00844], rel=1e-2)


def test_table_equals_the_cumulative_product_of_the_betas():
    betas = torch.linspace(0.0015, 0.0195, 1000, dtype=torch.float64)
    expected = torch.cumprod(1 - betas, 0)
    torch.testing.assert_close(alpha_bar(linear_schedule(1000, **ENDS)), expected, rtol=1e-12, atol=0)


def test_cosine_follows_the_paper_and_clips_the_last_beta():
    got = alpha_bar(cosine_schedule(500))

    def f(t):
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    assert got[249].item() == pytest.approx(f(0.5) / f(0), rel=1e-10)
    assert (1 - got[-1] / got[-2]).item() == pytest.approx(0.9999, rel=1e-9)


def test_fixed_linear_ends_and_derivative():
    schedule = fixed_linear_schedule(-13.3, 5.0)
    t = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert schedule.gamma(t).tolist() == pytest.approx([-13.3, -4.15, 5.0], abs=1e-12)
    assert schedule.gamma_derivative(t).tolist() == pytest.approx([18.3] * 3, abs=1e-12)
    assert schedule.num_timesteps is None


def test_derivative_equals_the_finite_difference(schedule):
    t = torch.tensor([0.0333, 0.2501, 0.6117, 0.9001], dtype=torch.float64)
    step = 1e-7
    expected = (schedule.gamma(t + step) - schedule.gamma(t - step)) / (2 * step)
    torch.testing.assert_close(schedule.gamma_derivative(t), expected, rtol=1e-5, atol=0)


def test_a_learned_curve_gets_gradients_through_gamma_and_its_derivative():
    schedule = NoiseSchedule(LearnedScalar())
    t = torch.rand(5)
    (schedule.gamma(t).sum() + schedule.gamma_derivative(t).sum()).backward()
    assert schedule.curve.b.grad.item() == pytest.approx(5)
    assert schedule.curve.w.grad.item() == pytest.approx(-(t.sum().item() + 5), rel=1e-5)


def test_derivative_works_in_inference_mode(schedule):
    with torch.inference_mode():
        assert (schedule.gamma_derivative(torch.rand(3)) > 0).all()


def test_gamma_at_zero_continues_the_first_interval():
    schedule = sqrt_linear_schedule(1000, **ENDS)
    zero, first, second = schedule.gamma(torch.tensor([0, 0.001, 0.002], dtype=torch.float64)).tolist()
    assert first - zero == pytest.approx(second - first, rel=1e-9)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float"])
def test_casting_the_module_leaves_gamma_untouched(schedule, cast):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    before = schedule.gamma(t)
    schedule = getattr(nn.Sequential(schedule), cast)()[0]
    assert torch.equal(schedule.gamma(t), before)
    assert torch.equal(copy.deepcopy(schedule).gamma(t), before)


def test_to_empty_rebuilds_the_table():
    schedule = cosine_schedule(50)
    before = schedule.gamma(discrete_times(50))
    assert torch.equal(schedule.to("meta").to_empty(device="cpu").gamma(discrete_times(50)), before)


def test_tables_are_not_saved():
    assert not cosine_schedule(50).state_dict()


def test_autocast_and_half_inputs_leave_gamma_in_float32(schedule):
    t = torch.linspace(0, 1, 9, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gamma = schedule.gamma(t)
    assert gamma.dtype == torch.float32
    torch.testing.assert_close(gamma.double(), schedule.gamma(t.double()), rtol=1e-5, atol=1e-5)


def test_add_noise_moments_and_precision(schedule):
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.full((2, 1, 200, 200), 3.0), torch.randn(2, 1, 200, 200, generator=generator)
    t = torch.tensor([0.3, 0.7])
    z = schedule.add_noise(x, noise, schedule.gamma(t))
    gamma = schedule.gamma(t)
    expected_mean = 3 * torch.sigmoid(-gamma).sqrt()
    torch.testing.assert_close(z.mean((1, 2, 3)), expected_mean, rtol=0, atol=0.02)
    torch.testing.assert_close(z.var((1, 2, 3)), torch.sigmoid(gamma), rtol=0.02, atol=0)
    half = schedule.add_noise(x.bfloat16(), noise, schedule.gamma(t))
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), z, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "build",
    [
        lambda: linear_schedule(10, beta_start=0.0, beta_end=0.1),
        lambda: linear_schedule(10, beta_start=0.1, beta_end=1.0),
        lambda: fixed_linear_schedule(5, -13.3),
    ],
)
def test_impossible_endpoints_are_named(build):
    with pytest.raises(ValueError, match="^alpha_bar|^gamma_min|^every beta"):
        build()
