"""What the network is trained to predict, and how x0_hat follows from its output.

Samplers and guidance work with x0_hat alone.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.devices import full_precision
from medldm.diffusion.condition import Condition, concatenate
from medldm.diffusion.paths import Scales
from medldm.diffusion.schedule import NoiseSchedule, at_least_float32
from medldm.diffusion.static import Given, StaticCondition, made
from medldm.networks.compiling import Function

Denoise = Callable[[Tensor, Tensor], Tensor]  # (z_t, t) -> x0_hat

PREDICTIONS = ("noise", "image", "velocity", "preconditioned")
ELEMENT_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss}
TIME_KINDS = ("auto", "discrete", "continuous")
DENSITIES = ("uniform", "logit_normal", "log_normal")


def spread_uniform(
    n: int, *, antithetic: bool, device: torch.device | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """(n,) float64 in [0, 1): independent draws, or, `antithetic`, (u + i / n) mod 1 of a single draw u."""
    u = torch.rand(1 if antithetic else n, dtype=torch.float64, device=device, generator=generator)
    # arange(0, 1, 1 / n) has n + 1 entries for some n
    return (u + torch.arange(n, device=device) / n) % 1 if antithetic else u


def on_grid(u: Tensor, num_timesteps: int) -> Tensor:
    """Maps u in [0, 1) to the grid points 1 / T to 1, each equally often; ceil would give t = 0 at u = 0."""
    return ((u * num_timesteps).floor().clamp(max=num_timesteps - 1) + 1) / num_timesteps


class Preconditioning(NamedTuple):
    """x0_hat = skip z_t + out F(in z_t): input and target of F have unit variance where the data have the
    deviation that it was made for. Table 1, Karras et al. 2022, whose z_t = x + sigma noise, on any path.
    """

    skip: Tensor
    out: Tensor
    into: Tensor

    @classmethod
    def at(cls, alpha: Tensor, sigma: Tensor, data_std: float) -> "Preconditioning":
        variance = (alpha * data_std).square() + sigma.square()  # of z_t
        return cls(alpha * data_std**2 / variance, sigma * data_std * variance.rsqrt(), variance.rsqrt())


class Judged(NamedTuple):
    """The losses of a batch, its levels gamma (B,), and a function that gives its x0_hat."""

    losses: dict[str, Tensor]
    gamma: Tensor
    x0_hat: Callable[[], Tensor]


class Noised(NamedTuple):
    """A batch at its levels gamma (B,): what a network sees of it and what it should give."""

    z_t: Tensor
    seen: Tensor  # the network's input
    time: Tensor  # (B,) in [0, 1000)
    target: Tensor
    gamma: Tensor
    scales: Scales


class Errors(NamedTuple):
    """How far a network's output is from its target."""

    weighted: Tensor  # (B,)
    loss: Tensor  # their mean
    unweighted: Tensor  # the mean without weights


class DenoisingObjective(nn.Module):
    """Weighted regression of the noise, the image or the velocity along the schedule's path: alpha noise -
    sigma x where the variance is preserved, noise - x on a straight line. "preconditioned" is the mixture of
    image and noise that EDM learns (`Preconditioning`), for data of the deviation `data_std`.

    `loss` "l1" or "l2" is averaged over all but the batch axis, then weighted per sample. `min_snr_gamma` (5
    in the paper) is the weight of Hang et al. 2023 in the form that belongs to the prediction; None weighs
    all times alike. `times` "discrete" draws from the T grid points of a tabulated schedule, "continuous"
    from the interval, and "auto" from the grid where the schedule has one. `density` says how often each time
    is drawn: "uniform"; "logit_normal", whose logits are standard normal; "log_normal", where log(sigma /
    alpha) is normal of mean `level_mean` and deviation `level_std`, and levels beyond the schedule count as
    its end. `antithetic` spreads the times of a batch evenly, which lowers the variance of the loss.
    """

    def __init__(
        self,
        prediction: str,
        *,
        loss: str = "l2",
        min_snr_gamma: float | None = None,
        times: str = "auto",
        density: str = "uniform",
        antithetic: bool = False,
        data_std: float | None = None,
        level_mean: float | None = None,
        level_std: float | None = None,
    ) -> None:
        super().__init__()
        check_choice("prediction", prediction, PREDICTIONS)
        check_choice("loss", loss, tuple(ELEMENT_LOSSES))
        check_choice("times", times, TIME_KINDS)
        check_choice("density", density, DENSITIES)
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ValueError(f"min_snr_gamma={min_snr_gamma} must be positive, or null for no weight")
        check_given("data_std", data_std, is_read=prediction == "preconditioned")
        check_given("level_std", level_std, is_read=density == "log_normal")
        if (level_mean is None) != (level_std is None):
            raise ValueError(
                f"level_mean={level_mean}: density=log_normal reads level_mean and level_std alone"
            )
        self.prediction, self.data_std = prediction, data_std
        self.level_mean, self.level_std = level_mean, level_std
        self.loss = loss
        self.min_snr_gamma = min_snr_gamma
        self.times, self.density = times, density
        self.antithetic = antithetic
        self.place, self.begin, self.end = map(Function, (self._placed, self._noised, self._errors))

    def check_schedule(self, schedule: NoiseSchedule) -> None:
        """ValueError where this objective cannot train under a schedule."""
        if self.times == "discrete" and schedule.num_timesteps is None:
            raise ValueError("times=discrete needs a schedule with steps; set it to continuous")

    def sample_times(
        self,
        n: int,
        schedule: NoiseSchedule,
        device: torch.device | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """(n,) float32 times on `device`; `generator`, where given, must live there too."""
        if self.times != "continuous":
            self.check_schedule(schedule)
        u = spread_uniform(n, antithetic=self.antithetic, device=device, generator=generator)
        return self.place(u, schedule)

    def _placed(self, u: Tensor, schedule: NoiseSchedule) -> Tensor:
        """float32 times at shares u (float64, in [0, 1)) of the density."""
        if self.density == "logit_normal":
            u = torch.sigmoid(torch.special.ndtri(u))  # the quantiles of Esser et al. 2024, m = 0 and s = 1
        steps = schedule.num_timesteps
        if self.density == "log_normal":
            t = schedule.times_of(2 * (self.level_mean + self.level_std * torch.special.ndtri(u)))
            u = t if steps is None else ((t * steps - 0.5) / steps).clamp(min=0)  # to the nearest grid point
        if self.times == "continuous" or (self.times == "auto" and steps is None):
            # On a table the first interval holds no grid point: DDPM step 0 is t = 1 / T.
            return (u if steps is None else (1 + u * (steps - 1)) / steps).float()
        return on_grid(u, steps).float()

    def target(self, x: Tensor, noise: Tensor, scales: Scales) -> Tensor:
        """The output that the network should give for z_t = alpha x + sigma noise."""
        if self.prediction == "velocity":
            return scales.velocity(x, noise)  # Eq. 11, Salimans & Ho 2022
        if self.prediction == "preconditioned":
            factors = self.preconditioning(scales)
            return (x - factors.skip * scales.mix(x, noise)) / factors.out  # Eq. 8, Karras et al. 2022
        return noise if self.prediction == "noise" else x

    def x0_hat(self, output: Tensor, z_t: Tensor, scales: Scales) -> Tensor:
        """The denoised image that an output of the network stands for, in the precision of `scales`."""
        if self.prediction == "image":
            return output
        if self.prediction == "noise":
            return (z_t - scales.sigma * output) / scales.alpha
        if self.prediction == "preconditioned":
            factors = self.preconditioning(scales)
            return factors.skip * z_t + factors.out * output
        return scales.sigma_slope * z_t - scales.sigma * output

    def preconditioning(self, scales: Scales) -> Preconditioning:
        return Preconditioning.at(scales.alpha, scales.sigma, self.data_std)

    def network_input(self, z_t: Tensor, scales: Scales) -> Tensor:
        """The input of the network: z_t itself, or z_t scaled by the preconditioning."""
        if self.prediction != "preconditioned":
            return z_t
        return (self.preconditioning(scales).into * at_least_float32(z_t)).to(z_t.dtype)

    def weight(self, schedule: NoiseSchedule, gamma: Tensor) -> Tensor:
        """(B,) min-SNR weights: min(SNR, k) for images, over SNR for noise, times sigma^2 for velocities and
        the square of `Preconditioning.out` with preconditioning.
        """
        if self.min_snr_gamma is None:
            return torch.ones_like(gamma)
        if self.prediction == "noise":
            return (self.min_snr_gamma * gamma.exp()).clamp(max=1)
        if self.prediction == "image":
            return (-gamma).exp().clamp(max=self.min_snr_gamma)
        signal, noise = schedule.path.powers(gamma)
        if self.prediction == "preconditioned":
            out = Preconditioning.at(signal.sqrt(), noise.sqrt(), self.data_std).out
            return (-gamma).exp().clamp(max=self.min_snr_gamma) * out.square()
        return torch.minimum(signal, self.min_snr_gamma * noise)

    def forward(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        x: Tensor,
        condition: Condition,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """The losses of clean latents x (B, Cz, *s): "loss" and, detached, "unweighted", without min-SNR
        weights.

        `t` (B,) and `noise` (like x) are drawn where they are not given; fixed ones make a validation loss
        comparable.
        """
        return self.judged(network, schedule, x, condition, t=t, noise=noise, generator=generator).losses

    def judged(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        x: Tensor,
        condition: Condition,
        *,
        t: Tensor | None = None,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Judged:
        """As a call, with what else can be said of the output."""
        x = at_least_float32(x)
        t = self.sample_times(len(x), schedule, x.device, generator) if t is None else t
        noise = standard_normal(x, generator) if noise is None else noise
        levels = schedule.levels(t) if schedule.is_learned else None
        begin, end = (self._noised, self._errors) if schedule.is_learned else (self.begin, self.end)
        noised = begin(schedule, x, noise, t, None if levels is None else levels.gamma)
        output = network(noised.seen, noised.time, condition)
        errors = end(schedule, output, noised.target, noised.gamma)
        loss = errors.loss if levels is None else levels.integral(errors.weighted)
        losses = {"loss": loss, "unweighted": errors.unweighted.detach()}
        x0_hat = partial(self.x0_hat, at_least_float32(output), noised.z_t, noised.scales)
        return Judged(losses, noised.gamma, x0_hat)

    def _noised(
        self, schedule: NoiseSchedule, x: Tensor, noise: Tensor, t: Tensor, gamma: Tensor | None
    ) -> Noised:
        """Clean latents x at times t (B,), whose levels are gamma where that is known."""
        gamma = schedule.gamma(t) if gamma is None else gamma
        z_t, scales = schedule.add_noise(x, noise, gamma), schedule.scales(gamma, x)
        seen, time = self.network_input(z_t, scales), schedule.network_time(t, gamma)
        return Noised(z_t, seen, time, self.target(x, noise, scales), gamma, scales)

    def _errors(self, schedule: NoiseSchedule, output: Tensor, target: Tensor, gamma: Tensor) -> Errors:
        with full_precision(target.device):
            compare = ELEMENT_LOSSES[self.loss]
            error = compare(at_least_float32(output), target, reduction="none").flatten(1).mean(1)  # (B,)
            weighted = self.weight(schedule, gamma) * error
            return Errors(weighted, weighted.mean(), error.mean())

    def denoiser(self, network: nn.Module, schedule: NoiseSchedule, condition: Given) -> Denoise:
        """The function (z_t, t) -> x0_hat, with t (B,) in [0, 1], of the network under one condition, which
        may be given as a function that makes it at the first step.
        """
        static = StaticCondition(network, condition)

        def denoise(z_t: Tensor, t: Tensor) -> Tensor:
            gamma = schedule.gamma(t)
            scales = schedule.scales(gamma, at_least_float32(z_t))
            seen = self.network_input(z_t, scales)
            output = at_least_float32(network(seen, schedule.network_time(t, gamma), static.prepared(z_t)))
            return self.x0_hat(output, at_least_float32(z_t), scales)

        return denoise


def standard_normal(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Noise of the shape, precision and device of `x`."""
    return torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=generator)


def check_given(key: str, value: float | None, *, is_read: bool) -> None:
    """ValueError where a positive number that is read is missing, and where one is given that is not read."""
    if is_read and not (value is not None and value > 0):
        raise ValueError(f"{key}={value} must be a number above 0")
    if not is_read and value is not None:
        raise ValueError(f"{key}={value} has no effect with this prediction and density; leave it out")


def check_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{key}={value} is none of {', '.join(choices)}")


def guided(
    objective: DenoisingObjective,
    network: nn.Module,
    schedule: NoiseSchedule,
    condition: Given,
    null: Given,
    *,
    scale: float,
    rescale: float = 0.0,
) -> Denoise:
    """Classifier-free guidance null + scale (conditional - null). Ho & Salimans 2022.

    Scale 1 is the conditional and 0 the unconditional model, each in a single forward; any other scale runs
    both as one batch of 2B. On x0_hat this is the same as on noise or velocity, which are affine in x0_hat at
    a given z_t. (VDM's w is scale - 1.) `rescale` in [0, 1] pulls the standard deviation of each sample back
    to that of the conditional x0_hat. Section 3.4, Lin et al. 2024.
    """
    if scale == 1:
        return objective.denoiser(network, schedule, condition)
    if scale == 0:
        return objective.denoiser(network, schedule, null)
    denoise_both = objective.denoiser(network, schedule, lambda: concatenate(made(condition), made(null)))

    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        conditional, unconditional = denoise_both(torch.cat([z_t, z_t]), torch.cat([t, t])).chunk(2)
        x0_hat = unconditional + scale * (conditional - unconditional)
        return rescale_to(conditional, x0_hat, rescale) if rescale else x0_hat

    return denoise


def autoguided(
    model: Callable[[Given], Denoise],
    guide: Callable[[Given], Denoise],
    condition: Given,
    guide_condition: Given,
    *,
    scale: float,
    rescale: float = 0.0,
) -> Denoise:
    """Autoguidance, guide + scale (model - guide), which leads away from a worse model. Karras et al. 2024.

    `model` and `guide` each make a denoiser from a condition of their own. Scale 0 is the guide alone.
    `rescale` is that of `guided`.
    """
    denoise_model, denoise_guide = model(condition), guide(guide_condition)
    if scale == 0:
        return denoise_guide

    def denoise(z_t: Tensor, t: Tensor) -> Tensor:
        strong, weak = denoise_model(z_t, t), denoise_guide(z_t, t)
        x0_hat = weak + scale * (strong - weak)
        return rescale_to(strong, x0_hat, rescale) if rescale else x0_hat

    return denoise


def rescale_to(reference: Tensor, x: Tensor, strength: float) -> Tensor:
    """`x` with its per-sample standard deviation moved towards that of `reference`."""
    axes = tuple(range(1, x.ndim))
    ratio = reference.std(axes, keepdim=True) / x.std(axes, keepdim=True).clamp_min(1e-8)
    return x * (1 + strength * (ratio - 1))


def check_clamp(limit: float, percentile: float | None) -> None:
    if limit <= 0 or (percentile is not None and not 0 < percentile <= 1):
        raise ValueError(f"clamp={limit} must be positive and clamp_percentile={percentile} in (0, 1]")


def clamped(denoise: Denoise, *, limit: float, percentile: float | None = None) -> Denoise:
    """Clip x0_hat to [-limit, limit], in normalised latent units (unit-variance latents reach well beyond 1).

    `percentile` in (0, 1) makes it dynamic: a sample whose |x0_hat| exceeds `limit` at that percentile is
    clipped there and scaled back to `limit`. Section 2.3, Saharia et al. 2022.
    """
    check_clamp(limit, percentile)

    def denoise_clamped(z_t: Tensor, t: Tensor) -> Tensor:
        x0_hat = denoise(z_t, t)
        if percentile is None:
            return x0_hat.clamp(-limit, limit)
        magnitudes = x0_hat.flatten(1).abs()
        rank = max(1, math.ceil(percentile * magnitudes.shape[1]))
        bound = magnitudes.kthvalue(rank, dim=1).values.clamp_min(limit)  # quantile() refuses 3D volumes
        bound = bound.reshape((-1,) + (1,) * (x0_hat.ndim - 1))
        return x0_hat.clamp(-bound, bound) * (limit / bound)

    return denoise_clamped
