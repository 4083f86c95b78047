"""Volumes seen as stacks of axial slices: what 2D networks and 2D SSIM are given."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn

from medldm.data.raw.grids import body_axis
from medldm.metrics.image import ImageFunction

PIECE_ELEMENTS = 2**20  # 16 slices of 256 x 256


def axial_axis(facts: Mapping, attributes: Mapping) -> int:
    """The spatial axis along which axial slices lie: from the orientation that the data were prepared in,
    from the affine of a NIfTI file, else the first.
    """
    return body_axis(orientation_of(facts, attributes))


def orientation_of(facts: Mapping, attributes: Mapping) -> str:
    """The orientation of the prepared data, else that of a NIfTI file's affine, else SPL."""
    code = (facts.get("preprocess") or {}).get("orientation")
    affine = attributes.get("affine")
    if code is None and affine is not None:
        from nibabel import aff2axcodes

        code = "".join(aff2axcodes(np.asarray(affine, float).reshape(4, 4)))
    return code or "SPL"


def fold(x: Tensor, axis: int) -> Tensor:
    """(B, C, *S) -> (B * n, C, H, W): the n slices of every volume along `axis`."""
    return x.movedim(axis + 2, 1).flatten(0, 1)


def by_pieces(function: Callable[..., Tensor], *stacks: Tensor) -> Tensor:
    """A `function` of stacks (N, C, H, W), applied to a few slices at a time: the maps that a network makes
    of all of them would be many times the volume.
    """
    num = max(1, PIECE_ELEMENTS // stacks[0][0].numel())
    return torch.cat([function(*part) for part in zip(*(s.split(num) for s in stacks), strict=True)])


def slicewise(function: ImageFunction, axis: int) -> ImageFunction:
    """The mean over the slices of every volume of a function of 2D images."""

    def mean_over_slices(generated: Tensor, reference: Tensor) -> Tensor:
        values = by_pieces(function, fold(generated, axis), fold(reference, axis))
        return values.double().view(len(generated), -1).mean(1)

    return mean_over_slices


class SliceFeatures(nn.Module):
    """Features of `num_slices` axial slices of every volume, evenly spread: (B, C, *S) -> (B, n, D)."""

    def __init__(self, network: nn.Module, axis: int, num_slices: int) -> None:
        super().__init__()
        self.network, self.axis, self.num_slices = network, axis, num_slices
        self.sha256, self.num_features = network.sha256, network.num_features

    def forward(self, x: Tensor) -> Tensor:
        depth = x.shape[self.axis + 2]
        index = torch.linspace(0, depth - 1, self.num_slices, device=x.device).round().long()
        slices = fold(x.index_select(self.axis + 2, index), self.axis)
        return by_pieces(self.network, slices).view(len(x), self.num_slices, -1)
