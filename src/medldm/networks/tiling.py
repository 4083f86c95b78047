"""Encoding and decoding of volumes that do not fit into memory, with the result of doing it at once.

Every operation runs over tiles, which are cut with as many cells around them as its kernel sees. Norms use
the statistics of the whole volume: tiles with statistics of their own, blended where they overlap, are off by
tens of percent. The output of an operation waits on `store`, so that a device holds one tile at a time, and
only the borders of tiles are computed more than once.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.batch import one_hot
from medldm.networks.autoencoder import VQAutoencoder
from medldm.networks.layers import AttentionBlock, Downsample, ResBlock, Upsample, per_axis, pointwise
from medldm.networks.spade import SPADE

TileBox = tuple[tuple[int, int], ...]  # (start, stop) per axis


def boxes(shape: Sequence[int], tile: Sequence[int]) -> Iterator[TileBox]:
    """Tiles that cover `shape` without overlap."""
    axes = [[(a, min(a + t, n)) for a in range(0, n, t)] for n, t in zip(shape, tile, strict=True)]
    return itertools.product(*axes)


def cut(x: Tensor, box: TileBox) -> Tensor:
    """The cells of x (..., *S) that lie in a box."""
    return x[(..., *(slice(a, b) for a, b in box))]


def grown(box: TileBox, halo: int, shape: Sequence[int], multiple: Sequence[int]) -> TileBox:
    """`box` with `halo` cells around it, within `shape`; along each axis it starts at a multiple of
    `multiple`.
    """
    return tuple(
        (max(0, a - halo) // m * m, min(n, b + halo))
        for (a, b), n, m in zip(box, shape, multiple, strict=True)
    )


def as_planes(x: Tensor, num_planes: int | None) -> Tensor:
    """A class map of integers (B, 1, *S) as one-hot planes; anything else as it is."""
    return x if x.is_floating_point() else one_hot(x, num_planes)


class Affine(NamedTuple):
    """A norm with the statistics of a whole volume: x * scale + shift."""

    scale: Tensor  # (B, C, 1, ..)
    shift: Tensor


def whole_norm(norm: nn.Module, x: Tensor) -> Affine:
    """The norm of a stored volume x (B, C, *S), with its own weights. Statistics are summed slice by slice in
    float64.
    """
    is_spade = isinstance(norm, SPADE)
    groups = (norm.num_groups or x.shape[1]) if is_spade else norm.num_groups
    sums = torch.zeros(2, len(x), groups, dtype=torch.float64)
    for part in x.unbind(2):
        grouped = part.double().reshape(len(x), groups, -1)
        sums += torch.stack([grouped.sum(2), grouped.square().sum(2)]).cpu()
    mean, square = sums / (x[0].numel() // groups)
    rstd = (square - mean.square()).clamp_min(0).add(1e-5 if is_spade else norm.eps).rsqrt()
    mean, rstd = (v.repeat_interleave(x.shape[1] // groups, dim=1) for v in (mean, rstd))  # (B, C)
    if not is_spade:
        rstd = rstd * norm.weight.detach().double().cpu()
    shift = -mean * rstd if is_spade else norm.bias.detach().double().cpu() - mean * rstd
    return Affine(*(v.reshape(v.shape + (1,) * (x.ndim - 2)).float() for v in (rstd, shift)))


class TiledAutoencoder:
    """`encode` and `decode` of an autoencoder in eval mode, in tiles.

    Class maps may be given as integers (B, 1, *S): they become one-hot planes tile by tile, which for 37
    classes of 304 x 512 x 512 saves 11 GiB.

    tile: cells of a tile along each axis, at every resolution; a number or one per axis.
    store: the device on which volumes wait between operations; "cpu" leaves a GPU to the tiles.
    """

    def __init__(
        self, autoencoder: VQAutoencoder, tile: int | Sequence[int], *, store: torch.device | str = "cpu"
    ) -> None:
        self.autoencoder, self.store = autoencoder, torch.device(store)
        self.tile = per_axis(tile, autoencoder.spatial_dims)
        self.device = autoencoder.head.weight.device

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """Images (B, C, *S), or the class map of an autoencoder of maps -> (B, Cz, *S/f) on the store,
        neither quantised nor normalised.

        Raises ValueError where S does not divide by the autoencoder's downsampling.
        """
        net = self.autoencoder
        net.check_size(x)
        h = self.run(lambda part: net.first(as_planes(part, net.image_channels)), [x.to(self.store)], halo=1)
        h = self.stack(net.encoder, h, None)
        norm = whole_norm(net.encoder_norm, h)

        def finish(part: Tensor, box: TileBox) -> Tensor:
            return net.latent(self.activated(net.encoder_norm, norm, part, None, box))

        return self.run(finish, [h], halo=net.latent_halo, sees_box=True)

    @torch.no_grad()
    def decode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """A quantised latent (B, Cz, *S/f), and the class map, or its one-hot planes (B, K, *S), where the
        decoder has SPADE norms -> (B, C, *S) on the store.
        """
        net = self.autoencoder
        mask = None if mask is None else mask.to(self.store)
        h = self.run(
            lambda part: net.from_latent(net.post_quantizer(part)), [z.to(self.store)], halo=net.latent_halo
        )
        if net.decoder_entry_norm is not None:
            h = self.norm_and(net.decoder_entry_norm, nn.Identity(), h, mask, halo=0)
        h = self.stack(net.decoder, h, mask)
        last = net.last
        if net.decoder_norm is not None:
            return self.norm_and(net.decoder_norm, last, h, mask, halo=1)
        return self.run(last, [h], halo=1)

    def stack(self, blocks: Sequence[nn.Module], h: Tensor, mask: Tensor | None) -> Tensor:
        """Blocks in a row on a stored h."""
        for block in blocks:
            if isinstance(block, ResBlock):
                h = self.res_block(block, h, mask)
            elif isinstance(block, AttentionBlock):
                h = block(h.to(self.device)).to(self.store)  # every position sees every other
            elif isinstance(block, Upsample):
                h = self.run(block, [h], halo=1, up=block.strides)
            else:
                assert isinstance(block, Downsample)
                h = self.run(block, [h], halo=1, down=block.strides)
        return h

    def res_block(self, block: ResBlock, x: Tensor, mask: Tensor | None) -> Tensor:
        h = self.norm_and(block.norm1, block.conv1, x, mask, halo=1)
        if block.truncated:
            return h
        norm = whole_norm(block.norm2, h)

        def second(h: Tensor, x: Tensor, box: TileBox) -> Tensor:
            return block.conv2(self.activated(block.norm2, norm, h, mask, box)) + pointwise(block.shortcut, x)

        return self.run(second, [h, x], halo=1, sees_box=True)

    def norm_and(
        self, norm: nn.Module, layer: Callable, x: Tensor, mask: Tensor | None, *, halo: int
    ) -> Tensor:
        affine = whole_norm(norm, x)

        def op(part: Tensor, box: TileBox) -> Tensor:
            return layer(self.activated(norm, affine, part, mask, box))

        return self.run(op, [x], halo=halo, sees_box=True)

    def activated(
        self, norm: nn.Module, affine: Affine, h: Tensor, mask: Tensor | None, box: TileBox
    ) -> Tensor:
        """SiLU of the norm of h, which are the cells in `box` of a volume whose norm is `affine`."""
        scale, shift = (v.to(h) for v in affine)
        h = h * scale + shift
        if isinstance(norm, SPADE):
            if mask is None:
                raise ValueError("a decoder with SPADE norms needs the one-hot map, mask (B, K, *S)")
            gamma, beta = self.modulation(norm, mask, h, box)
            h = h * (1 + gamma) + beta
        return F.silu(h)

    def modulation(self, norm: SPADE, mask: Tensor, h: Tensor, box: TileBox) -> tuple[Tensor, Tensor]:
        """gamma and beta of the cells in `box`, which depend on two cells around it, by two convolutions."""
        level = mask[
            (..., *(slice(None, None, n // m) for n, m in zip(mask.shape[2:], self.grid, strict=True)))
        ]
        wide = grown(box, 2, self.grid, (1,) * len(box))
        planes = as_planes(cut(level, wide).to(self.device), self.autoencoder.decoder_map_channels)
        maps = norm.modulation(planes.to(h), torch.Size(b - a for a, b in wide))
        inner = tuple((a - w, b - w) for (a, b), (w, _) in zip(box, wide, strict=True))
        return tuple(cut(part, inner) for part in maps)

    def run(
        self,
        op: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        *,
        halo: int,
        up: Sequence[int] | None = None,
        down: Sequence[int] | None = None,
        sees_box: bool = False,
    ) -> Tensor:
        """`op` over tiles of its output, which has `up` / `down` times the cells of its inputs along each
        axis.

        `halo` is the number of cells that it sees around one. Its own padding is right at the border of the
        volume; what it makes wrong at the other borders of a tile is cut off. With `sees_box` it is also told
        in which box its inputs lie.
        """
        dims = self.autoencoder.spatial_dims
        up, down = up or (1,) * dims, down or (1,) * dims
        self.grid = tuple(inputs[0].shape[2:])
        shape = tuple(n * u // d for n, u, d in zip(self.grid, up, down, strict=True))
        out = None
        for box in boxes(shape, self.tile):
            seen = tuple((a * d // u, -(-b * d // u)) for (a, b), u, d in zip(box, up, down, strict=True))
            seen = grown(seen, halo, self.grid, down)
            parts = [cut(x, seen).to(self.device) for x in inputs]
            part = op(*parts, seen) if sees_box else op(*parts)
            starts = [a * u // d for (a, _), u, d in zip(seen, up, down, strict=True)]
            inner = tuple((a - s, b - s) for (a, b), s in zip(box, starts, strict=True))
            part = cut(part, inner)
            if out is None:
                out = torch.empty(*part.shape[:2], *shape, dtype=part.dtype, device=self.store)
            cut(out, box).copy_(part)
        return out
