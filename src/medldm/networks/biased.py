"""Activations whose bias is left to the norm that follows, where a compiler makes few kernels of that."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from medldm.devices import full_precision
from medldm.networks.convolution import convolve_as
from medldm.networks.norms import as_summed, over


class Biased(NamedTuple):
    """An activation whose bias has not been added yet. Norms take the bias as their offset. So neither the
    sum is written nor its gradient read for that of the bias.
    """

    value: Tensor  # (B, C, *s)
    offset: Tensor  # (1 or B, C), in float32 or better

    def summed(self) -> Tensor:
        return self.value + over(self.offset.to(self.value.dtype), self.value)


def parted(x: Tensor | Biased) -> tuple[Tensor, Tensor | None]:
    """The value and the offset of an activation."""
    return x if isinstance(x, Biased) else (x, None)


def pointwise(layer: nn.Module, x: Tensor) -> Tensor:
    """A convolution of kernel 1, or the identity.

    Where x is channels_last the convolution is one matrix product: as a 3D convolution it would copy x to the
    other memory layout and back.
    """
    if isinstance(layer, nn.Identity) or x.is_contiguous():
        return layer(x)
    return linear_on_channels(x, layer.weight.flatten(1), layer.bias)


def without_bias(layer: nn.Module, x: Tensor) -> Biased:
    """`layer(x)` of a convolution, before its bias is added."""
    return Biased(convolve_as(layer, x, layer.weight, None), as_summed(layer.bias)[None])


def pointwise_without_bias(layer: nn.Module, x: Tensor, offset: Tensor | None) -> Biased:
    """`pointwise` of x + offset, both of which a convolution of kernel 1 is linear in."""
    if isinstance(layer, nn.Identity):
        return Biased(x, offset)
    weight = layer.weight.flatten(1)
    bias = as_summed(layer.bias)[None]
    if offset is not None:
        with full_precision(x.device):
            bias = bias + F.linear(offset, as_summed(weight))
    value = convolve_as(layer, x, layer.weight, None) if x.is_contiguous() else linear_on_channels(x, weight)
    return Biased(value, bias)


def linear_on_channels(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.linear(x.movedim(1, -1), weight, bias).movedim(-1, 1)
