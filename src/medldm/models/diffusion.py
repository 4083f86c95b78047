"""Stage two: diffusion of a first stage's latents under a condition. Rombach et al. 2022."""

from collections.abc import Callable, Iterable

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from medldm.diffusion.conditioner import Condition
from medldm.diffusion.objective import DenoisingObjective, guided
from medldm.diffusion.sampler import Sampler
from medldm.diffusion.schedule import NoiseSchedule
from medldm.models.common import (
    build_optimizer,
    case_generators,
    case_noise,
    fit_first_stage,
    rank_part,
    stage_latents,
    step_generator,
    warmup_cosine,
)


class DiffusionModule(LightningModule):
    """Denoiser (`network` and `conditioner`) over the latents of a frozen `first_stage`.

    batch["latent"] (the cache of `medldm encode`) is used where it is there, else batch["image"] is encoded.
    All random numbers of a step are a function of `seed` and the step, drawn for the global batch.
    """

    def __init__(
        self,
        first_stage: nn.Module,
        conditioner: nn.Module,
        network: nn.Module,
        *,
        schedule: NoiseSchedule,
        objective: DenoisingObjective,
        sampler: Sampler,
        optimizer: Callable,
        warmup_steps: int = 0,
        cosine_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.first_stage, self.conditioner, self.network = first_stage, conditioner, network
        self.schedule, self.objective, self.sampler = schedule, objective, sampler
        self.make_optimizer = optimizer
        self.warmup_steps, self.cosine_steps, self.seed = warmup_steps, cosine_steps, seed
        self.description: dict = {}  # what checkpoints.describe says of this module

    @property
    def ema_modules(self) -> nn.ModuleDict:
        """What a moving average follows: the denoiser and a learned schedule, not the frozen first stage."""
        return nn.ModuleDict(
            {"network": self.network, "conditioner": self.conditioner, "schedule": self.schedule}
        )

    validation_metrics = ("val/loss", "val/unweighted")

    @property
    def compiled_parts(self) -> list[nn.Module]:
        return [self.network]

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["medldm"] = self.description

    def configure_optimizers(self):
        optimizer = build_optimizer(self.make_optimizer, [self.network, self.conditioner, self.schedule])
        schedule = warmup_cosine(optimizer, warmup=self.warmup_steps, total=self.cosine_steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def latents(self, batch: dict) -> Tensor:
        """Normalised latents z (B, Cz, *s) of a batch."""
        return stage_latents(self.first_stage, batch)

    def fit_first_stage(self, batches: Iterable[dict]) -> None:
        """Set the latent statistics from the training set, once; a checkpoint that has them keeps them."""
        fit_first_stage(self.first_stage, batches, self.device)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor:
        z = self.latents(batch)
        losses = self.losses(batch, z, self.trainer.fit_loop.total_batch_idx)
        terms = {f"train/{name}": value.detach() for name, value in losses.items()}
        self.log_dict(terms, batch_size=len(z))
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False, batch_size=len(z))
        return losses["loss"]

    def losses(self, batch: dict, z: Tensor, step: int) -> dict[str, Tensor]:
        rank, world = self.global_rank, self.trainer.world_size
        generator = step_generator(self.seed, step, z.device)
        t = self.objective.sample_times(world * len(z), self.schedule, z.device, generator)
        noise = torch.randn(world * len(z), *z.shape[1:], device=z.device, generator=generator)
        drop = self.conditioner.sample_drop(world * len(z), generator, z.device)
        t, noise, drop = (rank_part(v, rank, world) for v in (t, noise, drop))
        condition = self.conditioner(batch, self.first_stage, drop)
        return self.objective(self.network, self.schedule, z, condition, t=t, noise=noise)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The training loss on fixed noise and evenly spread times, so that epochs compare."""
        z = self.latents(batch)
        generator = step_generator(self.seed, -1 - batch_idx, torch.device("cpu"))
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        u = (torch.arange(len(z), device=z.device) + torch.rand((), generator=generator)) / len(z)
        steps = self.schedule.num_timesteps or 1000
        t = ((u * steps).floor().clamp(max=steps - 1) + 1) / steps
        condition = self.conditioner(batch, self.first_stage)
        losses = self.objective(self.network, self.schedule, z, condition, t=t, noise=noise)
        terms = {f"val/{name}": value for name, value in losses.items()}
        self.log_dict(terms, on_epoch=True, batch_size=len(z), sync_dist=True)

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.first_stage.latent_shape(image_shape)

    def condition(self, batch: dict, drop: tuple[str, ...] | None = ()) -> Condition:
        """The condition of a batch without the groups in `drop`; None drops all: the null of guidance."""
        size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
        return self.conditioner(
            batch, self.first_stage, self.conditioner.drop_groups(size, drop, self.device)
        )

    @torch.no_grad()
    def sample(
        self,
        batch: dict,
        names: list[str],
        latent_shape: tuple[int, ...],
        *,
        sampler: Sampler | None = None,
        seed: int = 0,
        drop: tuple[str, ...] = (),
        decoder_map: Tensor | None = None,
        callback: Callable | None = None,
    ) -> Tensor:
        """Images (B, C, *S) in about [-1, 1] under the batch's condition.

        `names` identify the samples: all noise is seeded by name and `seed`, so a sample is the same in
        every batch.
        """
        sampler = sampler or self.sampler
        noise = case_noise(names, (self.first_stage.latent_channels, *latent_shape), seed).to(self.device)
        condition = self.condition(batch, drop)
        null = condition if sampler.guidance_scale == 1 else self.condition(batch, None)
        denoise = guided(
            self.objective,
            self.network,
            self.schedule,
            condition,
            null,
            scale=sampler.guidance_scale,
            rescale=sampler.guidance_rescale,
        )
        generator = case_generators(names, seed, self.device)
        z = sampler(denoise, self.schedule, noise, generator, callback)
        return self.first_stage.decode(z, decoder_map)

    def picture(self, batch: dict) -> list[Tensor]:
        """Rows for the sample grid: real images (where the batch has them), samples, edges and map."""
        names = [f"grid{i}" for i in range(len(next(iter(batch.values()))))]
        z = self.latents(batch)
        sampled = self.sample(batch, names, tuple(z.shape[2:])).float().clamp(-1, 1)
        real = batch["image"] if "image" in batch else self.first_stage.decode(z).float().clamp(-1, 1)
        rows = [real, sampled]
        if "source" in batch or "source_latent" in batch:
            source = stage_latents(self.first_stage, batch, "source")
            rows.insert(0, self.first_stage.decode(source).float().clamp(-1, 1))
        if "edges" in batch:
            rows.append(batch["edges"] * 2 - 1)
        if "mask" in batch:
            rows.append(batch["mask"] / batch["mask"].amax().clamp(min=1) * 2 - 1)
        return rows
