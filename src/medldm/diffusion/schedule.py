"""Noise schedules, all as gamma(t) = -log SNR(t), which increases on t in [0, 1]. Kingma et al. 2021.

The path of a schedule says how signal and noise are mixed at a level gamma: see `medldm.diffusion.paths`.
"""

import math

import torch
from torch import Tensor, nn

from medldm.batch import expand_as
from medldm.devices import full_precision
from medldm.diffusion.levels import Levels, ScheduleGradient, at_least_float32
from medldm.diffusion.paths import VARIANCE_PRESERVING, LinearInterpolation, Path, Scales, VarianceExploding

CONTINUOUS_STEPS = 1000  # a continuous schedule is tabulated as if it had this many


class NoiseSchedule(nn.Module):
    """A curve gamma(t), the path along which signal becomes noise, and what follows from them.

    `curve` maps float32 or float64 times in [0, 1] to gamma in the same precision and may hold parameters (a
    `LearnedCurve`). `num_timesteps` is the number T of grid points t_i = (i + 1) / T of a discrete
    schedule, i = 0 .. T - 1, and None for a continuous one. Nothing here copies between host and device.
    """

    def __init__(
        self, curve: nn.Module, *, num_timesteps: int | None = None, path: Path = VARIANCE_PRESERVING
    ) -> None:
        super().__init__()
        self.curve, self.num_timesteps, self.path = curve, num_timesteps, path

    def gamma(self, t: Tensor) -> Tensor:
        """-log SNR at times of any shape, in float32 or, for float64 times, float64: also under autocast."""
        # At gamma = -13.3, sigma^2 is 1.7e-6: half precision turns it into 0 and 1 - sigma^2 into 1.
        with full_precision(t.device):
            return self.curve(at_least_float32(t))

    def gamma_derivative(self, t: Tensor) -> Tensor:
        """d gamma / dt, positive; differentiable in the parameters of the curve."""
        t = at_least_float32(t)
        return torch.func.jvp(self.gamma, (t,), (torch.ones_like(t),))[1]

    @torch.no_grad()
    def times_of(self, gamma: Tensor) -> Tensor:
        """The times in [0, 1] at which the levels `gamma` (N,) are reached, in their precision. They are
        exact where the curve has an inverse or is a table, and interpolated otherwise. Levels outside of the
        curve give its ends.
        """
        if hasattr(self.curve, "inverse"):
            return self.curve.inverse(gamma).clamp(0, 1)
        total = self.num_timesteps or CONTINUOUS_STEPS
        t = torch.linspace(0, 1, total + 1, dtype=torch.float64, device=gamma.device)
        return interpolated(gamma.double(), self.gamma(t).double(), t).clamp(0, 1).to(gamma.dtype)

    @property
    def device(self) -> torch.device | None:
        """The device of its tensors; None where it has none."""
        return next((x.device for x in (*self.parameters(), *self.buffers())), None)

    @property
    def is_learned(self) -> bool:
        return isinstance(self.curve, LearnedCurve)

    def frozen_interior(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and d gamma / dt of a learned curve, differentiable in its end points alone."""
        t = at_least_float32(t)
        with full_precision(t.device), torch.no_grad():
            share, slope = torch.func.jvp(self.curve.share, (t,), (torch.ones_like(t),))
        low, gap = self.curve.endpoints(t.dtype)
        return low + gap * share, gap * slope

    def scales(self, gamma: Tensor, like: Tensor) -> Scales:
        """alpha, sigma and their derivatives at gammas (B,) or scalar, broadcastable over `like` and in its
        precision.
        """
        return Scales(*(expand_as(v, like).to(like.dtype) for v in self.path.scales(gamma)))

    def add_noise(self, x: Tensor, noise: Tensor, gamma: Tensor) -> Tensor:
        """z_t = alpha x + sigma noise at gammas (B,) or scalar, computed in at least float32, returned in the
        precision of `x`.
        """
        return self.scales(gamma, at_least_float32(x)).mix(x, noise).to(x.dtype)

    def network_time(self, t: Tensor, gamma: Tensor) -> Tensor:
        """The float32 time in [0, 1000) that a network is given at t, where the level is `gamma`.

        Continuous schedule: 1000 t. Discrete schedule: 1000 t - 1000 / T, so that step i is passed as
        i * 1000 / T; for T = 1000 these are the integers of every published checkpoint. Times before the
        grid count as step 0. Learned schedule: a fixed linear map of gamma, so that the network is told the
        level of noise and not a time whose level changes in training; a straight line gives 1000 t again.
        """
        if self.is_learned:
            return self.curve.network_time(gamma).float()
        first = 0 if self.num_timesteps is None else 1000 / self.num_timesteps
        return (1000 * at_least_float32(t) - first).clamp(min=0).float()

    def levels(self, t: Tensor) -> Levels:
        """The levels at (B,) times for a loss that is a mean over times.

        On a learned schedule the mean is the integral over gamma that a straight line would give: the curve
        between the end points is an importance sampler, which learns to lower the variance, and the end
        points do not move. Kingma & Gao 2023.
        """
        if not self.is_learned:
            return Levels(self.gamma(t))
        gradient = ScheduleGradient(self, by_variance=True, moves_endpoints=False)
        gamma, slope = gradient.at(t)
        return Levels(gamma, slope, self.curve.endpoints(slope.dtype)[1].detach(), gradient)


def interpolated(x: Tensor, table: Tensor, values: Tensor) -> Tensor:
    """The `values` where the rising `table` is `x`, with linear interpolation between its entries."""
    right = torch.searchsorted(table, x).clamp(1, len(table) - 1)
    share = (x - table[right - 1]) / (table[right] - table[right - 1])
    return torch.lerp(values[right - 1], values[right], share)


def discrete_times(num_timesteps: int, device: torch.device | None = None) -> Tensor:
    """The float64 grid t_i = (i + 1) / T; entry i is DDPM step i."""
    return torch.arange(1, num_timesteps + 1, dtype=torch.float64, device=device) / num_timesteps


class TabulatedGamma(nn.Module):
    """gamma on the grid t_i = (i + 1) / T, linear in between and, from the first two entries, down to t = 0.

    `alpha_bar`: float64 (T,), strictly decreasing in (0, 1). The table follows `.to(device)`, but not casts
    to another precision. It is not saved in checkpoints, because the config rebuilds it.
    """

    def __init__(self, alpha_bar: Tensor) -> None:
        super().__init__()
        if (
            alpha_bar.numel() < 2
            or not alpha_bar[0] < 1
            or not alpha_bar[-1] > 0
            or alpha_bar.diff().max() >= 0
        ):
            raise ValueError("alpha_bar must fall from below 1 to above 0; mend the endpoints")
        gamma = torch.log1p(-alpha_bar.double()) - torch.log(alpha_bar.double())
        first = 2 * gamma[0] - gamma[1]  # gamma(0): finite, and the slope of the first interval
        self._values = torch.cat([first[None], gamma]).tolist()
        self.register_buffer("table", torch.tensor(self._values, dtype=torch.float64), persistent=False)

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # `.half()`, `.to(bfloat16)` and `.to_empty()` would otherwise round or lose the table for good.
        self.table = torch.tensor(self._values, dtype=torch.float64, device=self.table.device)
        return self

    def forward(self, t: Tensor) -> Tensor:
        num_intervals = self.table.shape[0] - 1
        position = t * num_intervals
        left = position.detach().floor().clamp(0, num_intervals - 1)
        index = left.long()
        low, high = self.table[index].to(t.dtype), self.table[index + 1].to(t.dtype)
        return torch.lerp(low, high, position - left)


class LinearGamma(nn.Module):
    """gamma(t) = gamma_min + (gamma_max - gamma_min) t."""

    def __init__(self, gamma_min: float, gamma_max: float) -> None:
        super().__init__()
        if not gamma_min < gamma_max:
            raise ValueError(f"gamma_min={gamma_min} must be below gamma_max={gamma_max}: gamma is -log SNR")
        self.gamma_min, self.gamma_max = float(gamma_min), float(gamma_max)

    def forward(self, t: Tensor) -> Tensor:
        return self.gamma_min + (self.gamma_max - self.gamma_min) * t

    def inverse(self, gamma: Tensor) -> Tensor:
        return (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min)


class InterpolationGamma(nn.Module):
    """gamma(t) = 2 log(t / (1 - t)): noise over signal is t over 1 - t. `margin` keeps both ends finite."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        if not 0 < margin < 0.5:
            raise ValueError(f"margin={margin} must lie in (0, 0.5)")
        self.margin = margin

    def forward(self, t: Tensor) -> Tensor:
        return 2 * torch.logit(self.margin + (1 - 2 * self.margin) * t)

    def inverse(self, gamma: Tensor) -> Tensor:
        return (torch.sigmoid(gamma / 2) - self.margin) / (1 - 2 * self.margin)


INTERIORS = ("variance", "bound")


class LearnedCurve(nn.Module):
    """gamma(t) = low + |gap| share(t), where the share rises from 0 at t = 0 to 1 at t = 1; here it is t
    itself.

    `endpoints` "learned" trains low = gamma(0) and gap = gamma(1) - gamma(0), "fixed" keeps both. The
    continuous bound depends on a schedule through these two alone; the share between them decides the
    variance of its estimator. So `interior` "variance" trains the share to lower that variance and "bound"
    trains it on the bound itself, which matters with few discrete steps. Sections 5.1 and I.2, Kingma et al.
    2021. A denoising objective, which is no bound, never moves the end points. `gamma_min` and `gamma_max`
    are where the end points start and, for good, the range by which the network's time is normalised.
    """

    def __init__(
        self, gamma_min: float, gamma_max: float, *, endpoints: str = "learned", interior: str = "variance"
    ) -> None:
        super().__init__()
        if not gamma_min < gamma_max:
            raise ValueError(f"gamma_min={gamma_min} must be below gamma_max={gamma_max}: gamma is -log SNR")
        if endpoints not in ("learned", "fixed"):
            raise ValueError(f"endpoints={endpoints} is none of learned, fixed")
        if interior not in INTERIORS:
            raise ValueError(f"interior={interior} is none of {', '.join(INTERIORS)}")
        self.gamma_min, self.gamma_max, self.interior = float(gamma_min), float(gamma_max), interior
        low, gap = torch.tensor(self.gamma_min), torch.tensor(self.gamma_max - self.gamma_min)
        if endpoints == "learned":
            self.low, self.gap = nn.Parameter(low), nn.Parameter(gap)
        else:
            self.register_buffer("low", low)
            self.register_buffer("gap", gap)

    def _apply(self, fn, recurse: bool = True):
        def at_full_precision(x: Tensor) -> Tensor:
            # `.half()` and `.to(bfloat16)` would round gamma for good.
            y = fn(x)
            return y if y.dtype in (torch.float32, torch.float64) else x.to(y.device)

        return super()._apply(at_full_precision, recurse)

    def endpoints(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """gamma(0) and gamma(1) - gamma(0)."""
        return self.low.to(dtype), self.gap.abs().to(dtype)

    def share(self, t: Tensor) -> Tensor:
        return t

    def forward(self, t: Tensor) -> Tensor:
        low, gap = self.endpoints(t.dtype)
        return low + gap * self.share(t)

    def network_time(self, gamma: Tensor) -> Tensor:
        """0 at `gamma_min` and 1000 at `gamma_max`, linear in gamma, so that it does not change in
        training.
        """
        return 1000 * (gamma - self.gamma_min) / (self.gamma_max - self.gamma_min)


class MonotoneCurve(LearnedCurve):
    """A curve whose share is a monotone network, scaled to [0, 1].

    Before scaling it is |w1| t + mean_j |w3_j| (2 sigmoid(|w2_j| (2 t - 1) + b_j) - 1).
    Section H, Kingma et al. 2021, in the normalised form, so that the end points cannot drift with the
    weights.
    """

    def __init__(self, gamma_min: float, gamma_max: float, *, num_features: int = 1024, **options) -> None:
        super().__init__(gamma_min, gamma_max, **options)
        # Initialised as published, with a deviation of 0.01: within 1e-4 a straight line.
        generator = torch.Generator().manual_seed(0)
        self.linear = nn.Parameter(torch.ones(()))
        self.inner = nn.Parameter(0.01 * torch.randn(num_features, generator=generator))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.outer = nn.Parameter(0.01 * torch.randn(num_features, generator=generator))

    def rise(self, t: Tensor) -> Tensor:
        w1, w2, b, w3 = (p.to(t.dtype) for p in (self.linear, self.inner, self.bias, self.outer))
        features = 2 * torch.sigmoid(w2.abs() * (2 * t[..., None] - 1) + b) - 1  # (..., num_features)
        return w1.abs() * t + (features * w3.abs()).mean(-1)

    def share(self, t: Tensor) -> Tensor:
        first, last = self.rise(torch.zeros_like(t)), self.rise(torch.ones_like(t))
        return (self.rise(t) - first) / (last - first)


def tabulated(betas: Tensor) -> NoiseSchedule:
    """A DDPM schedule from its betas (T,) in (0, 1), float64."""
    if not 0 < betas.min() <= betas.max() < 1:
        raise ValueError("every beta must lie in (0, 1); mend beta_start and beta_end")
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    return NoiseSchedule(TabulatedGamma(alpha_bar), num_timesteps=len(betas))


def linear_schedule(num_timesteps: int, *, beta_start: float, beta_end: float) -> NoiseSchedule:
    """Betas that are linear in the step. Ho et al. 2020. What CompVis calls linear is
    `sqrt_linear_schedule`.
    """
    return tabulated(torch.linspace(beta_start, beta_end, num_timesteps, dtype=torch.float64))


def sqrt_linear_schedule(num_timesteps: int, *, beta_start: float, beta_end: float) -> NoiseSchedule:
    """Betas whose square roots are linear in the step. Rombach et al. 2022.

    CompVis calls it "linear", diffusers "scaled_linear".
    """
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64)
    return tabulated(roots**2)


def cosine_schedule(num_timesteps: int, *, offset: float = 0.008, max_beta: float = 0.9999) -> NoiseSchedule:
    """alpha_bar as cos^2 over a quarter turn, with betas clipped at `max_beta`. Eq. 17, Nichol & Dhariwal
    2021.
    """
    t = torch.linspace(0, 1, num_timesteps + 1, dtype=torch.float64)
    alpha_bar = torch.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return tabulated((1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=max_beta))


def fixed_linear_schedule(gamma_min: float, gamma_max: float) -> NoiseSchedule:
    """A continuous schedule whose log SNR falls linearly from -gamma_min to -gamma_max. Kingma et
    al. 2021.
    """
    return NoiseSchedule(LinearGamma(gamma_min, gamma_max))


def flow_schedule(*, margin: float = 1e-4) -> NoiseSchedule:
    """A continuous schedule with sigma = t along the straight line from data to noise, for t in [margin, 1 -
    margin].

    Rectified flow, Liu et al. 2022. Pair it with velocity prediction: the network then learns noise - x.
    """
    return NoiseSchedule(InterpolationGamma(margin), path=LinearInterpolation())


def exploding_schedule(sigma_min: float, sigma_max: float) -> NoiseSchedule:
    """A continuous schedule of z_t = x + sigma noise, with log sigma linear in t. Song et al. 2021."""
    if not 0 < sigma_min < sigma_max:
        raise ValueError(f"sigma_min={sigma_min} must be above 0 and below sigma_max={sigma_max}")
    curve = LinearGamma(2 * math.log(sigma_min), 2 * math.log(sigma_max))
    return NoiseSchedule(curve, path=VarianceExploding())


def learned_scalar_schedule(
    gamma_min: float, gamma_max: float, *, endpoints: str = "learned"
) -> NoiseSchedule:
    """A continuous schedule, linear in log SNR between learned end points. Kingma et al. 2021."""
    return NoiseSchedule(LearnedCurve(gamma_min, gamma_max, endpoints=endpoints))


def learned_nnet_schedule(
    gamma_min: float,
    gamma_max: float,
    *,
    endpoints: str = "learned",
    interior: str = "variance",
    num_features: int = 1024,
) -> NoiseSchedule:
    """A continuous schedule that is a monotone network between two end points: see `MonotoneCurve` and
    `LearnedCurve`.
    """
    curve = MonotoneCurve(
        gamma_min, gamma_max, endpoints=endpoints, interior=interior, num_features=num_features
    )
    return NoiseSchedule(curve)
