"""Samplers, which lead from noise to clean latents: one loop, over coefficients that are computed before it
starts.

Every step is z <- a z_t + b x0_hat + c x0_hat_previous + d noise, with a, b, c, d functions of gamma and of
the scales of the schedule's path. Nothing here assumes that the path preserves the variance.
"""

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medldm.devices import full_precision
from medldm.diffusion.condition import Conditioner
from medldm.diffusion.objective import Denoise, check_clamp, clamped
from medldm.diffusion.paths import VARIANCE_PRESERVING, Path, Scales
from medldm.diffusion.schedule import NoiseSchedule, at_least_float32
from medldm.diffusion.timegrid import SPACINGS, TimeGrid, spaced_times

MAX_STEPS = 100_000  # a hundred times what any published sampler takes; grids of times stay small
Callback = Callable[[int, Tensor], None]  # called with (steps done, x0_hat), for progress bars and previews
# One for the batch, or one for each sample, which then does not depend on the batch that it is drawn in.
Generators = torch.Generator | Sequence[torch.Generator] | None


class Coefficients(NamedTuple):
    """(N,) float64 factors of each step; None where a sampler never has that term."""

    z: Tensor
    x0: Tensor
    x0_previous: Tensor | None = None
    noise: Tensor | None = None


@dataclass(kw_only=True)
class Sampler:
    """The loop and the options that all samplers share. A subclass gives its coefficients.

    `num_steps` network evaluations at times laid out by `spacing`: leading, trailing or linspace
    (`step_positions`; whole steps of a discrete schedule, 1000 unrounded ones of a continuous one), logsnr
    (equal steps in gamma) or karras (equal steps in the seventh root of sigma / alpha). `clean_last_step`
    ends by returning the last x0_hat; without it the result is z at the first grid point (or t = 0), noise
    included and not divided by alpha, as CompVis's DDIM does.
    `guidance_scale` (1 is off; null + scale (conditional - null)) and `guidance_rescale` are read by whoever
    builds the guided denoiser; a null that training never saw is refused (`check_guidance`) unless
    `untrained_null`, as Med-LSDM was published. `clamp` clips x0_hat to +-clamp in normalised latent units,
    dynamically with `clamp_percentile`.
    """

    num_steps: int
    spacing: str = "trailing"
    clean_last_step: bool = True
    guidance_scale: float = 1.0
    guidance_rescale: float = 0.0
    clamp: float | None = None
    clamp_percentile: float | None = None
    untrained_null: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= MAX_STEPS:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1 and at most {MAX_STEPS:,}")
        if self.spacing not in SPACINGS:
            raise ValueError(f"spacing={self.spacing} is none of {', '.join(SPACINGS)}")
        if self.clamp is None and self.clamp_percentile is not None:
            raise ValueError(
                f"clamp_percentile={self.clamp_percentile} has no effect without clamp; set that too"
            )
        if self.clamp is not None:
            check_clamp(self.clamp, self.clamp_percentile)
        if not 0 <= self.guidance_rescale <= 1:
            raise ValueError(f"guidance_rescale={self.guidance_rescale} must lie in [0, 1]")
        if self.guidance_rescale and self.guidance_scale in (0, 1):
            raise ValueError(
                f"guidance_rescale={self.guidance_rescale} has no effect with "
                f"guidance_scale={self.guidance_scale}; set it to 0"
            )

    def coefficients(self, gamma: Tensor, path: Path = VARIANCE_PRESERVING) -> Coefficients:
        """The coefficients of the N steps between N + 1 gammas, which fall, to -inf where the last step
        arrives at clean data, along a path.
        """
        raise NotImplementedError

    @torch.no_grad()
    def time_grid(self, schedule: NoiseSchedule, device: torch.device | None = None) -> TimeGrid:
        """The times at which the network is evaluated. The host does not wait for the device."""
        return self.laid_out(self.num_steps, schedule, device)

    def laid_out(self, num_steps: int, schedule: NoiseSchedule, device: torch.device | None) -> TimeGrid:
        """A grid of `num_steps` steps with one evaluation at the beginning of each, by default on the
        schedule's device.
        """
        device = schedule.device if device is None else device
        times, last = spaced_times(num_steps, schedule, self.spacing, device)
        gamma = schedule.gamma(torch.cat([times, times.new_full((1,), last)]))
        if self.clean_last_step:
            gamma = torch.cat([gamma[:-1], torch.full_like(gamma[-1:], -torch.inf)])
        return TimeGrid(times, gamma.double())

    def first_step(self, schedule: NoiseSchedule, t: float) -> int:
        """The first step of the loop whose time is at most `t`; the last one where none is."""
        times = self.time_grid(schedule).times
        return min(int((times > t + 1e-9).sum()), self.num_steps - 1)

    @torch.no_grad()
    def __call__(
        self,
        denoise: Denoise,
        schedule: NoiseSchedule,
        noise: Tensor,
        generator: Generators = None,
        callback: Callback | None = None,
        *,
        first: int | None = None,
    ) -> Tensor:
        """Sample z0 from standard normal `noise` (B, Cz, *s), 2D or 3D, of the same shape, device and
        precision.

        Where `first` is given, the loop starts at that step (`first_step`) and `noise` is z_t at its time.
        The last step is computed in float32, because no later one would smooth its rounding errors.
        """
        grid = self.time_grid(schedule, noise.device)
        a, b, c, d = self.coefficients(grid.gamma, schedule.path)
        if self.clamp is not None:
            denoise = clamped(denoise, limit=self.clamp, percentile=self.clamp_percentile)
        z, x0_previous = at_least_float32(noise), None
        if first is None:
            z = z * schedule.path.prior_std(grid.gamma[0])
        for k in range(first or 0, self.num_steps):
            with full_precision(z.device) if k == self.num_steps - 1 else nullcontext():
                x0_hat = denoise(z, grid.times[k].expand(len(z))).to(z.dtype)
            z = a[k] * z + b[k] * x0_hat
            if c is not None and x0_previous is not None:
                z = z + c[k] * x0_previous
            if d is not None:
                z = z + d[k] * draw_noise(z, generator)
            x0_previous = x0_hat
            if callback is not None:
                callback(k + 1, x0_hat)
        return z.to(noise.dtype)


def draw_noise(z: Tensor, generator: Generators) -> Tensor:
    """Standard normal numbers of the shape of `z` (B, ...), row by row where each sample has its own
    generator.
    """
    if generator is None or isinstance(generator, torch.Generator):
        return torch.randn(z.shape, dtype=z.dtype, device=z.device, generator=generator)
    if len(generator) != len(z):
        raise ValueError(f"{len(generator)} generators for {len(z)} samples")
    return torch.stack(
        [torch.randn(z.shape[1:], dtype=z.dtype, device=z.device, generator=g) for g in generator]
    )


@dataclass(kw_only=True)
class AncestralSampler(Sampler):
    """Draws from q(z_s | z_t, x0_hat): VDM's ancestral sampler, and DDPM's with the small posterior variance.

    Where there are fewer steps than the schedule has, the posterior is that of the longer interval.
    """

    def coefficients(self, gamma: Tensor, path: Path = VARIANCE_PRESERVING) -> Coefficients:
        alpha, sigma, *_ = path.scales(gamma)
        alpha_t, sigma_t, alpha_s, sigma_s = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
        c = -torch.expm1(gamma[1:] - gamma[:-1])  # sigma_{t|s}^2 / sigma_t^2; Appendix A, Kingma et al. 2021
        return Coefficients(
            z=alpha_t / alpha_s * (sigma_s / sigma_t) ** 2,
            x0=alpha_s * c,
            noise=sigma_s * c.sqrt(),
        )


@dataclass(kw_only=True)
class DDIMSampler(Sampler):
    """Song et al. 2021: `eta` = 0 is deterministic, `eta` = 1 is ancestral sampling."""

    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eta(self.eta)

    def coefficients(self, gamma: Tensor, path: Path = VARIANCE_PRESERVING) -> Coefficients:
        alpha, sigma, *_ = path.scales(gamma)
        alpha_t, sigma_t, alpha_s, sigma_s = alpha[:-1], sigma[:-1], alpha[1:], sigma[1:]
        c = -torch.expm1(gamma[1:] - gamma[:-1])
        # share of noise_hat = (z - alpha_t x0_hat) / sigma_t
        kept = sigma_s * (1 - self.eta**2 * c).sqrt() / sigma_t
        return Coefficients(
            z=kept,
            x0=alpha_s - alpha_t * kept,
            noise=self.eta * sigma_s * c.sqrt() if self.eta else None,
        )


@dataclass(kw_only=True)
class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M): second-order multistep in lambda = -gamma / 2. Algorithm 2, Lu et al. 2022.

    `eta` = 1 is its stochastic form (their SDE-DPM-Solver++(2M)): the noise added on the way makes it forget
    errors of the network, which the deterministic path (`eta` = 0) carries to the end. The first step has no
    step before it and is of first order. So is the last one where it ends at clean data (lambda = inf) or
    where there are fewer than 15 steps, since it would be unstable otherwise. Equal steps in log SNR suit it
    best: on Gaussian data of deviation 0.5, 20 steps of the sqrt-linear schedule give 0.503, trailing ones
    0.429.
    """

    spacing: str = "logsnr"
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_eta(self.eta)

    def coefficients(self, gamma: Tensor, path: Path = VARIANCE_PRESERVING) -> Coefficients:
        alpha, sigma, *_ = path.scales(gamma)
        h = (gamma[:-1] - gamma[1:]) / 2  # the steps in lambda, which are positive
        gain = -alpha[1:] * torch.expm1(-(1 + self.eta) * h)
        extrapolation = torch.zeros_like(h)  # 1 / (2 r), r = h_previous / h
        extrapolation[1:] = h[1:] / (2 * h[:-1])
        if self.clean_last_step or self.num_steps < 15:
            extrapolation[-1] = 0
        kept, noise = sigma[1:] / sigma[:-1], None
        if self.eta:
            kept = kept * torch.exp(-self.eta * h)
            noise = sigma[1:] * (-torch.expm1(-2 * self.eta * h)).sqrt()
        return Coefficients(
            z=kept, x0=gain * (1 + extrapolation), x0_previous=-gain * extrapolation, noise=noise
        )


@dataclass(kw_only=True)
class EulerSampler(Sampler):
    """Euler's method along the path: z_t is carried to the next level by the velocity at this one.

    It is exact for a constant x0_hat, and on every path it is DDIM without noise.
    """

    def coefficients(self, gamma: Tensor, path: Path = VARIANCE_PRESERVING) -> Coefficients:
        alpha, sigma, *_ = path.scales(gamma)
        kept = sigma[1:] / sigma[:-1]
        return Coefficients(z=kept, x0=alpha[1:] - alpha[:-1] * kept)


@dataclass(kw_only=True)
class HeunSampler(Sampler):
    """Heun's second-order method: an Euler step to the next time, and there a second evaluation by which the
    step is made again with the mean velocity. Algorithm 1, Karras et al. 2022, on their path.

    A step takes two of the `num_steps` evaluations. The last step has one, as in that paper, since there is
    no velocity at clean data; where `num_steps` is even, the first step has one, too. So 1 and 2 evaluations
    are Euler's method, and 2 N - 1 are N steps.
    """

    @property
    def num_single(self) -> int:
        """The number of steps with one evaluation before the first pair."""
        return (self.num_steps + 1) % 2

    def time_grid(self, schedule: NoiseSchedule, device: torch.device | None = None) -> TimeGrid:
        base = self.laid_out(self.num_steps // 2 + 1, schedule, device)
        first, rest = base.times.tensor_split((self.num_single + 1,))
        second = self.second_times(base.times[self.num_single :], schedule)
        times = torch.cat([first, torch.stack([second, rest], dim=1).flatten()])
        return TimeGrid(times, torch.cat([schedule.gamma(times).double(), base.gamma[-1:]]))

    def second_times(self, times: Tensor, schedule: NoiseSchedule) -> Tensor:
        """The times of the second evaluations of the n steps between falling `times` (n + 1,)."""
        return times[1:]

    def first_step(self, schedule: NoiseSchedule, t: float) -> int:
        """As of `Sampler`, but never the second evaluation of a pair."""
        step = super().first_step(schedule, t)
        return step + max(0, step - self.num_single) % 2

    def coefficients(self, gamma: Tensor, path: Path = VARIANCE_PRESERVING) -> Coefficients:
        """A pair evaluates the network at the beginning t of a step and at m, and the step ends at s. For a
        constant x0_hat z_s = C(t, s) z_t + S(t, s) v_t with S(t, s) = alpha_t sigma_s - alpha_s sigma_t; here
        the velocity is v_t + (v_m - v_t) / (2 c) with c = S(t, m) / S(t, s), written in z_m and the two
        x0_hat.
        """
        euler = EulerSampler(num_steps=self.num_steps).coefficients(gamma, path)
        if self.num_steps < 3:
            return euler
        scales, begin, end = path.scales(gamma), self.num_single, self.num_steps
        t, m, s = (Scales(*(v[begin + i : end - 2 + i : 2] for v in scales)) for i in range(3))
        moved = (t.alpha * s.sigma - s.alpha * t.sigma).square() / (t.alpha * m.sigma - m.alpha * t.sigma)
        gain = -moved * (m.alpha * t.sigma_slope - m.sigma * t.alpha_slope) / (2 * m.sigma)
        z, x0, x0_previous = euler.z.clone(), euler.x0.clone(), torch.zeros_like(euler.z)
        second = slice(begin + 1, end - 1, 2)
        z[second], x0[second] = s.sigma / m.sigma, gain
        x0_previous[second] = s.alpha - s.sigma * m.alpha / m.sigma - gain
        return Coefficients(z=z, x0=x0, x0_previous=x0_previous)


@dataclass(kw_only=True)
class MidpointSampler(HeunSampler):
    """The midpoint method: the second evaluation is in the middle of the step, and its velocity makes the
    whole step. Where time is not the path's own parameter, the two velocities are weighed as in Algorithm 3
    of Karras et al. 2022, so that it is second order there, too.
    """

    def second_times(self, times: Tensor, schedule: NoiseSchedule) -> Tensor:
        middle = (times[1:] + times[:-1]) / 2
        total = schedule.num_timesteps
        if total is None or self.spacing in ("logsnr", "karras") or self.num_steps > total:
            return middle
        return (middle * total + 1e-6).floor() / total  # the network was trained on whole steps


def check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]")


def check_guidance(
    sampler: Sampler, conditioner: Conditioner, drop: tuple[str, ...] = (), *, has_guide: bool = False
) -> None:
    """ValueError where `guidance_scale` has no effect, or guides away from a null that training never saw.

    `drop` are the conditions that are withheld from the sample. With a guide, another model takes the place
    of the null.
    """
    if has_guide:
        if sampler.guidance_scale == 1:
            raise ValueError("guidance_scale=1: the guide has no effect; set it to 2, for instance")
        return
    if sampler.guidance_scale == 1:
        return
    stated = f"guidance_scale={sampler.guidance_scale:g}"
    if not conditioner.groups:
        raise ValueError(f"{stated}: the model has no condition to guide by; set it to 1")
    if sampler.guidance_scale and set(conditioner.groups) == set(drop):
        raise ValueError(f"{stated}: drop leaves no condition to guide by; set it to 1")
    if not (conditioner.trains_null or sampler.untrained_null):
        raise ValueError(
            f"{stated}: training never dropped all conditions at once, so there is no null to guide from; "
            "set it to 1, or train with a conditioner of drop_all_prob=0.1"
        )


SAMPLERS = {
    "ancestral": AncestralSampler,
    "ddim": DDIMSampler,
    "dpm_solver": DPMSolverSampler,
    "euler": EulerSampler,
    "heun": HeunSampler,
    "midpoint": MidpointSampler,
}


def override_sampler(sampler: Sampler, given: dict[str, Any]) -> Sampler:
    """The checkpoint's sampler with the fields that the user gave, or another kind of sampler. ValueError for
    an unknown kind or field, and for a value that makes no sense.
    """
    kind = given.pop("kind")
    changes = {key: value for key, value in given.items() if value is not None}
    if kind is not None and kind not in SAMPLERS:
        raise ValueError(f"kind={kind} is none of {', '.join(SAMPLERS)}")
    chosen = SAMPLERS[kind] if kind else type(sampler)
    fields = {field.name for field in dataclasses.fields(chosen)}
    unknown = set(changes) - fields
    if unknown:
        name = min(unknown)
        raise ValueError(
            f"{name}={changes[name]}: {chosen.__name__} has no such option; it has {', '.join(fields)}"
        )
    kept = {key: value for key, value in dataclasses.asdict(sampler).items() if key in fields}
    if chosen is not type(sampler):
        kept.pop("spacing", None)
    return chosen(**(kept | changes))
