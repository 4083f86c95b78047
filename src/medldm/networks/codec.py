"""Encoders and decoders that are trained together with a diffusion of their latents: no quantiser, no second
stage.

A codec has `latent_channels`, `latent_shape(image_shape)`, `encode(x, e)` and `decode(z, e)`; x is an image
in [-1, 1], e the embedding of its label or None, and what `decode` returns is for the likelihood to
interpret.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from medldm.errors import InputError
from medldm.networks.autoencoder import VQAutoencoder
from medldm.networks.layers import last_layer_of_image
from medldm.networks.quantizer import Quantized
from medldm.networks.scorenet import ResidualMLP


class MLPCodec(nn.Module):
    """Images as vectors: flatten, Linear, residual blocks, Linear. The label enters every block of both
    halves.

    SimpleDiffusionColab, where the images were 28 x 28. At 256 x 256 its two outer matrices hold 50 million
    weights and know nothing of neighbourhood.
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
            raise InputError("model.codec: an MLP needs images of one size; prepare with data.image_size=N")
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
        """(): the latent is a vector."""
        return ()

    def encode(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        """(B, C, *S) in [-1, 1] -> (B, D)."""
        return self.encoder_out(self.encoder(self.encoder_in(x.flatten(1)), e))

    def decode(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        """(B, D) -> (B, C, *S)."""
        h = self.decoder(self.decoder_in(z), e)
        return last_layer_of_image(self.decoder_out, h).unflatten(1, self.image_shape)


class NoQuantizer(nn.Module):
    """In the place of a quantiser: latents as they are."""

    def __init__(self, *, code_dim: int) -> None:
        super().__init__()

    def forward(self, h: Tensor) -> Quantized:
        zero = h.new_zeros(())
        return Quantized(h, torch.zeros_like(h[:, 0], dtype=torch.long), zero, zero)


class ConvCodec(nn.Module):
    """The encoder and decoder of `VQAutoencoder` (`autoencoder`: its arguments) without its quantiser."""

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
        return tuple(n // f for n, f in zip(image_shape, self.autoencoder.downsampling, strict=True))

    def encode(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        """(B, C, *S) in [-1, 1] -> (B, Cz, *S/f); the label enters the score network alone."""
        return self.autoencoder.encode(x)

    def decode(self, z: Tensor, e: Tensor | None = None) -> Tensor:
        """(B, Cz, *S/f) -> (B, C, *S)."""
        return self.autoencoder.decode(z)


class PixelCodec(nn.Module):
    """The image is its own latent: pixel-space VDM."""

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
