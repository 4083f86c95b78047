"""Lays out the times at which a sampler evaluates the network, from pure noise down to data."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from medldm.diffusion.schedule import CONTINUOUS_STEPS, NoiseSchedule, interpolated

KARRAS_RHO = 7  # Eq. 5, Karras et al. 2022


class TimeGrid(NamedTuple):
    """The times of a sampler, and the levels of noise there."""

    times: Tensor  # (N,) float64, falling: the times at which the network is evaluated
    gamma: Tensor  # (N + 1,) float64: at these times, and where the last step arrives (-inf is clean data)


SPACINGS = ("leading", "trailing", "linspace", "logsnr", "karras")


def step_positions(num_steps: int, num_timesteps: int, spacing: str) -> list[float]:
    """N falling positions in [0, T - 1]; fractional where N does not divide T.

    leading: 0, T/N, 2T/N .. shifted by one, as CompVis's DDIM does (200 of 1000: 1, 6, .., 996).
    trailing: T - 1, T - 1 - T/N ..: starts at pure noise. linspace: both ends, T - 1 .. 0.
    """
    k = range(num_steps)
    if spacing == "leading":
        offset = 1 if num_steps < num_timesteps else 0
        return [i * num_timesteps / num_steps + offset for i in reversed(k)]
    if spacing == "trailing":
        return [num_timesteps * (1 - i / num_steps) - 1 for i in k]
    return [(num_timesteps - 1) * (1 - i / max(1, num_steps - 1)) for i in k]


def equal_logsnr_times(num_steps: int, schedule: NoiseSchedule, device: torch.device | None) -> Tensor:
    """(N,) float64 falling times from 1 to the first grid point, equally far apart in gamma."""
    total = schedule.num_timesteps or CONTINUOUS_STEPS
    t = torch.linspace(1 / total, 1, 10 * total + 1, dtype=torch.float64, device=device)
    gamma = schedule.gamma(t).double()
    shares = torch.linspace(0, 1, num_steps, dtype=torch.float64, device=device)
    return interpolated(torch.lerp(gamma[-1], gamma[0], shares), gamma, t)


def karras_times(num_steps: int, schedule: NoiseSchedule, device: torch.device | None) -> Tensor:
    """(N,) float64 falling times from 1 to the first grid point, or to 0 on a continuous schedule: equally
    far apart in (sigma / alpha)^(1 / 7). Eq. 5, Karras et al. 2022.
    """
    first = 1 / schedule.num_timesteps if schedule.num_timesteps else 0.0
    ends = torch.tensor([1.0, first], dtype=torch.float64, device=device)
    noisiest, cleanest = (schedule.gamma(ends).double() / (2 * KARRAS_RHO)).exp()
    shares = torch.linspace(0, 1, num_steps, dtype=torch.float64, device=device)
    levels = 2 * KARRAS_RHO * torch.lerp(noisiest, cleanest, shares).log()
    return schedule.times_of(levels).clamp(first, 1)


def stepped_times(num_steps: int, num_timesteps: int | None, spacing: str) -> list[float]:
    """Falling times whose positions on the grid are spaced as `step_positions` has them."""
    total = num_timesteps or max(CONTINUOUS_STEPS, num_steps)
    positions = step_positions(num_steps, total, spacing)
    if num_timesteps is not None and num_steps <= num_timesteps:
        # The network was trained on whole steps alone.
        snap = math.floor if spacing == "leading" else round
        positions = [snap(position) for position in positions]
    return [(position + 1) / total for position in positions]


def spaced_times(
    num_steps: int, schedule: NoiseSchedule, spacing: str, device: torch.device | None
) -> tuple[Tensor, float]:
    """(N,) float64 falling times by any spacing, and the time at which the last step arrives."""
    if spacing == "logsnr":
        return equal_logsnr_times(num_steps, schedule, device), 0.0
    if spacing == "karras":
        return karras_times(num_steps, schedule, device), 0.0
    times = stepped_times(num_steps, schedule.num_timesteps, spacing)
    first = 0.0 if schedule.num_timesteps is None else 1 / schedule.num_timesteps
    last = first if times[-1] > first else 0.0
    return torch.tensor(times, dtype=torch.float64, device=device), last
