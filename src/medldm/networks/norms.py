"""Group norms, also as a compiler makes few kernels of them."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.devices import full_precision
from medldm.networks.compiling import is_compiling

NUM_SUMS = 64 * 132  # sums of a pass over a tensor, which keep all processors of an H200 busy


class GroupNorm(nn.GroupNorm):
    """A group norm whose output has the precision of its input; the kernel sums in float32.

    Autocast alone would run it in float32, which doubles the activations of a 3D autoencoder.
    """

    rounds_weights = True

    def forward(
        self,
        x: Tensor,
        scale: Tensor | None = None,
        shift: Tensor | None = None,
        *,
        offset: Tensor | None = None,
    ) -> Tensor:
        """The norm of x (B, C, *S), times 1 + scale plus shift where these are given, (B, C, 1 ..). offset:
        see `group_normed`.
        """
        weight, bias = self.weight, self.bias
        if scale is not None and is_split(x):  # joins the weights
            scale = 1 + as_summed(scale.flatten(1))
            weights = (weight * scale, bias * scale + shift.flatten(1))
            return SummedInParts.apply(x, *weights, offset, self.num_groups, self.eps)
        weights = (weight.to(x.dtype), bias.to(x.dtype))
        h = group_normed(x, self.num_groups, *weights, self.eps, offset=offset)
        return h if scale is None else h * (1 + scale) + shift


def group_norm(channels: int, *, groups: int = 32, eps: float = 1e-6) -> GroupNorm:
    """A group norm with gcd(groups, channels) groups, so that networks of any width take the same option."""
    return GroupNorm(math.gcd(groups, channels), channels, eps=eps)


def group_normed(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    offset: Tensor | None = None,
) -> Tensor:
    """`F.group_norm` of x (B, C, *S) in the precision of x. weight, bias: (C,), both or neither.

    offset: (1 or B, C), added to x before. Where a compiler follows, its gradient costs no pass over x.
    """
    if is_split(x):
        weights = (None, None) if weight is None else (weight[None], bias[None])
        return SummedInParts.apply(x, *weights, offset, num_groups, eps)
    if offset is not None:
        x = x + over(offset, x).to(x.dtype)
    with full_precision(x.device):
        return F.group_norm(x, num_groups, weight, bias, eps)


def is_split(x: Tensor) -> bool:
    """Whether norms of x are taken by `SummedInParts`."""
    return is_compiling() and not x.is_contiguous()


class SummedInParts(torch.autograd.Function):
    """A group norm of x + offset in channels_last whose statistics are sums of parts, over whose number a
    compiler has no say: it makes three kernels of it and four of its gradients, where `F.group_norm` becomes
    up to six and eight. Sums are taken in float32 or better.

    weight, bias: None, or (1, C), or (B, C) for each sample; so is offset.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        offset: Tensor | None,
        num_groups: int,
        eps: float,
    ) -> Tensor:
        of_groups = partial(per_group, num_groups=num_groups)
        var, mean = torch.var_mean(in_parts(x, num_groups), 2, correction=0)  # (B, parts, groups, c)
        shifted = mean if offset is None else mean + of_groups(offset)[:, None]
        between, center = torch.var_mean(shifted, (1, 3), correction=0)  # (B, groups)
        rstd = torch.rsqrt(var.mean((1, 3)) + between + eps)[..., None]
        center = center[..., None] if offset is None else center[..., None] - of_groups(offset)
        ctx.save_for_backward(x, weight, offset, mean, center, rstd)  # center: of x
        h = in_groups(x, num_groups)
        h = (h - over(center, h)) * over(rstd, h)
        if weight is not None:
            h = h * over(of_groups(weight), h) + over(of_groups(bias), h)
        return h.flatten(1, 2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, offset, mean, center, rstd = ctx.saved_tensors
        num_groups, num_places = rstd.shape[1], x[0, 0].numel()
        g, h = (in_parts(v, num_groups) for v in (gradient, x))
        sums, products = g.sum(2), (g * h).sum(2)  # (B, parts, groups, c)
        products = (products - sums * center[:, None]) * rstd[:, None]
        w = rstd.new_ones(()) if weight is None else per_group(weight, num_groups)
        weighed = w if weight is None else w[:, None]
        of_mean, of_width = (
            (v * weighed).sum((1, 3))[..., None] * rstd / (num_places * mean.shape[3])
            for v in (sums, products)
        )  # (B, groups, 1)
        g, h = (in_groups(v, num_groups) for v in (gradient, x))
        out = g * over(rstd * w, h) - (h - over(center, h)) * over(of_width * rstd, h) - over(of_mean, h)
        out = out.flatten(1, 2).to(x.dtype)
        of_weights = (None, None)
        if weight is not None:
            of_weights = summed_as(weight, products, sums)
        of_offset = None
        if offset is not None:  # the sum of `out`, from sums that are known
            share = num_places / mean.shape[1]
            known = (v[:, None] for v in (rstd * w, center, of_width * rstd, of_mean))
            scale, center, of_width, of_mean = known
            (of_offset,) = summed_as(offset, sums * scale - share * ((mean - center) * of_width + of_mean))
        return out, *of_weights, of_offset, None, None


def summed_as(weight: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
    """Sums of values (B, parts, groups, c) in the shape of a weight (1 or B, C), by one kernel."""
    axes = (1, 2) if len(weight) == 1 else 2
    total = torch.stack(values).sum(axes).to(weight.dtype)
    return total.view(len(values), *weight.shape).unbind()


def per_group(v: Tensor, num_groups: int) -> Tensor:
    """(B, C) -> (B, groups, c)."""
    return as_summed(v).unflatten(1, (num_groups, -1))


def as_summed(x: Tensor) -> Tensor:
    """x in float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def in_groups(x: Tensor, num_groups: int) -> Tensor:
    """(B, C, *S) -> (B, groups, c, *S)."""
    return as_summed(x).unflatten(1, (num_groups, -1))


def in_parts(x: Tensor, num_groups: int) -> Tensor:
    """(B, C, *S) -> (B, parts, S / parts, groups, c)."""
    tokens = x.movedim(1, -1).flatten(1, -2)
    length, needed = tokens.shape[1], math.ceil(NUM_SUMS / (tokens.shape[0] * tokens.shape[2]))
    # where the places do not divide, a compiler has to part them
    parts = next((n for n in range(needed, 4 * needed + 1) if length % n == 0), 1)
    return as_summed(tokens).unflatten(1, (parts, -1)).unflatten(3, (num_groups, -1))


def over(v: Tensor, h: Tensor) -> Tensor:
    """v with axes of 1 at its end for those of h that it lacks."""
    return v.reshape(*v.shape, *(1,) * (h.ndim - v.ndim))
