"""The variational bound of a diffusion model, in nats and bits: Kingma et al. 2021 (VDM)."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medldm.devices import full_precision
from medldm.diffusion.condition import Condition
from medldm.diffusion.objective import (
    TIME_KINDS,
    Denoise,
    DenoisingObjective,
    check_choice,
    on_grid,
    spread_uniform,
    standard_normal,
)
from medldm.diffusion.paths import VariancePreserving
from medldm.diffusion.schedule import NoiseSchedule, ScheduleGradient, at_least_float32


class Bound(NamedTuple):
    """The three terms of -log p(x) <= recon + prior + diffusion, each (B,) in nats per sample."""

    recon: Tensor
    prior: Tensor
    diffusion: Tensor

    @property
    def total(self) -> Tensor:
        return self.recon + self.prior + self.diffusion


def sum_dims(x: Tensor) -> Tensor:
    """The sum (B,) over all axes of x (B, ...) but the batch."""
    return x.flatten(1).sum(1)


def bits(nats: Tensor, num_dims: int) -> Tensor:
    """Nats of a sample of `num_dims` dimensions to bits per dimension."""
    return nats / (num_dims * math.log(2))


class VariationalObjective:
    """The bound itself as the loss of a network that predicts the noise. Eq. 11 to 18, Kingma et al. 2021.

    `num_timesteps` T gives the bound of T steps, null that of continuous time. `times` "auto" takes T from
    here or from a schedule that has a grid, "discrete" requires one of them, and "continuous" ignores both.
    `antithetic` spreads the times evenly over the batch: 16 times less variance at a batch of 8, 130 times at
    64, none at 1. The loss is recon + (prior + diffusion) / beta in bits per dimension; the terms are
    reported without beta.
    """

    def __init__(
        self,
        *,
        num_timesteps: int | None = None,
        times: str = "auto",
        antithetic: bool = True,
        beta: float = 1.0,
    ) -> None:
        check_choice("times", times, TIME_KINDS)
        if num_timesteps is not None and num_timesteps < 1:
            raise ValueError(f"num_timesteps={num_timesteps} must be at least 1, or null")
        if num_timesteps is not None and times == "continuous":
            raise ValueError(f"num_timesteps={num_timesteps} has no effect with times=continuous; drop one")
        if beta <= 0:
            raise ValueError(f"beta={beta} must be positive")
        self.num_timesteps, self.times, self.antithetic, self.beta = num_timesteps, times, antithetic, beta
        self.prediction = DenoisingObjective("noise")

    def steps(self, schedule: NoiseSchedule) -> int | None:
        """The number T of steps of the bound, None for continuous time. ValueError as from
        `check_schedule`.
        """
        self.check_schedule(schedule)
        return None if self.times == "continuous" else self.num_timesteps or schedule.num_timesteps

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """ValueError where the bound does not exist under a schedule."""
        if not isinstance(schedule.path, VariancePreserving):
            raise ValueError("the bound's prior needs a schedule whose path preserves the variance")
        if self.times == "discrete" and not (self.num_timesteps or schedule.num_timesteps):
            raise ValueError("times=discrete needs a number of steps; set num_timesteps")

    def sample_times(
        self,
        n: int,
        schedule: NoiseSchedule,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(n,) float64 times in (0, 1]; n counts the global batch, of which each process takes its part."""
        u = spread_uniform(n, antithetic=self.antithetic, device=device, generator=generator)
        return self.place(u, schedule)

    def place(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The times at which this bound is evaluated, of numbers u in [0, 1): on the grid, or u itself."""
        steps = self.steps(schedule)
        return u if steps is None else on_grid(u, steps)

    def diffusion(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        x: Tensor,
        condition: Condition,
        *,
        t: Tensor,
        noise: Tensor,
        steps: int | None,
    ) -> Tensor:
        """(B,) nats: one draw of the diffusion term, at the time t of each sample.

        Eq. 13 of Kingma et al. 2021 for a number of `steps`, Eq. 17 for None.
        """
        x, t = at_least_float32(x), at_least_float32(t)
        by_variance = schedule.is_learned and schedule.curve.interior == "variance"
        gradient = ScheduleGradient(schedule, by_variance=by_variance)
        gamma, slope = gradient.at(t)
        z_t = schedule.add_noise(x, noise, gamma)
        noise_hat = at_least_float32(network(z_t, schedule.network_time(t, gamma), condition))
        with full_precision(x.device):
            if steps is None:
                weight = slope / 2
            else:
                weight = steps / 2 * torch.expm1(gamma - gradient.at((t - 1 / steps).clamp_min(0))[0])
            nats = weight.to(x.dtype) * sum_dims((noise - noise_hat).square())
            gradient.weigh(nats)
        return nats

    def prior(self, schedule: NoiseSchedule, x: Tensor) -> Tensor:
        """(B,) nats: KL of q(z_1 | x) from the standard normal."""
        x = at_least_float32(x)
        gamma = schedule.gamma(x.new_ones(()))
        variance, log_variance = torch.sigmoid(gamma), nn.functional.logsigmoid(gamma)
        return 0.5 * sum_dims(torch.sigmoid(-gamma) * x.square() + variance - log_variance - 1)

    def gaussian_recon(self, schedule: NoiseSchedule, x: Tensor) -> Tensor:
        """(B,) nats: -log N(x; z_0 / alpha_0, exp(gamma_0)), whose mean over z_0 is the same for every x.

        This is the reconstruction term where there is no decoder: the bound is then one on the density of x.
        """
        gamma = schedule.gamma(x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32)))
        return (0.5 * x[0].numel() * (math.log(2 * math.pi) + 1 + gamma)).expand(len(x))

    def decoder_input(self, schedule: NoiseSchedule, x: Tensor, noise: Tensor) -> Tensor:
        """What a decoder sees: z_0 / alpha_0 = x + exp(gamma_0 / 2) noise."""
        x = at_least_float32(x)
        gamma = schedule.gamma(x.new_zeros(()))
        return x + torch.exp(gamma / 2) * noise

    def __call__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        x: Tensor,
        condition: Condition,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        recon: Tensor | None = None,
        num_dims: int | None = None,
    ) -> dict[str, Tensor]:
        """The "loss" of clean latents (B, Cz, *s) and, detached, its terms in bits per dimension and in nats.

        `recon` (B,) are the nats of a decoder and `num_dims` the dimensions of the image behind it. Without
        them the bound is on the density of the latents, per latent dimension (differential: it may be
        negative).
        """
        x = at_least_float32(x)
        t = self.sample_times(len(x), schedule, x.device, generator) if t is None else t
        noise = standard_normal(x, generator) if noise is None else noise
        steps = self.steps(schedule)
        bound = Bound(
            self.gaussian_recon(schedule, x) if recon is None else recon,
            self.prior(schedule, x),
            self.diffusion(network, schedule, x, condition, t=t, noise=noise, steps=steps),
        )
        num_dims = num_dims or x[0].numel()
        loss = bits(bound.recon + (bound.prior + bound.diffusion) / self.beta, num_dims).mean()
        return {"loss": loss} | self.report(bound, num_dims) | self.endpoints(schedule, x)

    @staticmethod
    @torch.no_grad()
    def report(bound: Bound, num_dims: int) -> dict[str, Tensor]:
        terms = {**bound._asdict(), "total": bound.total}
        nats = {f"nats_{name}": term.mean() for name, term in terms.items()}
        in_bits = {f"bpd_{name}": bits(term.mean(), num_dims) for name, term in terms.items()}
        return {**in_bits, **nats}

    @staticmethod
    @torch.no_grad()
    def endpoints(schedule: NoiseSchedule, x: Tensor) -> dict[str, Tensor]:
        """gamma and the variance at both ends, which are logged of learned schedules."""
        low, high = schedule.gamma(torch.linspace(0, 1, 2, device=x.device)).unbind()
        variances = {"var_0": torch.sigmoid(low), "var_1": torch.sigmoid(high)}
        return {"gamma_0": low, "gamma_1": high, **variances}

    @torch.no_grad()
    def exact(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        x: Tensor,
        condition: Condition,
        *,
        num_timesteps: int | None = None,
        recon: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Bound:
        """The discrete bound with all its T terms, i = 1 .. T, each with fresh noise (or `noise` for all).

        `num_timesteps` defaults to the objective's own T, 1000 in continuous time.
        """
        steps = num_timesteps or self.steps(schedule) or 1000
        x = at_least_float32(x)
        total = x.new_zeros(len(x))
        for i in range(1, steps + 1):
            t = torch.full((len(x),), i / steps, dtype=torch.float64, device=x.device)
            drawn = standard_normal(x, generator) if noise is None else noise
            total += self.diffusion(network, schedule, x, condition, t=t, noise=drawn, steps=steps) / steps
        recon = self.gaussian_recon(schedule, x) if recon is None else recon
        return Bound(recon, self.prior(schedule, x), total)

    def denoiser(self, network: nn.Module, schedule: NoiseSchedule, condition: Condition) -> Denoise:
        """The function (z_t, t) -> x0_hat, with t (B,) in [0, 1], of the network under one condition."""
        return self.prediction.denoiser(network, schedule, condition)


@dataclass(frozen=True)
class ImageTerms:
    """The errors of Medical VDM between the image that a decoder expects and the one observed, both in [0,
    1]: the squared error, and the `gradient_difference` with `gradient_power` and `gradient_is_signed`.
    """

    mse_weight: float = 0.0
    gradient_weight: float = 0.0
    gradient_power: float = 1.0
    gradient_is_signed: bool = False

    def __call__(self, loss: Tensor, x_hat: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Both errors of images (B, C, *S) in [-1, 1], and the "loss" with them; {} where both
        weights are 0.
        """
        if not (self.mse_weight or self.gradient_weight):
            return {}
        x_hat, x = (x_hat + 1) / 2, (x.float() + 1) / 2
        mse = (x_hat - x).square().mean()
        gradient = gradient_difference(x_hat, x, power=self.gradient_power, signed=self.gradient_is_signed)
        loss = loss + self.mse_weight * mse + self.gradient_weight * gradient
        return {"loss": loss, "mse": mse, "gradient": gradient}


def gradient_difference(x_hat: Tensor, x: Tensor, *, power: float = 1.0, signed: bool = False) -> Tensor:
    """The mean error of forward differences along every axis of (B, C, *S), Medical VDM's "differential
    loss".

    | |d x| - |d x_hat| |^power, or with `signed` |d x - d x_hat|^power, which keeps the direction of an edge.
    """
    total = x.new_zeros(())
    for axis in range(2, x.ndim):
        d_hat, d = x_hat.diff(dim=axis), x.diff(dim=axis)
        gap = d - d_hat if signed else d.abs() - d_hat.abs()
        total = total + gap.abs().pow(power).mean()
    return total
