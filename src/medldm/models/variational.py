"""Medical VDM: encoder, decoder, score network and noise schedule trained together on one bound.

Kingma et al. 2021.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from medldm.batch import spatial_shape
from medldm.diffusion.condition import Condition, Conditioner, in_float32
from medldm.diffusion.objective import guided
from medldm.diffusion.sampler import Sampler, check_guidance
from medldm.diffusion.schedule import NoiseSchedule
from medldm.diffusion.variational import Bound, ImageTerms, VariationalObjective, bits
from medldm.metrics.image import psnr, ssim
from medldm.models.common import (
    TrainedModule,
    build_optimizer,
    case_generators,
    case_noise,
    multiplied,
    rank_part,
    step_generator,
)
from medldm.models.protocols import Output, Request
from medldm.models.variational_pictures import figures_of, picture_rows

MIN_SSIM_SIZE = 11  # the window


class VariationalModule(TrainedModule):
    """`codec` between images and latents, `network` as the score of the latents under the `conditioner`'s
    label.

    The same embedding, with the same null, enters codec and network, in training and in guidance.
    `image_terms` add Medical VDM's errors of the decoded mean to the loss, outside the bound that is
    reported. All random numbers of a step are a function of `seed` and the step, drawn for the global batch,
    separately for times, diffusion noise, decoder noise and labels.
    """

    validation_metrics = ("val/loss", "val/bpd_total", "val/recon_gap", "val/psnr", "val/ssim")

    def __init__(
        self,
        codec: nn.Module,
        conditioner: Conditioner,
        network: nn.Module,
        *,
        schedule: NoiseSchedule,
        objective: VariationalObjective,
        likelihood: nn.Module,
        sampler: Sampler,
        image_terms: ImageTerms,
        seed: int = 0,
        **optimisation,
    ) -> None:
        """`optimisation`: what `TrainedModule` takes."""
        super().__init__(**optimisation)
        self.codec, self.conditioner, self.network = codec, conditioner, network
        self.schedule, self.objective, self.sampler = schedule, objective, sampler
        self.likelihood, self.image_terms, self.seed = likelihood, image_terms, seed

    # ---- training --------------------------------------------------------------------------------------

    @staticmethod
    def batch_keys(model: Mapping[str, Any], *, is_cached: bool) -> tuple[str, ...]:
        conditions = model["conditioner"]
        return ("image", *(key for key in ("mask", "edges") if conditions.get(f"use_{key}")))

    @property
    def trained_parts(self) -> dict[str, nn.Module]:
        names = ("codec", "conditioner", "network", "schedule", "likelihood")
        return {name: getattr(self, name) for name in names}

    @property
    def ema_modules(self) -> nn.ModuleDict:
        """What a moving average follows: everything, as nothing here is frozen."""
        return nn.ModuleDict(self.trained_parts)

    @property
    def size_factors(self) -> tuple[int, ...]:
        parts = (getattr(self.codec, "autoencoder", None), getattr(self.network, "unet", self.network))
        return multiplied(*(getattr(part, "downsampling", ()) for part in parts))

    @property
    def condition_keys(self) -> tuple[str, ...]:
        """What a batch must hold to sample: an unconditional model takes the images' number from it."""
        return self.conditioner.batch_keys or ("image",)

    @property
    def outputs(self) -> dict[str, Output]:
        return {"variational": Output(self.condition_keys, self.draw, is_generative=True)}

    @property
    def compiled_parts(self) -> list[nn.Module]:
        return [self.network]

    def configure_optimizers(self):
        optimizer = build_optimizer(self.make_optimizer, list(self.trained_parts.values()))
        return [optimizer], [{"scheduler": self.learning_rate(optimizer), "interval": "step"}]

    def losses(self, batch: dict, step: int) -> dict[str, Tensor]:
        """The bound and, where weighted, the two extra terms, of one training batch."""
        x, rank, world = batch["image"], self.global_rank, self.trainer.world_size
        generator = step_generator(self.seed, step, x.device)
        n = world * len(x)
        t = self.objective.sample_times(n, self.schedule, x.device, generator)
        drop = self.conditioner.sample_drop(n, generator, x.device)
        t, drop = rank_part(t, rank, world), rank_part(drop, rank, world)
        condition = self.conditioner(batch, None, drop)

        def draw(shape: tuple[int, ...], sample: Callable = torch.randn) -> Tensor:
            return rank_part(sample(n, *shape, device=x.device, generator=generator), rank, world)

        return self.bound_losses(x, condition, t, draw)

    def bound_losses(self, x: Tensor, condition: Condition, t: Tensor, draw: Callable) -> dict[str, Tensor]:
        """The bound of images x (B, C, *S) at times t, with the noise that `draw` gives."""
        u = draw(tuple(x.shape[1:]), torch.rand) if self.likelihood.is_random else None
        x_seen = self.likelihood.observe(x, u)
        f = self.encode(x_seen, condition)
        noise, noise_0 = draw(tuple(f.shape[1:])), draw(tuple(f.shape[1:]))
        output = self.decoder_output(self.objective.decoder_input(self.schedule, f, noise_0), condition)
        recon = self.likelihood.nats(output, x_seen, self.gamma_0())
        num_dims = x[0].numel()
        losses = self.objective(
            self.network, self.schedule, f, condition, t=t, noise=noise, recon=recon, num_dims=num_dims
        )
        losses["entropy_floor"] = bits(self.likelihood.entropy_floor(x).mean(), num_dims)
        losses["recon_gap"] = losses["bpd_recon"] - losses["entropy_floor"]
        losses["rms_latent"] = f.detach().float().square().mean().sqrt()
        return losses | self.image_terms(losses["loss"], self.likelihood.expected(output), x_seen)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The bound on fixed noise and evenly spread times, and the quality of the autoencoder at t = 0."""
        x = batch["image"]
        generator = step_generator(self.seed, -1 - batch_idx, torch.device("cpu"))

        def draw(shape: tuple[int, ...], sample: Callable = torch.randn) -> Tensor:
            return sample(len(x), *shape, generator=generator).to(x.device)

        u = (torch.arange(len(x)) + torch.rand((), generator=generator)) / len(x)
        t = self.objective.place(u.double(), self.schedule).to(x.device)
        condition = self.condition(batch)
        losses = self.bound_losses(x, condition, t, draw)
        terms = {f"val/{name}": value for name, value in losses.items()}
        if min(spatial_shape(x), default=0) >= MIN_SSIM_SIZE:
            x_hat = self.shortcut(x, condition, generator=generator)
            real, fake = (x.float() + 1) / 2, (x_hat.clamp(-1, 1) + 1) / 2
            terms["val/psnr"] = psnr(fake, real, data_range=1.0).mean().float()
            terms["val/ssim"] = ssim(fake, real, data_range=1.0).mean().float()
        self.log_dict(terms, on_epoch=True, batch_size=len(x), sync_dist=True)

    def predict_step(self, batch: dict, batch_idx: int) -> Tensor:
        """One sample for each label of a batch."""
        names = [f"{batch_idx}_{i}" for i in range(len(batch["image"]))]
        return self.sample(batch, names, self.latent_shape(spatial_shape(batch["image"])))

    # ---- parts of the model ----------------------------------------------------------------------------

    def condition(self, batch: dict, drop: tuple[str, ...] | None = ()) -> Condition:
        """The condition of a batch without the groups in `drop`; None drops all: the null of guidance."""
        size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
        return in_float32(
            self.conditioner(batch, None, self.conditioner.drop_groups(size, drop, self.device))
        )

    def embed(self, label: Tensor) -> Tensor | None:
        """(B,) labels, -1 for none -> (B, E), or None for an unconditional model."""
        return self.condition({"label": label}).embedding

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.codec.latent_shape(image_shape)

    def encode(self, x: Tensor, condition: Condition) -> Tensor:
        """(B, C, *S) in [-1, 1] -> f (B, Cz, *s)."""
        return self.codec.encode(x, condition.embedding).float()

    def decoder_output(self, z: Tensor, condition: Condition) -> Tensor:
        """f (B, Cz, *s) -> the likelihood's parameters (B, C, *S)."""
        return self.codec.decode(z, condition.embedding).float()

    def expected_image(self, z: Tensor, condition: Condition) -> Tensor:
        """f (B, Cz, *s) -> the expected image (B, C, *S) in [-1, 1]."""
        return self.likelihood.mean(self.decoder_output(z, condition))

    def decode(self, z: Tensor, batch: dict) -> Tensor:
        """Latents (B, Cz, *s) -> images (B, C, *S) in [-1, 1] under the condition of a batch."""
        return self.expected_image(z, self.condition(batch))

    def gamma_0(self) -> Tensor:
        return self.schedule.gamma(torch.zeros((), device=self.device))

    def predict(self, z_t: Tensor, t: Tensor, condition: Condition) -> tuple[Tensor, Tensor]:
        """(noise_hat, x0_hat) at times (B,)."""
        gamma = self.schedule.gamma(t)
        noise_hat = self.network(z_t, self.schedule.network_time(t, gamma), condition).float()
        scales = self.schedule.scales(gamma, noise_hat)
        return noise_hat, (z_t - scales.sigma * noise_hat) / scales.alpha

    # ---- what the model is for -------------------------------------------------------------------------

    @torch.no_grad()
    def shortcut(self, x: Tensor, condition: Condition, generator: torch.Generator | None = None) -> Tensor:
        """Encode, the noise of t = 0, decode: the autoencoder's quality. Image in [-1, 1]."""
        noise_device = generator.device if generator else x.device
        u = torch.rand(x.shape, device=noise_device, generator=generator).to(x.device)
        f = self.encode(self.likelihood.observe(x, u), condition)
        noise = torch.randn(f.shape, device=noise_device, generator=generator).to(f.device)
        return self.expected_image(self.objective.decoder_input(self.schedule, f, noise), condition)

    @torch.no_grad()
    def recon(
        self,
        x: Tensor,
        condition: Condition,
        t: float = 0.8,
        *,
        sampler: Sampler | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Diffuse to the grid time at or below `t`, run the chain back, decode. Image in [-1, 1]."""
        sampler = sampler or self.sampler
        f = self.encode(self.likelihood.observe(x, torch.rand_like(x)), condition)
        first = sampler.first_step(self.schedule, t)
        time = sampler.time_grid(self.schedule, f.device).times[first].expand(len(f))
        noise = torch.randn(f.shape, device=f.device, generator=generator)
        z_t = self.schedule.add_noise(f, noise, self.schedule.gamma(time))
        denoise = self.objective.denoiser(self.network, self.schedule, condition)
        z = sampler(denoise, self.schedule, z_t, generator, first=first)
        return self.expected_image(self.clean(z, sampler), condition)

    def clean(self, z: Tensor, sampler: Sampler) -> Tensor:
        """What the decoder expects from where a sampler stops: z_0 / alpha_0, or x0_hat as it is."""
        if sampler.clean_last_step:
            return z
        return z / torch.sigmoid(-self.gamma_0()).sqrt()

    def draw(self, batch: dict, size: tuple[int, ...], request: Request) -> Tensor:
        """New images of the grid `size` under the conditions of a batch."""
        options = {"seed": request.seed, "drop": request.drop, "callback": request.callback}
        return self.sample(batch, batch["case_id"], self.latent_shape(size), **options)

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
        callback: Callable | None = None,
    ) -> Tensor:
        """Images (B, C, *S) in [-1, 1] for the labels of a batch; `names` and `seed` decide the noise."""
        sampler = sampler or self.sampler
        check_guidance(sampler, self.conditioner, drop)
        condition, null = self.condition(batch, drop), self.condition(batch, None)
        noise = case_noise(names, (self.codec.latent_channels, *latent_shape), seed).to(self.device)
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
        return self.expected_image(self.clean(z, sampler), condition)

    def generate(
        self,
        num_samples: int,
        image_shape: tuple[int, ...],
        *,
        label: int = -1,
        seed: int = 0,
        sampler: Sampler | None = None,
    ) -> Tensor:
        """`num_samples` images of the grid `image_shape`; `label` -1 is unconditional."""
        batch = {"label": torch.full((num_samples,), label, device=self.device)}
        names = [str(i) for i in range(num_samples)]
        return self.sample(batch, names, self.latent_shape(image_shape), seed=seed, sampler=sampler)

    @torch.no_grad()
    def vlb_exact(
        self,
        x: Tensor,
        condition: Condition,
        *,
        num_timesteps: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Bound:
        """Reconstruction, prior and all T diffusion terms, (B,) nats."""
        x = self.likelihood.observe(x, torch.rand(x.shape, device=x.device, generator=generator))
        f = self.encode(x, condition)
        noise = torch.randn(f.shape, device=f.device, generator=generator)
        output = self.decoder_output(self.objective.decoder_input(self.schedule, f, noise), condition)
        recon = self.likelihood.nats(output, x, self.gamma_0())
        return self.objective.exact(
            self.network,
            self.schedule,
            f,
            condition,
            num_timesteps=num_timesteps,
            recon=recon,
            generator=generator,
        )

    @torch.no_grad()
    def classify(
        self, x: Tensor, num_labels: int, *, num_timesteps: int | None = None, seed: int = 0
    ) -> Tensor:
        """(B,) labels with the lowest bound, the null left out, all on the same noise."""
        totals = []
        for label in range(num_labels):
            condition = self.condition({"label": torch.full((len(x),), label, device=x.device)})
            generator = torch.Generator(x.device).manual_seed(seed)
            bound = self.vlb_exact(x, condition, num_timesteps=num_timesteps, generator=generator)
            totals.append(bound.total)
        return torch.stack(totals).argmin(0)

    # ---- pictures --------------------------------------------------------------------------------------

    def picture(self, batch: dict) -> list[Tensor]:
        return picture_rows(self, batch)

    def figures(self, batch: dict) -> dict[str, Tensor]:
        return figures_of(self, batch)
