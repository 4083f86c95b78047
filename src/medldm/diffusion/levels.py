"""The noise levels of a batch, and how a learned schedule learns from the losses there."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medldm.devices import full_precision
from medldm.ranks import mean_over_ranks


def at_least_float32(t: Tensor) -> Tensor:
    return t.to(torch.promote_types(t.dtype, torch.float32))


@dataclass(frozen=True)
class Levels:
    """gamma (B,) at the times of a batch and, for a learned schedule, how densely it draws there: `slope` is
    d gamma / dt, and `gap` the mean of that over all times.
    """

    gamma: Tensor
    slope: Tensor | None = None
    gap: Tensor | None = None
    gradient: "ScheduleGradient | None" = None

    def integral(self, losses: Tensor) -> Tensor:
        """The mean over times of losses (B,) at these levels, from which a learned schedule learns."""
        if self.gradient is not None:
            losses = losses * self.slope / self.gap
            self.gradient.weigh(losses)
        return losses.mean()


class ScheduleGradient:
    """gamma and its derivative at some times, through which the curve between the end points learns to lower
    the variance of an estimator.

    The gradient that a loss L_i sends into the share of a learned curve is multiplied by L_i / mean(L), which
    turns the gradient of the mean into that of the mean square: the variance, since the mean does not depend
    on the share. Section I.2, Kingma et al. 2021. mean(L) is that of the global batch: N processes compute
    the gradient of one with N times the batch. With `moves_endpoints` False the end points get
    gradients of zero.
    """

    def __init__(self, schedule: Any, *, by_variance: bool, moves_endpoints: bool = True) -> None:
        self.schedule, self.by_variance, self.moves_endpoints = schedule, by_variance, moves_endpoints
        self.factors: Tensor | None = None
        self.is_awaited = False  # True once a gradient needs the factors

    def at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """gamma and d gamma / dt at (B,) times."""
        t = at_least_float32(t)
        with full_precision(t.device):
            values = torch.func.jvp(self.schedule.gamma, (t,), (torch.ones_like(t),))
        if not (self.by_variance and torch.is_grad_enabled()):
            return values
        gamma, slope = (
            self.rescaled(value, frozen)
            for value, frozen in zip(values, self.schedule.frozen_interior(t), strict=True)
        )
        return gamma, slope

    def rescaled(self, value: Tensor, frozen: Tensor) -> Tensor:
        interior = value - frozen  # its value is zero, and its gradient that of the share alone
        if interior.requires_grad:
            self.is_awaited = True
            interior.register_hook(lambda gradient: gradient * self.factors.to(gradient))
        return (frozen if self.moves_endpoints else frozen.detach()) + interior

    def weigh(self, losses: Tensor) -> None:
        """Takes the losses (B,), before the backward pass.

        Ranks exchange them in training alone: in validation they may have different numbers of batches.
        """
        if self.is_awaited:
            losses = losses.detach()
            self.factors = losses / mean_over_ranks(losses.mean()).clamp_min(1e-12)
