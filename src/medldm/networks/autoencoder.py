"""One vector-quantised autoencoder for 2D and 3D, built by a plan of `autoencoder_plan`."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.networks.autoencoder_plan import BlockStep, Stages
from medldm.networks.biased import Biased, parted, without_bias
from medldm.networks.compiling import Function, is_compiling, is_wrapped
from medldm.networks.layers import (
    RESAMPLINGS,
    AttentionBlock,
    Downsample,
    Norm,
    ResBlock,
    Upsample,
    apply_norm,
    conv,
    last_layer_of_image,
)
from medldm.networks.norms import group_norm
from medldm.networks.options import check_one_of, grouped
from medldm.networks.quantizer import Quantized
from medldm.networks.spade import SPADE


class Stack(nn.ModuleList):
    """Blocks in a row; those that take the SPADE map get it."""

    rounds_together = True

    def forward(
        self, h: Tensor | Biased, spade: Tensor | None = None, *, apart: bool = False
    ) -> Tensor | Biased:
        """apart: whether what comes next takes a bias. Blocks as a GPU calls them leave theirs to the next
        one, where that takes it.
        """
        blocks = list(self)
        for block, after in zip(blocks, [*blocks[1:], None], strict=True):
            is_taken = apart if after is None else takes_biased(after)
            options = {"apart": True} if is_taken and gives_biased(block) else {}
            h = block(h, None, spade, **options) if isinstance(block, ResBlock) else block(h, **options)
        return h


def gives_biased(block: nn.Module) -> bool:
    """Whether it leaves its bias to the next block where that is asked."""
    return is_wrapped(block) and getattr(block, "gives_biased", False)


def takes_biased(block: nn.Module) -> bool:
    """Whether the bias of what comes before may be left to it."""
    return is_wrapped(block) and getattr(block, "takes_biased", False)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """What all blocks share. num_heads: of attention; norm_groups: of the group norms.

    resample: the kind of `Downsample` and `Upsample`. shortcut, dropout, padding_mode: see `ResBlock`.
    use_checkpoint: residual blocks are computed again in the backward pass, which saves memory: those with
    SPADE norms hold their hidden channels at full resolution.
    """

    num_heads: int = 8
    norm_groups: int = 32
    shortcut: str = "auto"
    dropout: float = 0.0
    resample: str = "conv4"
    padding_mode: str = "zeros"
    use_checkpoint: bool = False

    def __post_init__(self) -> None:
        check_one_of("resample", self.resample, RESAMPLINGS)

    def make(self, spatial_dims: int, steps: Sequence[BlockStep], norm: Norm) -> "Stack":
        return Stack([self.block(spatial_dims, step, norm) for step in steps])

    def block(self, spatial_dims: int, step: BlockStep, norm: Norm) -> nn.Module:
        sizes = (spatial_dims, step.in_channels, step.out_channels)
        if step.kind == "attn":
            return AttentionBlock(step.in_channels, num_heads=self.num_heads, groups=self.norm_groups)
        if step.kind == "res":
            options = {"shortcut": self.shortcut, "dropout": self.dropout, "padding_mode": self.padding_mode}
            return ResBlock(*sizes, norm=norm, use_checkpoint=self.use_checkpoint, **options)
        resample = Downsample if step.kind == "down" else Upsample
        return resample(*sizes, stride=step.stride, kind=self.resample, padding_mode=self.padding_mode)


@dataclass(frozen=True, kw_only=True)
class MapNorms:
    """The decoder's SPADE norms, where it sees a map; their kernel is a number or one per axis."""

    spade_kernel: int | Sequence[int] = 3
    spade_hidden_channels: int = 128


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What stands between the stages and the latent, and between them and the image.

    latent_kernel: of the encoder's last and the decoder's first convolution; None leaves both out, and the
    1x1 convolutions around the quantiser change the width (TATS).
    output_activation: "none" or "tanh".
    image_range: of the grey levels that the network works in, "signed" [-1, 1] or "unit" [0, 1] (ALDM's
    release of 2023); outside of it images are in [-1, 1].
    """

    latent_kernel: int | None = 3
    output_activation: str = "none"
    image_range: str = "signed"

    def __post_init__(self) -> None:
        check_one_of("output_activation", self.output_activation, ("none", "tanh"))
        check_one_of("image_range", self.image_range, ("signed", "unit"))


class VQAutoencoder(nn.Module):
    """Encoder, vector quantiser, decoder.

    quantizer: builds it from `code_dim`, the latent's channels.
    decoder_map_channels: of the semantic map that the decoder sees in SPADE norms; None gives plain norms.
    options: the fields of `Stages`, `Blocks`, `MapNorms` and `Ends`, flat as in a config.
    """

    def __init__(
        self,
        spatial_dims: int,
        *,
        quantizer: Callable[..., nn.Module],
        latent_channels: int,
        image_channels: int = 1,
        decoder_map_channels: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        stages, blocks, maps, ends = grouped("VQAutoencoder", options, Stages, Blocks, MapNorms, Ends)
        strides = stages.strides_per_axis(spatial_dims)
        self.spatial_dims, self.image_channels = spatial_dims, image_channels
        self.latent_channels, self.decoder_map_channels = latent_channels, decoder_map_channels
        self.downsampling = tuple(math.prod(factors) for factors in zip(*strides, strict=True))
        self.output_activation, self.is_unit = ends.output_activation, ends.image_range == "unit"
        self.latent_halo = 0 if ends.latent_kernel is None else ends.latent_kernel // 2

        plain: Norm = partial(group_norm, groups=blocks.norm_groups)
        decoder_norm = plain
        if decoder_map_channels is not None:
            sizes = {"map_channels": decoder_map_channels, "hidden_channels": maps.spade_hidden_channels}
            # Med-LSDM's SPADE norms have 8 groups
            decoder_norm = partial(SPADE, spatial_dims, groups=8, kernel_size=maps.spade_kernel, **sizes)
        plan = stages.plan(spatial_dims)
        widest, narrowest = plan.encoder[-1].out_channels, plan.decoder[-1].out_channels
        padded = partial(conv, spatial_dims, kernel_size=3, padding=1, padding_mode=blocks.padding_mode)
        self.stem = padded(image_channels, stages.stem_channels)
        self.encoder = blocks.make(spatial_dims, plan.encoder, plain)
        self.encoder_norm = plain(widest)
        self.add_latent_layers(quantizer, widest, ends.latent_kernel)
        self.decoder_entry_norm = decoder_norm(widest) if ends.latent_kernel is None else None
        self.decoder = blocks.make(spatial_dims, plan.decoder, decoder_norm)
        self.decoder_norm = decoder_norm(narrowest) if plan.has_last_norm else None
        self.head = padded(narrowest, image_channels)
        self.add_functions()

    def add_latent_layers(self, quantizer: Callable[..., nn.Module], width: int, kernel: int | None) -> None:
        """What lies between the encoder's norm and the decoder's blocks, both of this width."""
        channels, dims = self.latent_channels, self.spatial_dims
        self.to_latent, self.from_latent = nn.Identity(), nn.Identity()
        if kernel is not None:
            self.to_latent = conv(dims, width, channels, kernel, padding=kernel // 2)
            self.from_latent = conv(dims, channels, width, kernel, padding=kernel // 2)
            width = channels
        self.pre_quantizer = conv(dims, width, channels, kernel_size=1)
        self.post_quantizer = conv(dims, channels, width, kernel_size=1)
        self.quantizer = quantizer(code_dim=channels)

    def add_functions(self) -> None:
        """What runs between the blocks, as blocks; the head is none, because its gradient is also asked for
        alone.
        """
        latent_layers = (self.encoder_norm, self.to_latent, self.pre_quantizer)
        self.encoder_end = Function(self.ended, latent_layers, exact=True)
        norms = [norm for norm in (self.decoder_entry_norm,) if norm is not None]
        self.decoder_start = Function(self.entered, (self.post_quantizer, self.from_latent, *norms))
        norms = [norm for norm in (self.decoder_norm,) if norm is not None]
        self.decoder_end = Function(self.normed, norms)

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, *S) image -> (B, Cz, *S/f) latent before quantisation.

        Raises ValueError where S does not divide by `downsampling`.
        """
        self.check_size(x)
        return self.encoder_end(self.encoder(self.first(x, apart=True), apart=True))

    def ended(self, h: Tensor | Biased) -> Tensor:
        h, offset = parted(h)
        return self.latent(F.silu(self.encoder_norm(h, offset=offset)))

    def latent(self, h: Tensor) -> Tensor:
        """Activated features (B, C, *S/f) of the encoder -> (B, Cz, *S/f)."""
        return last_layer_of_image(lambda h: self.pre_quantizer(self.to_latent(h)), h)

    def first(self, x: Tensor, *, apart: bool = False) -> Tensor | Biased:
        """The stem's output; apart: without its bias, where the encoder's first block takes it on a GPU."""
        x = (x + 1) / 2 if self.is_unit else x
        return without_bias(self.stem, x) if apart and takes_biased(self.encoder[0]) else self.stem(x)

    def check_size(self, x: Tensor) -> None:
        for size, factor in zip(x.shape[2:], self.downsampling, strict=True):
            if size % factor:
                raise ValueError(
                    f"image size {tuple(x.shape[2:])} does not divide by the downsampling {self.downsampling}"
                )

    def quantize(self, h: Tensor) -> Quantized:
        return self.quantizer(h)

    def snap(self, z: Tensor) -> Quantized:
        """`quantize` for what already lies among the codes, such as a generated latent of "quant"."""
        return self.quantizer.snap(z)

    def decode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """(B, Cz, *S/f) quantised latent (and, for SPADE decoders, the one-hot map) -> (B, C, *S) image."""
        h = self.decoder_start(z, mask)
        h = self.decoder(h, mask, apart=self.decoder_norm is not None)
        return self.last(self.decoder_end(h, mask))

    def entered(self, z: Tensor, mask: Tensor | None) -> Tensor | Biased:
        if self.decoder_entry_norm is not None:
            given = without_bias(self.post_quantizer, z) if is_compiling() else self.post_quantizer(z)
            h, offset = parted(given)
            return F.silu(apply_norm(self.decoder_entry_norm, h, mask, offset=offset))
        h = self.post_quantizer(z)
        return without_bias(self.from_latent, h) if takes_biased(self.decoder[0]) else self.from_latent(h)

    def normed(self, h: Tensor | Biased, mask: Tensor | None) -> Tensor:
        h, offset = parted(h)
        if self.decoder_norm is None:
            return h
        return F.silu(apply_norm(self.decoder_norm, h, mask, offset=offset))

    def last(self, h: Tensor) -> Tensor:
        x = last_layer_of_image(self.head, h)
        x = torch.tanh(x) if self.output_activation == "tanh" else x
        return 2 * x - 1 if self.is_unit else x

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Quantized]:
        quantized = self.quantize(self.encode(x))
        return self.decode(quantized.z, mask), quantized

    @property
    def last_layer(self) -> Tensor:
        """The weight whose gradient norms set the adaptive adversarial weight (Esser et al. 2021, Eq. 7)."""
        return self.head.weight
