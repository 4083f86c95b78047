"""Group norms, also as a compiler makes few kernels of them."""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.devices import full_precision
from medldm.networks.compiling import LONGEST_ROW, LONGEST_SUM, is_compiling

MOST_AT_ONCE = 16  # parts that are joined before the others, where their number is large
NUM_SUMS = 64 * 132  # sums of a pass over a tensor, which keep all processors of an H200 busy


class GroupNorm(nn.GroupNorm):
    """A group norm whose output has the precision of its input; the kernel sums in float32.

    Autocast alone would run it in float32, which doubles the activations of a 3D autoencoder.
    """

    rounds_weights = True

    def forward(self, x: Tensor, embedding: Tensor | None = None, *, offset: Tensor | None = None) -> Tensor:
        """The norm of x (B, C, *S), times 1 + scale plus shift where an embedding (B, 2 C, 1 ..) has these
        two as its halves. offset: see `group_normed`.
        """
        if is_split(x):
            weights = (self.weight[None], self.bias[None])
            return summed_in_parts(x, self.num_groups, self.eps, weights, offset, embedding=embedding)
        weights = (self.weight.to(x.dtype), self.bias.to(x.dtype))
        h = group_normed(x, self.num_groups, *weights, self.eps, offset=offset)
        return scaled(h, embedding)


def scaled(h: Tensor, embedding: Tensor | None) -> Tensor:
    """h (B, C, *S) times 1 + scale plus shift, the halves of an embedding (B, 2 C, 1 ..)."""
    if embedding is None:
        return h
    scale, shift = embedding.chunk(2, dim=1)
    return h * (1 + scale) + shift


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
        return summed_in_parts(x, num_groups, eps, weights, offset)
    if offset is not None:
        x = x + over(offset, x).to(x.dtype)
    with full_precision(x.device):
        return F.group_norm(x, num_groups, weight, bias, eps)


def is_split(x: Tensor) -> bool:
    """Whether norms of x are taken by `SummedInParts`."""
    return is_compiling() and not x.is_contiguous()


def summed_in_parts(
    x: Tensor,
    num_groups: int,
    eps: float,
    weights: tuple[Tensor | None, Tensor | None] = (None, None),
    offset: Tensor | None = None,
    *,
    maps: Tensor | None = None,
    embedding: Tensor | None = None,
) -> Tensor:
    """`SummedInParts` of x (B, C, *S); embedding: (B, 2 C, 1 ..)."""
    embedding = None if embedding is None else embedding.flatten(1)
    return SummedInParts.apply(x, *weights, offset, maps, embedding, num_groups, eps)


class SummedInParts(torch.autograd.Function):
    """A group norm of x + offset in channels_last, with all that scales and shifts it. Statistics and
    gradients are sums of parts, over whose number a compiler has no say: it makes three or four kernels of
    the norm and four or five of its gradients, where `F.group_norm` becomes up to six and eight. Sums are
    taken in float32 or better.

    n is the norm. With weight and bias, (1, C) each, it becomes a = n weight + bias. With maps (B, 2 C, *S),
    the raw gamma and beta of a SPADE norm, to which weight and bias are added, it becomes a = n (1 + gamma +
    weight) + beta + bias. An embedding (B, 2 C), scale and shift, makes a (1 + scale) + shift of it.
    offset: (1 or B, C). Each of these may be None; bias has to be where weight is, and weight where maps are.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        offset: Tensor | None,
        maps: Tensor | None,
        embedding: Tensor | None,
        num_groups: int,
        eps: float,
    ) -> Tensor:
        of_groups = partial(per_group, num_groups=num_groups)
        var, mean = torch.var_mean(in_parts(x, num_groups), 2, correction=0)  # (B, parts, groups, c)
        mean = mean if offset is None else mean + of_groups(offset)[:, None]
        if mean[0, :, 0].numel() > LONGEST_ROW:
            at_once = math.gcd(mean.shape[1], MOST_AT_ONCE)
            var, mean = pooled(*(v.unflatten(1, (-1, at_once)) for v in (var, mean)), 2)
        var, center = pooled(var, mean, (1, 3))  # (B, groups)
        rstd = torch.rsqrt(var + eps)[..., None]
        ctx.save_for_backward(x, weight, bias, offset, maps, embedding, center, rstd)
        center = center_of_x(center, offset, num_groups)
        h = in_groups(x, num_groups)
        h = (h - over(center, h)) * over(rstd, h)
        if maps is not None:
            gamma, beta = (in_groups(v, num_groups) for v in maps.chunk(2, dim=1))
            h = h * (1 + over(of_groups(weight), h) + gamma) + (over(of_groups(bias), h) + beta)
        elif weight is not None:
            h = h * over(of_groups(weight), h) + over(of_groups(bias), h)
        if embedding is not None:
            scale, shift = (of_groups(v) for v in embedding.chunk(2, dim=1))
            h = h * over(1 + scale, h) + over(shift, h)
        return h.flatten(1, 2).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, offset, maps, embedding, center, rstd = ctx.saved_tensors
        num_groups = rstd.shape[1]
        of_groups = partial(per_group, num_groups=num_groups)
        center = center_of_x(center, offset, num_groups)
        w = None if weight is None else of_groups(weight)  # (1, groups, c)
        widened = None if embedding is None else 1 + of_groups(embedding.chunk(2, dim=1)[0])
        sums = gradient_sums(
            gradient, x, maps, num_groups, of_x=offset is not None, of_beta=embedding is not None
        )
        middle, slope = center[:, None], rstd[:, None]
        of_g, of_gn = sums["g"], (sums["g h"] - sums["g"] * middle) * slope
        # what reaches the norm, and its product with the norm
        along, across = (of_g, of_gn) if w is None else (of_g * w, of_gn * w)
        if maps is not None:
            along = along + of_g + sums["g gamma"]
            across = across + of_gn + (sums["g h gamma"] - sums["g gamma"] * middle) * slope
        of_weight, of_bias, of_embedding, of_offset = of_gn, of_g, None, None
        if widened is not None:
            result = across if maps is None else across + sums["g beta"]
            result = result if bias is None else result + of_groups(bias) * of_g
            halves = (v.sum(1).flatten(1).to(embedding.dtype) for v in (result, of_g))
            of_embedding = torch.cat(list(halves), 1)
            along, across, of_weight, of_bias = (
                v * widened[:, None] for v in (along, across, of_weight, of_bias)
            )
        share = rstd / (x[0].numel() // num_groups)
        of_mean, of_width = (v.sum((1, 3))[..., None] * share for v in (along, across))  # (B, groups, 1)
        of_width = of_width * rstd
        if offset is not None:  # the sum of the gradient of x, from sums that are known
            num_places = x[0, 0].numel() // of_g.shape[1]
            distance = sums["h"] - num_places * middle
            of_offset = along * slope - (distance * of_width[:, None] + num_places * of_mean[:, None])
        out, of_maps = gradients_of_elements(
            gradient, x, maps, w, widened, center=center, rstd=rstd, of_mean=of_mean, of_width=of_width
        )
        of_others = (
            None if given is None else summed_as(given, of)
            for given, of in ((weight, of_weight), (bias, of_bias), (offset, of_offset))
        )
        return out, *of_others, of_maps, of_embedding, None, None


def gradient_sums(
    gradient: Tensor, x: Tensor, maps: Tensor | None, num_groups: int, *, of_x: bool, of_beta: bool
) -> dict[str, Tensor]:
    """Sums over places of products of a norm's gradient g, its input h and its maps, each (B, parts or 1,
    groups, c): over the places of a part or, where there are many parts, over all.
    """
    g, h = (in_parts(v, num_groups) for v in (gradient, x))
    sums = {"g": g.sum(2), "g h": (g * h).sum(2)}
    if of_x:
        sums["h"] = h.sum(2)
    if maps is not None:
        gamma, beta = maps.chunk(2, dim=1)
        gamma = in_parts(gamma, num_groups)
        sums |= {"g gamma": (g * gamma).sum(2), "g h gamma": (g * h * gamma).sum(2)}
        if of_beta:
            sums["g beta"] = (g * in_parts(beta, num_groups)).sum(2)
    if len(x) * sums["g"].shape[1] > LONGEST_SUM:
        totals = torch.stack(list(sums.values())).sum(2, keepdim=True)
        sums = dict(zip(sums, totals.unbind(), strict=True))
    return sums


def gradients_of_elements(
    gradient: Tensor,
    x: Tensor,
    maps: Tensor | None,
    w: Tensor | None,
    widened: Tensor | None,
    *,
    center: Tensor,
    rstd: Tensor,
    of_mean: Tensor,
    of_width: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Those of x and of the maps."""
    num_groups = rstd.shape[1]
    g, h = (in_groups(v, num_groups) for v in (gradient, x))
    if widened is not None:
        g = g * over(widened, g)
    distance, of_maps = h - over(center, h), None
    factor = g if w is None else g * over(w, g)
    if maps is not None:
        gamma = in_groups(maps.chunk(2, dim=1)[0], num_groups)
        factor = factor + g * (1 + gamma)
        halves = (g * distance * over(rstd, g), g)
        of_maps = torch.cat([v.flatten(1, 2).to(maps.dtype) for v in halves], 1)
    out = factor * over(rstd, g) - distance * over(of_width, g) - over(of_mean, g)
    return out.flatten(1, 2).to(x.dtype), of_maps


def pooled(var: Tensor, mean: Tensor, axes: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Variance and mean of parts that are as large as each other, from those of the parts."""
    between, center = torch.var_mean(mean, axes, correction=0)
    return var.mean(axes) + between, center


def center_of_x(center: Tensor, offset: Tensor | None, num_groups: int) -> Tensor:
    """(B, groups, 1 or c), from the center (B, groups) of x + offset."""
    center = center[..., None]
    return center if offset is None else center - per_group(offset, num_groups)


def summed_as(given: Tensor, gradient: Tensor) -> Tensor:
    """A gradient (B, parts, groups, c), summed to the shape of its tensor, (1 or B, C)."""
    axes = (0, 1) if len(given) == 1 else 1
    return gradient.sum(axes).to(given.dtype).view(given.shape)


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
