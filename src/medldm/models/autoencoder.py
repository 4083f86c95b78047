"""Stage one: a vector-quantised autoencoder, with or without discriminators. Esser et al. 2021 (VQ-GAN)."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from pytorch_lightning import LightningModule
from torch import Tensor, nn
from torchmetrics import MeanMetric

from medldm.losses import (
    PIXEL_LOSSES,
    AdversarialLoss,
    PerceptualLoss,
    adaptive_weight,
    feature_matching,
    random_slices,
)
from medldm.metrics.image import psnr, ssim
from medldm.models.common import build_optimizer, rank_part, step_generator, warmup_cosine
from medldm.networks.autoencoder import VQAutoencoder


class AutoencoderModule(LightningModule):
    """Trains `autoencoder` to reconstruct batch["image"].

    One forward pass serves generator and discriminators. `trainer.global_step` counts the generator's
    updates: the discriminators' optimiser steps outside Lightning's count. Accumulation and clipping are done
    here, because Lightning refuses them under manual optimisation; `medldm train` moves the trainer's keys to
    this module.
    A discriminator of fewer dimensions than the image sees one random slice per sample.
    """

    def __init__(
        self,
        autoencoder: VQAutoencoder,
        *,
        optimizer: Callable,
        pixel_loss: str = "l1",
        pixel_weight: float = 1.0,
        perceptual: PerceptualLoss | None = None,
        perceptual_weight: float = 0.0,
        discriminators: Sequence[nn.Module] = (),
        adversarial: AdversarialLoss | None = None,
        discriminator_optimizer: Callable | None = None,
        warmup_steps: int = 0,
        cosine_steps: int | None = None,
        quantizer_weight: float = 1.0,
        slice_axes: Sequence[int] = (0,),
        seed: int = 0,
    ) -> None:
        super().__init__()
        if bool(discriminators) != (adversarial is not None):
            raise ValueError(
                "model.discriminators and model.adversarial belong together: give both or neither"
            )
        if pixel_loss not in PIXEL_LOSSES:
            raise ValueError(f"model.pixel_loss '{pixel_loss}' is none of {', '.join(PIXEL_LOSSES)}")
        self.automatic_optimization = False
        self.autoencoder = autoencoder
        self.discriminators = nn.ModuleList(discriminators)
        self.adversarial, self.perceptual = adversarial, perceptual
        self.pixel_loss = PIXEL_LOSSES[pixel_loss]
        self.pixel_weight, self.perceptual_weight = pixel_weight, perceptual_weight
        self.quantizer_weight = quantizer_weight
        self.warmup_steps, self.cosine_steps = warmup_steps, cosine_steps
        self.slice_axes, self.seed = tuple(slice_axes), seed
        self.make_optimizer = optimizer
        self.make_discriminator_optimizer = discriminator_optimizer or optimizer
        self.accumulate_grad_batches, self.gradient_clip_val = 1, None
        self.is_accumulating = False  # gradients of a part of a batch are pending
        self.description: dict = {}  # what checkpoints.describe says of this module
        self.val_psnr, self.val_ssim = MeanMetric(), MeanMetric()

    validation_metrics = ("val/loss", "val/mse", "val/perplexity", "val/psnr", "val/ssim")

    @property
    def compiled_parts(self) -> list[nn.Module]:
        return [self.autoencoder, *self.discriminators]

    def setup(self, stage: str) -> None:
        """Builds the perceptual network; InputError where its weights are not on this machine."""
        if self.perceptual is not None and self.perceptual_weight:
            self.perceptual.build()

    def configure_optimizers(self):
        optimizer = build_optimizer(self.make_optimizer, [self.autoencoder])
        optimizers, schedules = (
            [optimizer],
            [warmup_cosine(optimizer, warmup=self.warmup_steps, total=self.cosine_steps)],
        )
        if self.discriminators:
            optimizers.append(build_optimizer(self.make_discriminator_optimizer, [self.discriminators]))
        return optimizers, schedules

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

    def training_step(self, batch: dict, batch_idx: int) -> None:
        x = batch["image"]
        factor = self.adversarial.factor(self.global_step) if self.adversarial else 0.0
        x_hat, quantized = self.autoencoder(x, self.decoder_map(batch))
        slices = self.draw_slices(x, batch_idx)
        is_last = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        self.is_accumulating = not is_last

        self.discriminators.requires_grad_(False)  # the generator's backward leaves no gradient in them
        losses = self.generator_losses(x, x_hat, quantized.loss, factor, slices)
        self.manual_backward(losses["loss"] / self.accumulate_grad_batches)
        if is_last:
            self.update_generator()
        if factor:
            self.discriminators.requires_grad_(True)
            losses["discriminator"] = self.discriminator_loss(x, x_hat.detach(), slices)
            self.manual_backward(losses["discriminator"] * factor / self.accumulate_grad_batches)
            if is_last:
                self.update_discriminators()
        terms = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict(terms | {"train/perplexity": quantized.perplexity}, batch_size=len(x))
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False, batch_size=len(x))

    def generator_losses(
        self, x: Tensor, x_hat: Tensor, quantizer_loss: Tensor, factor: float, slices: tuple[int, Tensor]
    ) -> dict[str, Tensor]:
        losses = {"pixel": self.pixel_loss(x_hat, x), "quantizer": quantizer_loss}
        reconstruction = self.pixel_weight * losses["pixel"]
        if self.perceptual is not None and self.perceptual_weight:
            views = (self.view(v, self.perceptual.spatial_dims, slices) for v in (x_hat, x))
            losses["perceptual"] = self.perceptual(*views)
            reconstruction = reconstruction + self.perceptual_weight * losses["perceptual"]
        total = reconstruction + self.quantizer_weight * quantizer_loss
        if factor:
            losses |= self.adversarial_losses(x, x_hat, slices)
            weight = self.adversarial.weight * factor
            if self.adversarial.adaptive:
                last = self.autoencoder.last_layer
                weight = weight * adaptive_weight(reconstruction, losses["adversarial"], last)
            total = total + weight * losses["adversarial"]
            if "feature_matching" in losses:
                total = total + self.adversarial.feature_matching_weight * factor * losses["feature_matching"]
        return {"loss": total} | losses

    def adversarial_losses(self, x: Tensor, x_hat: Tensor, slices: tuple[int, Tensor]) -> dict[str, Tensor]:
        adversarial, matching = [], []
        for discriminator in self.discriminators:
            fake = discriminator(self.view(x_hat, discriminator.spatial_dims, slices))
            adversarial.append(self.adversarial.generator(fake[-1].float()))
            if self.adversarial.feature_matching_weight:
                with torch.no_grad():
                    real = discriminator(self.view(x, discriminator.spatial_dims, slices))
                matching.append(feature_matching(real, fake))
        losses = {"adversarial": torch.stack(adversarial).sum()}
        return losses | ({"feature_matching": torch.stack(matching).sum()} if matching else {})

    def discriminator_loss(self, x: Tensor, x_hat: Tensor, slices: tuple[int, Tensor]) -> Tensor:
        losses = []
        for discriminator in self.discriminators:
            real, fake = (
                discriminator(self.view(v, discriminator.spatial_dims, slices))[-1] for v in (x, x_hat)
            )
            losses.append(self.adversarial.discriminator(real.float(), fake.float()))
        return torch.stack(losses).sum()

    def draw_slices(self, x: Tensor, batch_idx: int) -> tuple[int, Tensor]:
        """An axis and one slice index per sample, from seed, step and place in the global batch."""
        step = self.global_step * self.accumulate_grad_batches + batch_idx % self.accumulate_grad_batches
        generator = step_generator(self.seed, step, torch.device("cpu"))
        axis = self.slice_axes[int(torch.randint(len(self.slice_axes), (), generator=generator))]
        rank, world = self.global_rank, self.trainer.world_size
        index = torch.randint(x.shape[axis + 2], (world * len(x),), generator=generator)
        return axis, rank_part(index, rank, world).to(x.device, non_blocking=True)

    @staticmethod
    def view(x: Tensor, spatial_dims: int, slices: tuple[int, Tensor]) -> Tensor:
        return x if x.ndim - 2 == spatial_dims else random_slices(x, *slices)

    def update_generator(self) -> None:
        optimizer = self.optimizers()
        optimizer = optimizer[0] if isinstance(optimizer, list) else optimizer
        if self.gradient_clip_val:
            nn.utils.clip_grad_norm_(self.autoencoder.parameters(), self.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
        schedulers = self.lr_schedulers()
        (schedulers[0] if isinstance(schedulers, list) else schedulers).step()

    def update_discriminators(self) -> None:
        # The raw optimiser: Lightning would count its steps in global_step.
        optimizer = self.optimizers()[1].optimizer
        if self.gradient_clip_val:
            nn.utils.clip_grad_norm_(self.discriminators.parameters(), self.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["medldm"] = self.description
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
