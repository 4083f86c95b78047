"""Stage one: a vector-quantised autoencoder, with or without discriminators. Esser et al. 2021 (VQ-GAN)."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from medldm.batch import one_hot
from medldm.devices import compute_dtype
from medldm.diffusion.latent import FirstStage
from medldm.losses import PIXEL_LOSSES, PerceptualLoss, weighted
from medldm.metrics.image import psnr, ssim
from medldm.metrics.overlap import dice
from medldm.models.adversarial import AdversarialModule, GeneratorStep
from medldm.models.protocols import Output, Request
from medldm.networks.autoencoder import VQAutoencoder
from medldm.networks.compiling import Function
from medldm.networks.tiling import TiledAutoencoder


class AutoencoderModule(AdversarialModule):
    """Trains `autoencoder` to reconstruct batch["image"], or, with `reconstructs` "mask", the one-hot planes
    of batch["mask"]: the encoder of semantic maps.
    """

    takes_unlabelled = True

    def __init__(
        self,
        autoencoder: VQAutoencoder,
        *,
        reconstructs: str = "image",
        pixel_loss: str = "l1",
        pixel_weight: float = 1.0,
        perceptual: PerceptualLoss | None = None,
        perceptual_weight: float = 0.0,
        quantizer_weight: float = 1.0,
        **optimisation,
    ) -> None:
        """`optimisation`: what `AdversarialModule` takes."""
        super().__init__(**optimisation)
        if pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"pixel_loss={pixel_loss} is none of {', '.join(PIXEL_LOSSES)}")
        if reconstructs not in ("image", "mask"):
            raise ValueError(f"reconstructs={reconstructs} is none of image, mask")
        if reconstructs == "mask" and (perceptual_weight or autoencoder.decoder_map_channels):
            raise ValueError("reconstructs=mask: set perceptual_weight=0 and decoder_sees_map=false")
        if reconstructs == "image" and pixel_loss == "cross_entropy":
            raise ValueError("pixel_loss=cross_entropy is for reconstructs=mask; choose l1 or l2")
        self.reconstructs = reconstructs
        self.autoencoder, self.perceptual = autoencoder, perceptual
        self.pixel_loss = Function(PIXEL_LOSSES[pixel_loss])
        self.pixel_weight, self.perceptual_weight = pixel_weight, perceptual_weight
        self.quantizer_weight = quantizer_weight
        self.tile: int | None = None
        self.scores = nn.ModuleDict({name: MeanMetric() for name in self.score_names})

    @staticmethod
    def batch_keys(model: Mapping[str, Any], *, is_cached: bool) -> tuple[str, ...]:
        if model.get("reconstructs") == "mask":
            return ("mask",)
        return ("image", "mask") if model["decoder_sees_map"] else ("image",)

    @property
    def encodes(self) -> str:
        return self.reconstructs

    @property
    def image_decoder(self) -> nn.Module:
        return self.autoencoder

    @property
    def outputs(self) -> dict[str, Output]:
        if self.reconstructs == "mask":
            return {}
        keys = ("image",) if self.autoencoder.decoder_map_channels is None else ("image", "mask")
        return {"autoencoder": Output(keys, self.reconstruct)}

    def as_first_stage(self, **options: Any) -> FirstStage:
        return FirstStage(self.autoencoder, **options)

    def use_tiles(self, size: int) -> None:
        self.tile = size

    @property
    def size_factors(self) -> tuple[int, ...]:
        return self.autoencoder.downsampling

    @property
    def judges(self) -> list[nn.Module]:
        is_read = self.perceptual is not None and self.perceptual_weight
        return [*super().judges, *([self.perceptual] if is_read else [])]

    @property
    def score_names(self) -> tuple[str, ...]:
        return ("psnr", "ssim") if self.reconstructs == "image" else ("dice",)

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        return tuple(f"val/{name}" for name in ("loss", "mse", "perplexity", *self.score_names))

    def setup(self, stage: str) -> None:
        """Builds the perceptual network; InputError where its weights are not on this machine."""
        if self.perceptual is not None and self.perceptual_weight:
            self.perceptual.build()

    @property
    def generator(self) -> list[nn.Module]:
        return [self.autoencoder]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.autoencoder(x, mask)[0]

    def reconstruct(self, batch: dict, size: tuple[int, ...], request: Request) -> Tensor:
        """The images through the autoencoder: the ceiling of stage two."""
        if self.tile is None:
            return self(batch["image"], self.decoder_map(batch))
        tiled = TiledAutoencoder(self.autoencoder, self.tile)
        h = self.autoencoder.quantize(tiled.encode(batch["image"]).to(self.device)).z
        return tiled.decode(h, batch.get("mask"))

    def decoder_map(self, batch: dict) -> Tensor | None:
        """One-hot map (B, K, *S) for a SPADE decoder, None for a plain one."""
        num_classes = self.autoencoder.decoder_map_channels
        if num_classes is None:
            return None
        return one_hot(batch["mask"], num_classes, compute_dtype(batch["mask"].device))

    def target(self, batch: dict) -> Tensor:
        """(B, C, *S) what is to be reconstructed."""
        if self.reconstructs == "image":
            return batch["image"]
        return one_hot(batch["mask"], self.autoencoder.image_channels)

    def generator_step(self, batch: dict, batch_idx: int, factor: float) -> GeneratorStep:
        x = self.target(batch)
        x_hat, quantized = self.autoencoder(x, self.decoder_map(batch))
        slices = self.draw_slices(x, batch_idx)
        losses = {"pixel": self.pixel_loss(x_hat, x), "quantizer": quantized.loss}
        reconstruction = weighted(self.pixel_weight, losses["pixel"])
        if self.perceptual is not None and self.perceptual_weight:
            views = (self.view(v, self.perceptual.spatial_dims, slices) for v in (x_hat, x))
            losses["perceptual"] = self.perceptual(*views)
            reconstruction = reconstruction + weighted(self.perceptual_weight, losses["perceptual"])
        total = reconstruction + weighted(self.quantizer_weight, quantized.loss)
        if factor:
            last = self.autoencoder.last_layer
            total = total + self.adversarial_term(
                losses, reconstruction, x, x_hat, slices, factor=factor, last_layer=last
            )
        logs = {"perplexity": quantized.perplexity}
        return GeneratorStep({"loss": total} | losses, x, x_hat, slices, logs=logs)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["epoch_count"] = self.autoencoder.quantizer.epoch_count

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.autoencoder.quantizer.epoch_count.copy_(checkpoint["epoch_count"])

    def on_train_epoch_end(self) -> None:
        self.log("train/codebook_usage", self.autoencoder.quantizer.epoch_usage())

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x = self.target(batch)
        x_hat, quantized = self.autoencoder(x, self.decoder_map(batch))
        x_hat = x_hat.float()
        for name, values in self.score(x_hat, x).items():
            self.scores[name].update(values)
        terms = {
            "val/loss": self.pixel_loss(x_hat, x),
            "val/mse": F.mse_loss(x_hat, x),
            "val/perplexity": quantized.perplexity,
        }
        terms |= {f"val/{name}": metric for name, metric in self.scores.items()}
        self.log_dict(terms, on_epoch=True, batch_size=len(x), sync_dist=True)

    def score(self, x_hat: Tensor, x: Tensor) -> dict[str, Tensor]:
        if self.reconstructs == "mask":
            found, wanted = (v.argmax(1, keepdim=True) for v in (x_hat, x))
            per_class = dice(found, wanted, x.shape[1])
            return {"dice": per_class[per_class.isfinite()].float()}
        real, fake = (x + 1) / 2, (x_hat.clamp(-1, 1) + 1) / 2
        return {"psnr": psnr(fake, real, data_range=1.0), "ssim": ssim(fake, real, data_range=1.0)}

    @torch.no_grad()
    def picture(self, batch: dict) -> list[Tensor]:
        """Rows for the sample grid: images, or class maps, above their reconstructions, all in [-1, 1]."""
        x = self.target(batch)
        rows = [x, self(x, self.decoder_map(batch)).float()]
        if self.reconstructs == "mask":
            last = x.shape[1] - 1
            return [row.argmax(1, keepdim=True) / max(1, last) * 2 - 1 for row in rows]
        return [row.clamp(-1, 1) for row in rows]
