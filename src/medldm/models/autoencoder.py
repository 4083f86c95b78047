"""Stage one: a vector-quantised autoencoder, with or without discriminators. Esser et al. 2021 (VQ-GAN)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from medldm.losses import PIXEL_LOSSES, PerceptualLoss
from medldm.metrics.image import psnr, ssim
from medldm.models.adversarial import AdversarialModule, GeneratorStep
from medldm.networks.autoencoder import VQAutoencoder


class AutoencoderModule(AdversarialModule):
    """Trains `autoencoder` to reconstruct batch["image"]."""

    def __init__(
        self,
        autoencoder: VQAutoencoder,
        *,
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
            raise ValueError(f"model.pixel_loss '{pixel_loss}' is none of {', '.join(PIXEL_LOSSES)}")
        self.autoencoder, self.perceptual = autoencoder, perceptual
        self.pixel_loss = PIXEL_LOSSES[pixel_loss]
        self.pixel_weight, self.perceptual_weight = pixel_weight, perceptual_weight
        self.quantizer_weight = quantizer_weight
        self.val_psnr, self.val_ssim = MeanMetric(), MeanMetric()

    validation_metrics = ("val/loss", "val/mse", "val/perplexity", "val/psnr", "val/ssim")

    @property
    def compiled_parts(self) -> list[nn.Module]:
        return [self.autoencoder, *self.discriminators]

    def setup(self, stage: str) -> None:
        """Builds the perceptual network; InputError where its weights are not on this machine."""
        if self.perceptual is not None and self.perceptual_weight:
            self.perceptual.build()

    @property
    def generator(self) -> list[nn.Module]:
        return [self.autoencoder]

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.autoencoder(x, mask)[0]

    def decoder_map(self, batch: dict) -> Tensor | None:
        """One-hot map (B, K, *S) for a SPADE decoder, None for a plain one."""
        num_classes = self.autoencoder.decoder_map_channels
        if num_classes is None:
            return None
        mask = batch["mask"]
        zeros = mask.new_zeros(mask.shape[0], num_classes, *mask.shape[2:], dtype=torch.float32)
        return zeros.scatter_(1, mask, 1.0)

    def generator_step(self, batch: dict, batch_idx: int, factor: float) -> GeneratorStep:
        x = batch["image"]
        x_hat, quantized = self.autoencoder(x, self.decoder_map(batch))
        slices = self.draw_slices(x, batch_idx)
        losses = {"pixel": self.pixel_loss(x_hat, x), "quantizer": quantized.loss}
        reconstruction = self.pixel_weight * losses["pixel"]
        if self.perceptual is not None and self.perceptual_weight:
            views = (self.view(v, self.perceptual.spatial_dims, slices) for v in (x_hat, x))
            losses["perceptual"] = self.perceptual(*views)
            reconstruction = reconstruction + self.perceptual_weight * losses["perceptual"]
        total = reconstruction + self.quantizer_weight * quantized.loss
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
        x = batch["image"]
        x_hat, quantized = self.autoencoder(x, self.decoder_map(batch))
        x_hat = x_hat.float()
        real, fake = (x + 1) / 2, (x_hat.clamp(-1, 1) + 1) / 2
        self.val_psnr.update(psnr(fake, real, data_range=1.0))
        self.val_ssim.update(ssim(fake, real, data_range=1.0))
        terms = {
            "val/loss": self.pixel_loss(x_hat, x),
            "val/mse": F.mse_loss(x_hat, x),
            "val/perplexity": quantized.perplexity,
            "val/psnr": self.val_psnr,
            "val/ssim": self.val_ssim,
        }
        self.log_dict(terms, on_epoch=True, batch_size=len(x), sync_dist=True)

    @torch.no_grad()
    def picture(self, batch: dict) -> list[Tensor]:
        """Rows for the sample grid: images and their reconstructions, each (B, C, *S) in [-1, 1]."""
        return [batch["image"], self(batch["image"], self.decoder_map(batch)).float().clamp(-1, 1)]
