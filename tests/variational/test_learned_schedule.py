import copy

import pytest
import torch
from torch import nn

from medldm.diffusion.condition import Condition
from medldm.diffusion.objective import DenoisingObjective
from medldm.diffusion.schedule import (
    LearnedCurve,
    NoiseSchedule,
    fixed_linear_schedule,
    learned_nnet_schedule,
    learned_scalar_schedule,
)
from medldm.models.common import parameter_groups

BUILDERS = {"learned_scalar": learned_scalar_schedule, "learned_nnet": learned_nnet_schedule}


def network_time(t, schedule):
    return schedule.network_time(t, schedule.gamma(t))


@pytest.fixture(params=BUILDERS)
def build(request):
    return BUILDERS[request.param]


def randomised(schedule, seed=0):
    """The same schedule with wild weights."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in schedule.curve.named_parameters():
        if name not in ("low", "gap"):
            parameter.data = 5 * torch.randn(parameter.shape, generator=generator)
    return schedule


def test_a_learned_schedule_starts_as_the_fixed_one(build):
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    expected = fixed_linear_schedule(-13.3, 5.0).gamma(t)
    torch.testing.assert_close(build(-13.3, 5.0).gamma(t), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("seed", range(3))
def test_gamma_rises_between_its_endpoints_whatever_the_weights(build, seed):
    schedule = randomised(build(-1.0, 5.0), seed)
    t = torch.linspace(0, 1, 2001, dtype=torch.float64)
    gamma = schedule.gamma(t)
    assert (gamma.diff() > 0).all() and (schedule.gamma_derivative(t) > 0).all()
    assert gamma[[0, -1]].tolist() == pytest.approx([-1, 5], abs=1e-6)
    torch.testing.assert_close(torch.sigmoid(gamma) + torch.sigmoid(-gamma), torch.ones_like(gamma))


def test_the_derivative_is_the_finite_difference(build):
    schedule = randomised(build(-13.3, 5.0))
    t = torch.tensor([0.03, 0.25, 0.61, 0.9], dtype=torch.float64)
    expected = (schedule.gamma(t + 1e-7) - schedule.gamma(t - 1e-7)) / 2e-7
    torch.testing.assert_close(schedule.gamma_derivative(t), expected, rtol=1e-5, atol=1e-5)


def test_a_negative_gap_still_rises(build):
    schedule = build(-13.3, 5.0)
    schedule.curve.gap.data.neg_()
    assert (schedule.gamma(torch.linspace(0, 1, 9)).diff() > 0).all()


@pytest.mark.parametrize("endpoints", ["learned", "fixed"])
def test_endpoints_are_parameters_only_where_they_are_learned(build, endpoints):
    names = dict(build(-1.0, 5.0, endpoints=endpoints).curve.named_parameters())
    assert ("low" in names) == ("gap" in names) == (endpoints == "learned")


def test_half_precision_never_reaches_gamma(build):
    schedule = build(-13.3, 5.0)
    t = torch.linspace(0, 1, 33)
    before = schedule.gamma(t)
    for cast in ("half", "bfloat16"):
        assert torch.equal(getattr(nn.Sequential(copy.deepcopy(schedule)), cast)()[0].gamma(t), before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        gamma = schedule.gamma(t.bfloat16())
        assert gamma.dtype == torch.float32 and torch.equal(schedule.gamma(t), before)


def test_no_weight_decay_on_a_schedule():
    class Matrix(LearnedCurve):
        def __init__(self):
            super().__init__(-1, 5)
            self.weight = nn.Parameter(torch.ones(3, 3))

    for schedule in (NoiseSchedule(Matrix()), learned_nnet_schedule(-1, 5)):
        module = nn.ModuleDict({"network": nn.Linear(2, 2), "schedule": schedule})
        groups = parameter_groups([module], 0.1)
        decayed = [p for g in groups if g["weight_decay"] for p in g["params"]]
        assert [id(p) for p in decayed] == [id(module["network"].weight)]
        assert sum(len(g["params"]) for g in groups) == len(list(module.parameters()))


def test_the_network_is_told_the_noise_and_not_the_clock():
    straight = learned_scalar_schedule(-13.3, 5.0)
    t = torch.tensor([0.0, 0.25, 1.0])
    torch.testing.assert_close(network_time(t, straight), 1000 * t, atol=1e-3, rtol=0)
    straight.curve.low.data += 3
    torch.testing.assert_close(network_time(t, straight), 1000 * (t + 3 / 18.3), atol=1e-3, rtol=0)


@pytest.mark.parametrize("prediction", ["noise", "velocity"])
def test_a_denoising_loss_trains_the_interior_and_leaves_the_endpoints(build, prediction):
    schedule = build(-10.0, 5.0)
    network = nn.Conv2d(2, 2, 3, padding=1)
    objective = DenoisingObjective(prediction, antithetic=True)
    losses = objective(lambda z, t, c: network(z), schedule, torch.randn(8, 2, 4, 4), Condition())
    losses["loss"].backward()
    assert schedule.curve.low.grad.item() == pytest.approx(0, abs=1e-6)
    assert schedule.curve.gap.grad.item() == pytest.approx(0, abs=1e-6)
    if schedule.curve.__class__ is not LearnedCurve:
        assert schedule.curve.outer.grad.abs().sum() > 0


def test_a_denoising_loss_does_not_depend_on_the_interior_in_the_mean():
    """Importance sampling: whatever the share of the curve, the loss is the integral over gamma."""
    x = torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    objective = DenoisingObjective("noise", antithetic=True)
    losses = []
    for schedule in (learned_nnet_schedule(-8, 5), randomised(learned_nnet_schedule(-8, 5))):
        generator = torch.Generator().manual_seed(1)
        losses.append(
            float(objective(lambda z, t, c: 0.5 * z, schedule, x, Condition(), generator=generator)["loss"])
        )
    assert losses[0] == pytest.approx(losses[1], rel=0.03)


@pytest.mark.parametrize("options", [{"endpoints": "free"}, {"interior": "none"}])
def test_unknown_options_are_the_users_mistake(options):
    with pytest.raises(ValueError, match="^(gamma_min|endpoints|interior)="):
        learned_nnet_schedule(-1, 5, **options)
    with pytest.raises(ValueError, match="gamma_max"):
        learned_scalar_schedule(5, -1)
