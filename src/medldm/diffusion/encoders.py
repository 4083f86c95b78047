"""Encoders that bring planes, such as class maps and edges, from the image grid to the latent grid.

Each is built from (in_channels, out_channels, downsampling) and states its `out_channels`. Where it has a
`halo`, that is the number of cells of the latent grid around a cell that its value depends on; without one, a
cell depends on the whole planes.
"""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.batch import spatial_shape
from medldm.diffusion.latent import latent_shape
from medldm.networks.compiling import is_compiling
from medldm.networks.convolution import conv, convolve_as
from medldm.networks.norms import group_norm


class NearestEncoder(nn.Module):
    """Nearest downsampling, then a 1x1 convolution: of f^d pixels it sees one. It is there for comparisons
    with the published code alone, which does so.
    """

    halo = 0

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.downsampling = downsampling
        self.project = conv(len(downsampling), in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, planes: Tensor) -> Tensor:
        return self.project(
            F.interpolate(planes, latent_shape(spatial_shape(planes), self.downsampling), mode="nearest")
        )


class Rescaler(nn.Module):
    """CompVis's SpatialRescaler: linear interpolation by 0.5 per factor of two, then a 1x1 convolution."""

    halo = 0
    is_block = True
    averages = True

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.strides = stage_strides(downsampling)
        self.mode = {2: "bilinear", 3: "trilinear"}[len(downsampling)]
        self.project = conv(len(downsampling), in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, planes: Tensor) -> Tensor:
        for strides in self.strides:
            planes = F.interpolate(
                planes, latent_shape(spatial_shape(planes), strides), mode=self.mode, align_corners=False
            )
        return self.project(planes)


class Unshuffle(nn.Module):
    """The pixels of a latent cell become channels, then a 1x1 convolution. Shi et al. 2016."""

    halo = 0
    is_block = True

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.downsampling = downsampling
        cell = math.prod(downsampling)
        self.project = conv(len(downsampling), in_channels * cell, out_channels, kernel_size=1)

    def forward(self, planes: Tensor) -> Tensor:
        return self.project(unshuffle(planes, self.downsampling))


class SegConv(nn.Module):
    """Med-LSDM's encoder of the map: convolution, ReLU and maximum per factor of two, widths 64, 128, 256 ..,
    and a last convolution and ReLU.

    Convolutions see one slice of a volume (1 x 3 x 3), and every output cell lies over its own block of the
    map. In the published code, padding shifts the depth by a slice for each convolution.
    """

    is_block = True

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.halo = halo_of_convolutions(stage_strides(downsampling[-2:]))
        dims, layers, width = len(downsampling), [], in_channels
        kernel = (1,) * (dims - 2) + (3, 3)
        padding = tuple(size // 2 for size in kernel)
        for stage, strides in enumerate(stage_strides(downsampling)):
            hidden = 64 * 2**stage
            # the maximum and ReLU commute; the maximum first leaves less to compute
            layers += [conv(dims, width, hidden, kernel, padding=padding), MaxPool(dims, strides), nn.ReLU()]
            width = hidden
        layers += [conv(dims, width, out_channels, kernel, padding=padding), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, planes: Tensor) -> Tensor:
        return self.fused(planes) if is_compiling() else self.layers(planes)

    def fused(self, planes: Tensor) -> Tensor:
        """The same, for a compiler: a bias commutes with the maximum, too."""
        x, *layers, last, _ = planes, *self.layers
        for layer, pool in zip(layers[::3], layers[1::3], strict=True):
            x = BlockMaximum.apply(convolve_as(layer, x, layer.weight, None), layer.bias, pool.strides)
        return last(x).relu()


def halo_of_convolutions(strides: list[tuple[int, ...]]) -> int:
    """The number of latent cells around one that convolutions with kernels of 3 see, where one stands before
    each of `strides` and one after the last: each reaches as many pixels as the strides before it have
    merged.
    """
    cells = []
    for axis in zip(*strides, strict=True):
        scales = [math.prod(axis[:stage]) for stage in range(len(axis) + 1)]
        cells.append(math.ceil(sum(scales) / scales[-1]))
    return max(cells)


class MaxPool(nn.Module):
    """The maximum of each block of `strides`. In 3D it is taken within slices and then along depth, by the
    kernels of images, which compilers fuse; the result and its gradients, also of equal values, are those of
    `nn.MaxPool3d`.
    """

    def __init__(self, spatial_dims: int, strides: tuple[int, ...]) -> None:
        super().__init__()
        self.spatial_dims, self.strides = spatial_dims, tuple(strides)

    def forward(self, x: Tensor) -> Tensor:
        if self.spatial_dims == 2:
            return F.max_pool2d(x, self.strides)
        depth, *within = self.strides
        slices = x.transpose(1, 2).flatten(0, 1)  # (B D, C, H, W), a view in channels_last
        x = F.max_pool2d(slices, within).unflatten(0, (len(x), -1)).transpose(1, 2)
        if depth == 1:
            return x
        rows = x.flatten(3)  # (B, C, D, H W)
        return F.max_pool2d(rows, (depth, 1)).unflatten(3, x.shape[3:])


NOWHERE = 255


class BlockMaximum(torch.autograd.Function):
    """ReLU of `MaxPool` of x (B, C, *S) plus a bias (C,), as operations on single elements, which a compiler
    makes one kernel of each pass. The place of each maximum in its block, the first of equal ones, is kept in
    a byte, and `NOWHERE` where ReLU lets nothing through.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, strides: tuple[int, ...]) -> Tensor:
        rows = x.movedim(1, -1)  # (B, *S, C)
        offsets = itertools.product(*map(range, strides))
        parts = [rows[:, *(slice(o, None, s) for o, s in zip(at, strides, strict=True))] for at in offsets]
        best, place = parts[0], torch.zeros_like(parts[0], dtype=torch.uint8)
        for number, part in enumerate(parts[1:], start=1):
            is_larger = (part > best) | part.isnan()
            best, place = torch.where(is_larger, part, best), torch.where(is_larger, number, place)
        best = best + bias
        ctx.save_for_backward(torch.where(best <= 0, NOWHERE, place))
        ctx.strides = strides
        return best.relu().movedim(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        (place,) = ctx.saved_tensors
        rows = gradient.movedim(1, -1)
        of_bias = torch.where(place == NOWHERE, 0, rows).flatten(0, -2).sum(0)
        dims = len(ctx.strides)
        within = (1, *(n for s in ctx.strides for n in (1, s)), 1)  # (B, s1, f1, s2, f2 .., C)
        numbers = torch.arange(math.prod(ctx.strides), device=place.device, dtype=torch.uint8).view(within)
        for axis in range(2, 2 * dims + 1, 2):
            place = place.unsqueeze(axis)
        for axis in range(2, 2 * dims + 1, 2):
            rows = rows.unsqueeze(axis)
        spread = torch.where(place == numbers, rows, 0)
        for axis in range(1, dims + 1):
            spread = spread.flatten(axis, axis + 1)
        return spread.movedim(-1, 1), of_bias, None


class AreaEncoder(nn.Module):
    """The share of every plane in each latent cell: it has no weights and loses no class."""

    halo = 0
    averages = True

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = in_channels
        self.pool = getattr(nn, f"AvgPool{len(downsampling)}d")(downsampling)

    def forward(self, planes: Tensor) -> Tensor:
        return self.pool(planes)


class StridedCNN(nn.Module):
    """Convolutions of stride 2, GroupNorm and SiLU down to the latent grid, widths 32, 64, 128, 128 ...

    It has no `halo`: the group norms take their statistics over the whole image or volume.
    """

    is_block = True

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.out_channels = out_channels
        dims, layers, width = len(downsampling), [], in_channels
        for stage, strides in enumerate(stage_strides(downsampling)):
            hidden = min(32 * 2**stage, 128)
            layers += [
                conv(dims, width, hidden, kernel_size=3, stride=strides, padding=1),
                group_norm(hidden, groups=8),
                nn.SiLU(),
            ]
            width = hidden
        layers.append(conv(dims, width, out_channels, kernel_size=3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, planes: Tensor) -> Tensor:
        return self.layers(planes)


SPATIAL_ENCODERS = {
    "nearest_1x1": NearestEncoder,
    "rescaler": Rescaler,
    "unshuffle": Unshuffle,
    "strided_cnn": StridedCNN,
    "segconv": SegConv,
    "area": AreaEncoder,  # has as many channels as there are planes, whatever is asked for
}


def build_encoder(
    name: str | None, in_channels: int, out_channels: int, downsampling: tuple[int, ...]
) -> nn.Module | None:
    if name is None:
        return None
    if name not in SPATIAL_ENCODERS:
        raise ValueError(f"encoder '{name}' is none of {', '.join(SPATIAL_ENCODERS)}")
    return SPATIAL_ENCODERS[name](in_channels, out_channels, downsampling)


def stage_strides(downsampling: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Strides of one and two whose product is `downsampling`: (1, 4, 8) -> (1, 2, 2), (1, 2, 2),
    (1, 1, 2).
    """
    exponents = [factor.bit_length() - 1 for factor in downsampling]
    if any(factor != 2**exponent for factor, exponent in zip(downsampling, exponents, strict=True)):
        raise ValueError(
            f"downsampling={downsampling} must be powers of two; choose the encoder unshuffle instead"
        )
    return [tuple(2 if stage < e else 1 for e in exponents) for stage in range(max(exponents))]


def unshuffle(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Moves the pixels of each cell into channels: (B, C, *S) -> (B, C prod(f), *S/f), with a factor for each
    axis.
    """
    dims = len(factors)
    cells = [
        size for pair in zip(latent_shape(spatial_shape(x), factors), factors, strict=True) for size in pair
    ]
    x = x.reshape(*x.shape[:2], *cells)  # (B, C, s1, f1, s2, f2 ..)
    grid, within = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return x.permute(0, 1, *within, *grid).flatten(1, 1 + dims)
