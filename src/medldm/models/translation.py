"""MS-SPADE between the latents of modalities: in latent space, or jointly with the autoencoder.

Kim and Park 2024, "Adaptive Latent Diffusion Model for 3D Medical Image to Image Translation".
"""

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from medldm.diffusion.latent import FirstStage
from medldm.losses import PerceptualLoss, weighted
from medldm.metrics.image import psnr, ssim
from medldm.models.adversarial import AdversarialModule, GeneratorStep
from medldm.models.common import stage_latents
from medldm.models.protocols import Output, translations
from medldm.networks.translator import MSSPADE


class Translated(NamedTuple):
    """What an objective makes of one batch of pairs."""

    losses: dict[str, Tensor]  # unweighted terms, by name
    reconstruction: Tensor  # the weighted part that the adaptive weight compares with
    total: Tensor  # without the adversarial term
    real: Tensor  # what a discriminator compares: latents or images of the target
    fake: Tensor


class LatentTranslation:
    """L1 between translated and real latents, the autoencoder frozen; `cycle_weight` for the way back."""

    trains_autoencoder = False

    def __init__(self, *, latent_weight: float = 1.0, cycle_weight: float = 0.0) -> None:
        self.latent_weight, self.cycle_weight = latent_weight, cycle_weight

    def discriminated_channels(self, first_stage: FirstStage, image_channels: int) -> int:
        return first_stage.latent_channels

    def __call__(self, module: "TranslationModule", batch: dict, slices_of) -> Translated:
        z_source = stage_latents(module.first_stage, batch, "source")
        z_target = stage_latents(module.first_stage, batch)
        z_hat = module.translator(z_source, batch["label"]).float()
        losses = {"latent": F.l1_loss(z_hat, z_target)}
        reconstruction = weighted(self.latent_weight, losses["latent"])
        total = reconstruction
        if self.cycle_weight:
            losses["cycle"] = cycle_loss(module.translator, z_hat, z_source, batch["source_label"])
            total = total + weighted(self.cycle_weight, losses["cycle"])
        return Translated(losses, reconstruction, total, z_target, z_hat)


class ImageTranslation:
    """Autoencoder and translator together, by the paper's five losses on decoded images.

    With x_hat = D(S(z_source, target)): L1 of x_hat, and of the target's own D(z_target) (`identity_weight`:
    Fig. 2a decodes both paths), quantisation of both latents, perceptual, and cycle consistency of latents;
    the adversarial term is the module's. The paper prints no weights: all of them are a choice.
    """

    trains_autoencoder = True

    def __init__(
        self,
        *,
        pixel_weight: float = 1.0,
        identity_weight: float = 1.0,
        quantizer_weight: float = 1.0,
        cycle_weight: float = 1.0,
        perceptual_weight: float = 0.0,
        perceptual: PerceptualLoss | None = None,
    ) -> None:
        if perceptual_weight and perceptual is None:
            raise ValueError(f"perceptual_weight={perceptual_weight}: give the loss too, as perceptual")
        self.pixel_weight, self.identity_weight = pixel_weight, identity_weight
        self.quantizer_weight, self.cycle_weight = quantizer_weight, cycle_weight
        self.perceptual_weight = perceptual_weight
        self.perceptual = perceptual if perceptual_weight else None

    def discriminated_channels(self, first_stage: FirstStage, image_channels: int) -> int:
        return image_channels

    def __call__(self, module: "TranslationModule", batch: dict, slices_of) -> Translated:
        autoencoder, x = module.autoencoder, batch["image"]
        z_source, quantized_source = module.encode(batch["source"])
        _, quantized = module.encode(x)
        z_hat = module.translator(z_source, batch["label"])
        x_hat = autoencoder.decode(module.first_stage.unscaled(z_hat))
        losses = {
            "pixel": F.l1_loss(x_hat, x),
            "quantizer": (quantized_source.loss + quantized.loss) / 2,
        }
        reconstruction = weighted(self.pixel_weight, losses["pixel"])
        if self.perceptual is not None:
            views = (module.view(v, self.perceptual.spatial_dims, slices_of(x)) for v in (x_hat, x))
            losses["perceptual"] = self.perceptual(*views)
            reconstruction = reconstruction + weighted(self.perceptual_weight, losses["perceptual"])
        total = reconstruction + weighted(self.quantizer_weight, losses["quantizer"])
        if self.identity_weight:
            losses["identity"] = F.l1_loss(autoencoder.decode(quantized.z), x)
            total = total + weighted(self.identity_weight, losses["identity"])
        if self.cycle_weight:
            losses["cycle"] = cycle_loss(module.translator, z_hat, z_source.detach(), batch["source_label"])
            total = total + weighted(self.cycle_weight, losses["cycle"])
        return Translated(losses, reconstruction, total, x, x_hat)


def cycle_loss(translator: MSSPADE, z_hat: Tensor, z_source: Tensor, source_label: Tensor) -> Tensor:
    """|S(S(z_source, target), source) - z_source|."""
    return F.l1_loss(translator(z_hat, source_label).float(), z_source)


class TranslationModule(AdversarialModule):
    """Trains `translator` between the latents of `first_stage`, on batches of ordered pairs.

    A batch holds "image" and "source" (or, cached, "latent" and "source_latent"), the target's "label" and
    the "source_label". `objective` decides what is compared, and whether the autoencoder trains along.
    """

    validation_metrics = ("val/loss", "val/psnr", "val/ssim")
    encodes = "image"

    def __init__(
        self,
        first_stage: FirstStage,
        translator: MSSPADE,
        *,
        objective: LatentTranslation | ImageTranslation,
        **optimisation,
    ) -> None:
        """`optimisation`: what `AdversarialModule` takes."""
        super().__init__(**optimisation)
        if objective.trains_autoencoder and first_stage.requantize:
            raise ValueError(
                "first_stage.requantize=true: image-space translation decodes latents as they are; "
                "set it to false"
            )
        self.first_stage, self.translator, self.objective = first_stage, translator, objective
        first_stage.autoencoder.requires_grad_(objective.trains_autoencoder)
        self.val_psnr, self.val_ssim = MeanMetric(), MeanMetric()
        self.train()  # Lightning keeps modules in the mode that it finds them in

    @staticmethod
    def batch_keys(model: Mapping[str, Any], *, is_cached: bool) -> tuple[str, ...]:
        if not is_cached:
            return ("image", "source")
        objective = model["objective"].get("_target_")
        if objective is not None and resolve_name(objective).trains_autoencoder:
            raise ValueError("this objective compares images, which cached latents are not")
        return ("latent", "source_latent")

    @property
    def outputs(self) -> dict[str, Output]:
        return translations(self.translation)

    @property
    def translation(self) -> FirstStage:
        return self.as_first_stage()

    @property
    def image_decoder(self) -> nn.Module:
        return self.autoencoder

    @property
    def size_factors(self) -> tuple[int, ...]:
        return self.first_stage.downsampling

    @property
    def judges(self) -> list[nn.Module]:
        perceptual = getattr(self.objective, "perceptual", None)
        return [*super().judges, *([] if perceptual is None else [perceptual])]

    @property
    def judged_factors(self) -> tuple[int, ...]:
        images_are_judged = self.objective.trains_autoencoder
        return super().judged_factors if images_are_judged else self.first_stage.downsampling

    @property
    def autoencoder(self) -> nn.Module:
        return self.first_stage.autoencoder

    @property
    def generator(self) -> list[nn.Module]:
        return [self.translator, *([self.autoencoder] if self.objective.trains_autoencoder else [])]

    @property
    def ema_modules(self) -> nn.ModuleDict | None:
        """The translator; None where the autoencoder, whose codebook has no average, trains along."""
        return None if self.objective.trains_autoencoder else nn.ModuleDict({"translator": self.translator})

    def as_first_stage(self, **options: Any) -> FirstStage:
        """The frozen stage of a diffusion model: autoencoder, translator and latent statistics, as they were
        trained. ValueError for any of the `options`.
        """
        for name, value in sorted(options.items()):
            raise ValueError(f"{name}={value}: a translator keeps the latents that it was trained on")
        old = self.first_stage
        stage = FirstStage(
            old.autoencoder,
            self.translator,
            latent=old.latent,
            requantize=old.requantize,
            normalisation=old.normalisation,
        ).to(old.shift.device)
        for name in ("shift", "scale", "is_fitted"):
            getattr(stage, name).copy_(getattr(old, name))
        return stage

    def setup(self, stage: str) -> None:
        """Builds the perceptual network; InputError where its weights are not on this machine."""
        if getattr(self.objective, "perceptual", None) is not None:
            self.objective.perceptual.build()

    def train(self, mode: bool = True) -> "TranslationModule":
        super().train(mode)
        if self.objective.trains_autoencoder:
            self.autoencoder.train(mode)  # the first stage pins it to eval
        return self

    def encode(self, x: Tensor):
        """(B, C, *S) -> normalised latent with gradients, and what the quantiser says."""
        h = self.autoencoder.encode(x)
        quantized = self.autoencoder.quantize(h)
        return self.first_stage.scaled(quantized.z if self.first_stage.latent == "quant" else h), quantized

    def generator_step(self, batch: dict, batch_idx: int, factor: float) -> GeneratorStep:
        def slices_of(x: Tensor) -> tuple[int, Tensor]:
            return self.draw_slices(x, batch_idx)

        losses, reconstruction, total, real, fake = self.objective(self, batch, slices_of)
        slices, label = slices_of(real), batch["label"]
        if factor:
            total = total + self.adversarial_term(
                losses,
                reconstruction,
                real,
                fake,
                slices,
                factor=factor,
                last_layer=self.generator[-1].last_layer,  # the decoder's where it trains along
                label=label,
            )
        return GeneratorStep({"loss": total} | losses, real, fake, slices, label)

    @torch.no_grad()
    def translated(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Translated latents and images of a batch of pairs, float32."""
        z = self.translator(stage_latents(self.first_stage, batch, "source"), batch["label"]).float()
        return z, self.first_stage.decode(z).float()

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The unweighted L1 of the objective's space; PSNR and SSIM of images where the batch has them."""
        z, x_hat = self.translated(batch)
        if self.objective.trains_autoencoder:
            loss = F.l1_loss(x_hat, batch["image"])
        else:
            loss = F.l1_loss(z, stage_latents(self.first_stage, batch))
        terms: dict = {"val/loss": loss}
        if "image" in batch:
            real, fake = (batch["image"] + 1) / 2, (x_hat.clamp(-1, 1) + 1) / 2
            self.val_psnr.update(psnr(fake, real, data_range=1.0))
            self.val_ssim.update(ssim(fake, real, data_range=1.0))
            terms |= {"val/psnr": self.val_psnr, "val/ssim": self.val_ssim}
        self.log_dict(terms, on_epoch=True, batch_size=len(z), sync_dist=True)

    @torch.no_grad()
    def picture(self, batch: dict) -> list[Tensor]:
        """Rows for the sample grid: sources, targets and translations, each (B, C, *S) in [-1, 1]."""
        stages = [stage_latents(self.first_stage, batch, key) for key in ("source", "image")]
        rows = [self.first_stage.decode(z) for z in stages] + [self.translated(batch)[1]]
        return [row.float().clamp(-1, 1) for row in rows]
