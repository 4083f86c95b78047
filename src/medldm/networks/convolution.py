"""Convolutions of any number of dimensions; those of volumes see slices as images where that is the same, and
what a CPU's bf16 kernels get wrong is computed in float32.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from medldm.devices import asks_onednn, full_precision, trusts_bf16_convolutions

FEW_PLACES = 64  # of the result, below which oneDNN's copy of the weights costs more than its kernel saves


def keeps_slices_apart(layer: nn.Conv3d | nn.ConvTranspose3d) -> bool:
    """Whether kernel and stride are 1 along depth, without padding there or borders of another kind. A kernel
    of 1 along all axes gains nothing.
    """
    along_depth = (layer.kernel_size[0], layer.stride[0], layer.padding[0])
    return along_depth == (1, 1, 0) and layer.padding_mode == "zeros" and max(layer.kernel_size) > 1


def is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous()


def on_slices(
    convolve: Callable[..., Tensor],
    layer: nn.Conv3d | nn.ConvTranspose3d,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """`layer` with these weights as `convolve`, a convolution of images, on the slices of x (B, C, D, H, W)
    in channels_last_3d. All changes of shape are views.
    """
    slices = x.transpose(1, 2).flatten(0, 1)  # (B D, C, H, W)
    out = convolve(slices, weight.squeeze(2), bias, stride=layer.stride[1:], padding=layer.padding[1:])
    return out.unflatten(0, (len(x), -1)).transpose(1, 2)


def is_mistrusted(layer: nn.Module, x: Tensor, weight: Tensor) -> bool:
    """Whether this convolution would be computed in bf16 where that is not to be trusted: along depth, and of
    planes that are one pixel high or wide, where some rows of a kernel see borders alone.
    """
    if trusts_bf16_convolutions(x.device):
        return False
    if layer.kernel_size[:-2] in ((), (1,)) and min(x.shape[-2:]) > 1:
        return False
    kind = x.device.type
    used = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    return used == torch.bfloat16


def from_rounded(convolve: Callable[..., Tensor], *operands: Tensor | None) -> Tensor:
    """A convolution of operands rounded to bf16, summed in float32, as a GPU computes it."""
    with full_precision(operands[0].device):
        return convolve(*(v if v is None else v.bfloat16().float() for v in operands)).bfloat16()


def is_left_to_slow_kernel(layer: nn.Conv3d, x: Tensor) -> bool:
    """Whether a CPU would convolve this single volume by torch's own kernel. Where gradients are recorded it
    may: losses of seeded trainings stay as they were. Tensors without values, of a trace, are left alone.
    """
    if isinstance(x, FakeTensor):
        return False
    if len(x) > 1 or layer.groups > 1 or max(layer.kernel_size) == 1 or layer.padding_mode != "zeros":
        return False
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
        return False
    return asks_onednn(x) and x[0, 0].numel() > FEW_PLACES * math.prod(layer.stride)


class Conv2d(nn.Conv2d):
    """`nn.Conv2d`, in float32 where bf16 is not to be trusted."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_mistrusted(self, x, weight):
            return from_rounded(super()._conv_forward, x, weight, bias)
        return super()._conv_forward(x, weight, bias)


class ConvTranspose2d(nn.ConvTranspose2d):
    """`nn.ConvTranspose2d`, in float32 where bf16 is not to be trusted."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = transposed(self, F.conv_transpose2d)
        if is_mistrusted(self, x, weight):
            return from_rounded(convolve, x, weight, bias)
        return convolve(x, weight, bias)


class Conv3d(nn.Conv3d):
    """`nn.Conv3d`. With a kernel of 1 along depth and in channels_last_3d, it runs as a convolution of images
    with the slices in the batch, for which devices have faster kernels. In the other memory layout this would
    take copies. A single small volume is convolved by oneDNN where gradients are not recorded.
    """

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if is_mistrusted(self, x, weight):
            return from_rounded(super()._conv_forward, x, weight, bias)
        if keeps_slices_apart(self) and is_channels_last(x):
            return on_slices(partial(F.conv2d, groups=self.groups), self, x, weight, bias)
        if is_left_to_slow_kernel(self, x):
            sizes = (self.padding, self.stride, self.dilation)
            return torch.mkldnn_convolution(x, weight, bias, *sizes, self.groups)
        return super()._conv_forward(x, weight, bias)


class ConvTranspose3d(nn.ConvTranspose3d):
    """`nn.ConvTranspose3d`, which runs on slices like `Conv3d`."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight, self.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        convolve = transposed(self, F.conv_transpose3d)
        if is_mistrusted(self, x, weight):
            return from_rounded(convolve, x, weight, bias)
        if keeps_slices_apart(self) and is_channels_last(x):
            return on_slices(F.conv_transpose2d, self, x, weight, bias)
        return convolve(x, weight, bias)


def transposed(
    layer: nn.ConvTranspose2d | nn.ConvTranspose3d, convolve: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """`convolve`, a transposed convolution, with the sizes of `layer`."""
    sizes = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}
    return partial(convolve, output_padding=layer.output_padding, groups=layer.groups, **sizes)


def convolve_as(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output of a `layer` that `conv` made, for x, with other weights in the place of its own."""
    return layer._conv_forward(x, weight, bias)


def conv(spatial_dims: int, *args, **kwargs) -> nn.Module:
    """`nn.Conv{spatial_dims}d`, as above."""
    return {2: Conv2d, 3: Conv3d}[spatial_dims](*args, **kwargs)


def conv_transpose(spatial_dims: int, *args, **kwargs) -> nn.Module:
    """`nn.ConvTranspose{spatial_dims}d`, as above."""
    return {2: ConvTranspose2d, 3: ConvTranspose3d}[spatial_dims](*args, **kwargs)


OF_TORCH = {
    nn.Conv2d: Conv2d, nn.ConvTranspose2d: ConvTranspose2d,
    nn.Conv3d: Conv3d, nn.ConvTranspose3d: ConvTranspose3d,
}  # fmt: skip


def adopt_convolutions(network: nn.Module) -> nn.Module:
    """A network of another library, whose convolutions become those of this module, in place: the same
    parameters under the same names.
    """
    for layer in network.modules():
        layer.__class__ = OF_TORCH.get(type(layer), type(layer))
    return network
