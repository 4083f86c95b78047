"""Encoders and decoders that are trained together with the diffusion of their latents, without a quantiser.

A codec has `latent_channels`, `latent_shape(image_shape)`, `encode(x, e)` and `decode(z, e)`: x is an image
in [-1, 1], and e (B, E) is the embedding of its label, or None. The likelihood that a model is trained with
says what the output of `decode` means, for instance logits.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medldm.networks.autoencoder import VQAutoencoder
from medldm.networks.layers import last_layer_of_image
from medldm.networks.quantizer import Quantized
from medldm.networks.scorenet import ResidualMLP


class MLPCodec(nn.Module):
    """Images as vectors: a linear layer, residual blocks and a linear layer in either direction.

    It is that of the notebook SimpleDiffusionColab (google-research/vdm), where images were 28 x 28. For
    images of 256 x 256 the first and the last matrix hold 50 million weights, and no weight is shared between
    places. The label's embedding enters every block of both halves.
    image_size: of all images; ValueError where it is None.
    num_blocks: (encoder, decoder). film, activation: see `ResidualMLP`.
    """

    def __init__(
        self,
        spatial_dims: int,
        *,
        image_channels: int,
        image_size: Sequence[int] | None,
        condition_channels: int = 0,
        latent_channels: int = 64,
        encoder_channels: int = 256,
        decoder_channels: int = 512,
        num_blocks: Sequence[int] = (6, 6),
        middle_channels: int = 1024,
        film: str = "shift",
        activation: str = "gelu",
    ) -> None:
        super().__init__()
        if image_size is None:
            raise ValueError("image_size=None: an MLP takes images of one size; prepare them at one")
        self.image_shape, self.latent_channels = (image_channels, *image_size), latent_channels
        num_pixels = math.prod(self.image_shape)
        options = {
            "middle_channels": middle_channels,
            "condition_channels": condition_channels,
            "film": film,
            "activation": activation,
        }
        self.encoder_in = nn.Linear(num_pixels, encoder_channels)
        self.encoder = ResidualMLP(encoder_channels, num_blocks[0], **options)
        self.encoder_out = nn.Linear(encoder_channels, latent_channels)
        self.decoder_in = nn.Linear(latent_channels, decoder_channels)
        self.decoder = ResidualMLP(decoder_channels, num_blocks[1], **options)
        self.decoder_out = nn.Linear(decoder_channels, num_pixels)

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The latent is a vector, without axes of space: ()."""
        return ()

    def encode(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        """(B, C, *S) in [-1, 1] -> (B, D)."""
        return self.encoder_out(self.encoder(self.encoder_in(x.flatten(1)), e))

    def decode(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        """Vectors (B, D) -> (B, C, *S)."""
        h = self.decoder(self.decoder_in(z), e)
        return last_layer_of_image(self.decoder_out, h).unflatten(1, self.image_shape)


class NoQuantizer(nn.Module):
    """Leaves latents as they are, where an autoencoder wants a quantiser."""

    def __init__(self, *, code_dim: int) -> None:
        super().__init__()

    def forward(self, h: Tensor) -> Quantized:
        zero = h.new_zeros(())
        return Quantized(h, torch.zeros_like(h[:, 0], dtype=torch.long), zero, zero)


class ConvCodec(nn.Module):
    """A `VQAutoencoder` without a quantiser; `autoencoder` are the arguments of that."""

    def __init__(
        self,
        spatial_dims: int,
        *,
        image_channels: int,
        image_size: Sequence[int] | None = None,
        condition_channels: int = 0,
        **autoencoder,
    ) -> None:
        super().__init__()
        self.autoencoder = VQAutoencoder(
            spatial_dims, quantizer=NoQuantizer, image_channels=image_channels, **autoencoder
        )
        self.latent_channels = self.autoencoder.latent_channels

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The grid S of images -> the grid S/f of their latents."""
        return tuple(n // f for n, f in zip(image_shape, self.autoencoder.downsampling, strict=True))

    def encode(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        """(B, C, *S) in [-1, 1] -> (B, Cz, *S/f); the label's embedding is not used."""
        return self.autoencoder.encode(x)

    def decode(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        """(B, Cz, *S/f) -> (B, C, *S)."""
        return self.autoencoder.decode(z)


class PixelCodec(nn.Module):
    """The image is its own latent: the diffusion of Kingma et al. 2021 in pixel space."""

    def __init__(
        self,
        spatial_dims: int,
        *,
        image_channels: int,
        image_size: Sequence[int] | None = None,
        condition_channels: int = 0,
    ) -> None:
        super().__init__()
        self.latent_channels = image_channels

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(image_shape)

    def encode(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        return x

    def decode(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        return z
