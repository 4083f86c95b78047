"""Fake CUDA tensors hold no values and refuse to mix with the CPU: what runs on them waits for no GPU."""

import copy

import pytest
import torch
from tests.helpers import stated
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from medldm.diffusion.conditioner import SpatialConditioner
from medldm.diffusion.objective import DenoisingObjective, guided
from medldm.diffusion.sampler import SAMPLERS
from medldm.diffusion.schedule import fixed_linear_schedule, sqrt_linear_schedule

CUDA = torch.device("cuda")


SCHEDULES = {
    True: sqrt_linear_schedule(1000, beta_start=0.0015, beta_end=0.0195),
    False: fixed_linear_schedule(-13.3, 5.0),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*CUDA is not available")


@pytest.fixture(autouse=True)
def fake_tensors():
    with FakeTensorMode():
        yield


class Network(nn.Module):
    def forward(self, z_t, t, condition):
        return 0.1 * z_t + condition.concat.mean(1, keepdim=True)


def parts(is_discrete):
    schedule = SCHEDULES[is_discrete]
    if is_discrete:  # built outside the fake mode, for its checks read values
        schedule = copy.copy(schedule)
        schedule._modules = {"curve": copy.copy(schedule.curve)}
        schedule.curve._buffers = {"table": torch.empty(1001, dtype=torch.float64, device=CUDA)}
    times = "discrete" if is_discrete else "continuous"
    objective = DenoisingObjective("velocity", min_snr_gamma=5.0, times=times, antithetic=True)
    with CUDA:
        conditioner = SpatialConditioner(
            4,
            downsampling=(4, 4),
            drop_edges_prob=0.1,
            drop_all_prob=0.1,
            use_view=True,
            use_slice_position=True,
            known=stated(num_views=2),
            embedding_dim=8,
        )
    batch = {
        "edges": torch.zeros(2, 1, 32, 32, device=CUDA),
        "mask": torch.zeros(2, 1, 32, 32, dtype=torch.int64, device=CUDA),
        "view": torch.zeros(2, dtype=torch.int64, device=CUDA),
        "slice_position": torch.zeros(2, device=CUDA),
    }
    return schedule, objective, conditioner, batch, torch.randn(2, 3, 8, 8, device=CUDA)


@pytest.mark.parametrize("is_discrete", [True, False])
def test_a_training_step_reads_no_value(is_discrete):
    schedule, objective, conditioner, batch, x = parts(is_discrete)
    condition = conditioner(batch, drop=conditioner.sample_drop(2, device=CUDA))
    losses = objective(Network(), schedule, x, condition)
    assert losses["loss"].device == x.device


@pytest.mark.parametrize("is_discrete", [True, False])
@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_guided_sampling_reads_no_value(sampler, is_discrete):
    schedule, objective, conditioner, batch, x = parts(is_discrete)
    null = conditioner(batch, drop=conditioner.drop_groups(2, device=CUDA))
    denoise = guided(objective, Network(), schedule, conditioner(batch), null, scale=2.0, rescale=0.5)
    z = sampler(num_steps=8, clamp=3.0)(denoise, schedule, x)
    assert (z.device, z.shape) == (x.device, x.shape)


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_times_are_laid_out_where_the_schedule_is(sampler):
    """Its table and times of the host do not mix."""
    schedule, *_ = parts(is_discrete=True)
    assert sampler(num_steps=4).time_grid(schedule).times.device.type == "cuda"
