"""The frozen first stage as diffusion uses it: from images to normalised latents and back."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from medldm.batch import check_labels, expand_as, one_hot
from medldm.devices import compute_dtype
from medldm.errors import InputError
from medldm.networks.tiling import TiledAutoencoder
from medldm.ranks import all_reduce

LATENTS = ("prequant", "quant")
NORMALISATIONS = ("std", "codebook_range", "none")


def latent_shape(image_shape: tuple[int, ...], factors: tuple[int, ...]) -> tuple[int, ...]:
    """`image_shape` divided by one factor for each axis; InputError where an axis does not divide."""
    if len(image_shape) != len(factors) or any(n % f for n, f in zip(image_shape, factors, strict=True)):
        raise InputError(
            f"images of {tuple(image_shape)} do not divide by the first stage's factors {factors}; "
            "crop or pad"
        )
    return tuple(n // f for n, f in zip(image_shape, factors, strict=True))


class FirstStage(nn.Module):
    """A frozen VQ autoencoder. Latents are shifted and scaled here and nowhere else.

    A raw latent h is the encoder's output before quantisation, which `medldm encode` caches (`encode_raw`).
    With `latent` "prequant" diffusion learns h, with "quant" its nearest codes. `requantize` replaces latents
    by their nearest codes again before decoding. `normalisation` is what `fit` computes: "std" gives each
    channel mean 0 and deviation 1 over the training set, "codebook_range" maps the range of all codebook
    entries to [-1, 1] (Med-LSDM), "none" leaves latents as they are. `translator` maps normalised latents to
    those of another modality. `tile`, where set, is the size of the tiles in which volumes are encoded and
    decoded, with the same result up to rounding. The module stays in eval mode, so that neither training nor
    sampling changes the codebook.
    """

    def __init__(
        self,
        autoencoder: nn.Module,
        translator: nn.Module | None = None,
        *,
        latent: str = "prequant",
        requantize: bool = True,
        normalisation: str = "std",
    ) -> None:
        super().__init__()
        for key, value, choices in (
            ("latent", latent, LATENTS),
            ("normalisation", normalisation, NORMALISATIONS),
        ):
            if value not in choices:
                raise ValueError(f"{key}={value} is none of {', '.join(choices)}")
        is_among_codes = getattr(autoencoder.quantizer, "is_among_codes", True)
        if latent == "prequant" and not requantize and not is_among_codes:
            raise ValueError("requantize=False: the decoder knows codes, which these latents do not lie near")
        self.autoencoder = autoencoder.requires_grad_(False)
        self.translator = None if translator is None else translator.requires_grad_(False)
        self.spatial_dims = autoencoder.spatial_dims
        self.latent_channels = autoencoder.latent_channels
        self.downsampling = tuple(autoencoder.downsampling)
        self.latent = latent
        self.requantize = requantize
        self.normalisation = normalisation
        self.tile: int | None = None
        self.register_buffer("shift", torch.zeros(self.latent_channels))
        self.register_buffer("scale", torch.ones(self.latent_channels))
        self.register_buffer("is_fitted", torch.tensor(normalisation == "none"))
        self.eval()

    def train(self, mode: bool = True) -> "FirstStage":
        """Keeps the module in eval mode, whatever `mode` is."""
        return super().train(False)

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The latent grid *s of an image grid *S."""
        return latent_shape(image_shape, self.downsampling)

    @torch.no_grad()
    def encode_raw(self, x: Tensor) -> Tensor:
        """(B, C, *S) in [-1, 1] -> h (B, Cz, *S/f) float32, neither quantised nor normalised."""
        if self.tile is not None:
            return TiledAutoencoder(self.autoencoder, self.tile).encode(x).to(x.device).float()
        return self.autoencoder.encode(x).float()

    def encode_classes(self, mask: Tensor) -> Tensor:
        """A class map (B, 1, *S) -> z (B, Cz, *S/f), normalised, by an autoencoder of one-hot maps."""
        num_classes = self.autoencoder.image_channels
        check_labels(mask, num_classes)
        return self.encode(mask if self.tile is not None else one_hot(mask, num_classes))

    def scaled(self, h: Tensor) -> Tensor:
        """Shift and scale to normalised units; passes gradients on."""
        return (h - self.per_channel(self.shift, h)) / self.per_channel(self.scale, h)

    def unscaled(self, z: Tensor) -> Tensor:
        return z * self.per_channel(self.scale, z) + self.per_channel(self.shift, z)

    @torch.no_grad()
    def normalize(self, h: Tensor) -> Tensor:
        """Raw latents, fresh or from the cache -> what diffusion is trained on, float32."""
        return self.scaled(self.chosen(h))

    @torch.no_grad()
    def denormalize(self, z: Tensor) -> Tensor:
        """The inverse of `normalize`, up to the quantisation of `latent` "quant"."""
        return self.unscaled(z.float())

    def encode(self, x: Tensor) -> Tensor:
        """(B, C, *S) in [-1, 1] -> z (B, Cz, *S/f), normalised."""
        return self.normalize(self.encode_raw(x))

    @torch.no_grad()
    def decode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """z (B, Cz, *s), normalised -> image (B, C, *S); `mask` is for decoders with SPADE."""
        h = self.denormalize(z)
        if self.requantize:
            h = self.codes_of(h)
        if self.tile is not None:
            return TiledAutoencoder(self.autoencoder, self.tile).decode(h, mask).to(z.device)
        return self.autoencoder.decode(h, mask)

    def codes_of(self, h: Tensor) -> Tensor:
        return (self.autoencoder.snap if self.latent == "quant" else self.autoencoder.quantize)(h).z

    def decode_through(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        """`decode` in one piece, with gradients with respect to z; quantisation passes them on."""
        h = self.unscaled(z.float())
        if self.requantize:
            with torch.no_grad():
                codes = self.codes_of(h).float()
            h = h + (codes - h).detach()
        return self.autoencoder.decode(h, mask)

    def decoder_map(self, batch: dict) -> Tensor | None:
        """The map that a SPADE decoder reads, None for other decoders: one-hot (B, K, *S), or, for tiles, the
        class map (B, 1, *S).
        """
        num_classes = self.autoencoder.decoder_map_channels
        if num_classes is None:
            return None
        if "mask" not in batch:
            raise InputError(
                "the first stage's SPADE decoder needs masks; use a conditioner with use_mask=true"
            )
        mask = batch["mask"]
        check_labels(mask, num_classes)
        return mask if self.tile is not None else one_hot(mask, num_classes, compute_dtype(mask.device))

    @torch.no_grad()
    def translate(self, z: Tensor, label: Tensor) -> Tensor:
        """Normalised latents (B, Cz, *s) of any modality -> those of the modalities `label` (B,)."""
        return self.translator(z, label).float()

    def translate_image(self, x: Tensor, label: Tensor) -> Tensor:
        """(B, C, *S) in [-1, 1] of any modality -> images of the modalities `label`, without diffusion."""
        return self.decode(self.translate(self.encode(x), label))

    def reconstruct(self, x: Tensor) -> Tensor:
        """(B, C, *S) encoded to the latents of diffusion and decoded again: no sample can be better."""
        return self.decode(self.encode(x))

    @torch.no_grad()
    def fit(self, raw_latents: Iterable[Tensor]) -> None:
        """Set `shift` and `scale`, from batches (B, Cz, *s) of raw latents where `normalisation` is "std".

        Use the whole training set, since one batch may differ from it. Each rank passes its own part, and all
        get the statistics of the whole.
        """
        if self.normalisation == "std":
            mean, std = channel_moments(
                (self.chosen(h) for h in raw_latents), self.shift.double().new_zeros(3, self.latent_channels)
            )
            # A channel that never varies keeps its scale: rounding errors would be amplified otherwise.
            shift, scale = mean, torch.where(std > 1e-6, std, torch.ones_like(std))
        elif self.normalisation == "codebook_range":
            low, high = self.autoencoder.quantizer.code_range()
            shift, scale = (high + low) / 2, (high - low) / 2
        else:
            shift, scale = torch.zeros(()), torch.ones(())
        self.shift.copy_(shift.to(self.shift).expand_as(self.shift))
        self.scale.copy_(scale.to(self.scale).expand_as(self.scale))
        self.is_fitted.fill_(True)

    def chosen(self, h: Tensor) -> Tensor:
        h = h.float()
        return self.autoencoder.quantize(h).z.float() if self.latent == "quant" else h

    @staticmethod
    def per_channel(values: Tensor, x: Tensor) -> Tensor:
        return expand_as(values.float(), x[0])


class PixelStage(nn.Module):
    """The identity in the place of a first stage: diffusion of the images themselves."""

    autoencoder = translator = None

    def __init__(self, image_channels: int, *, spatial_dims: int) -> None:
        super().__init__()
        self.spatial_dims = spatial_dims
        self.latent_channels = image_channels
        self.downsampling = (1,) * spatial_dims
        self.register_buffer("is_fitted", torch.tensor(True), persistent=False)

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(image_shape)

    def encode_raw(self, x: Tensor) -> Tensor:
        return x.float()

    def normalize(self, h: Tensor) -> Tensor:
        return h.float()

    def denormalize(self, z: Tensor) -> Tensor:
        return z.float()

    def encode(self, x: Tensor) -> Tensor:
        return x.float()

    def decode(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        return z.float()

    def decode_through(self, z: Tensor, mask: Tensor | None = None) -> Tensor:
        return z.float()

    def decoder_map(self, batch: dict) -> None:
        """None: there is no decoder."""

    def fit(self, raw_latents: Iterable[Tensor]) -> None:
        """Does nothing: images in [-1, 1] are not normalised."""


def channel_moments(batches: Iterable[Tensor], sums: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean and standard deviation of each channel over the batches (B, C, *s) of all ranks, in float64.

    `sums` (3, C) holds the count, the sum and the sum of squares, and begins as zeros, which a rank without a
    batch contributes.
    """
    for x in batches:
        x = x.double().transpose(0, 1).flatten(1)  # (C, B prod(s))
        part = torch.stack([torch.full_like(x[:, 0], x.shape[1]), x.sum(1), x.square().sum(1)])
        sums = part if sums is None else sums + part
    count, total, squares = (torch.zeros(3, 1) if sums is None else all_reduce(sums)).double()
    if not count.all():
        raise InputError("no training latents to normalise with: the training split is empty")
    mean = total / count
    return mean, (squares / count - mean.square()).clamp_min(0).sqrt()
