"""Stage two: diffusion of a first stage's latents under a condition. Rombach et al. 2022."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from medldm.devices import in_precision_of_now
from medldm.diffusion.condition import Condition, Conditioner, in_float32
from medldm.diffusion.latent import FirstStage
from medldm.diffusion.objective import Denoise, DenoisingObjective, autoguided, guided
from medldm.diffusion.sampler import Sampler, check_guidance
from medldm.diffusion.schedule import NoiseSchedule
from medldm.diffusion.static import Given
from medldm.diffusion.windows import Box, ConditionOf, WindowConditions, Windows, windowed
from medldm.errors import InputError
from medldm.models.common import (
    TrainedModule,
    build_optimizer,
    case_generators,
    case_noise,
    multiplied,
    rank_part,
    stage_latents,
    step_generator,
)
from medldm.models.protocols import Output, Request, translations
from medldm.models.segmenter_loss import MAP_WEIGHTS, SegmenterLoss


def mix(condition: Condition, share: float) -> Condition:
    """The condition between the two samples of a batch; share 0 is the first sample's."""
    return Condition(*(None if x is None else torch.lerp(x[:1], x[1:], share) for x in condition))


def mixed_condition(conditions: ConditionOf, share: float, box: Box) -> Condition:
    return mix(conditions(box), share)


def latents_of(module: "DiffusionModule") -> tuple[Any, ...]:
    """What decides a model's latents and their levels of noise."""
    first_stage = module.description.get("first_stage") or {}
    scales = [module.first_stage.state_dict().get(name) for name in ("shift", "scale")]
    numbers = [None if value is None else value.tolist() for value in scales]
    return first_stage.get("sha256"), numbers, module.description["model"]["schedule"]


def check_guide(module: "DiffusionModule", guide: "DiffusionModule") -> None:
    """ValueError where two trained models do not denoise the same latents under what the first is given."""
    whats = ("made by another first stage", "scaled otherwise", "noised by another schedule")
    for what, mine, theirs in zip(whats, latents_of(module), latents_of(guide), strict=True):
        if mine != theirs:
            raise ValueError(f"its latents are {what}; give a model that was trained on the same")
    missing = set(guide.condition_keys) - set(module.condition_keys)
    if missing:
        raise ValueError(f"it needs {min(missing)}, which this model is not given")


class DiffusionModule(TrainedModule):
    """Denoiser (`network` and `conditioner`) over the latents of a frozen `first_stage`.

    batch["latent"] (the cache of `medldm encode`) is used where it is there, else batch["image"] is encoded.
    `map_stage` is a frozen autoencoder of semantic maps, whose latents the conditioner finds as
    batch["map_latent"]. `segmenter_loss` adds what a frozen segmenter says of x0_hat to the loss. Parts of
    which training changes a part alone name it as their `trained_part`: a frozen U-Net with a control branch.
    All random numbers of a step are a function of `seed` and the step, drawn for the global batch.
    """

    def __init__(
        self,
        first_stage: nn.Module,
        conditioner: Conditioner,
        network: nn.Module,
        *,
        map_stage: nn.Module | None = None,
        segmenter_loss: SegmenterLoss | None = None,
        schedule: NoiseSchedule,
        objective: DenoisingObjective,
        sampler: Sampler,
        optimizer: Callable,
        warmup_steps: int = 0,
        cosine_steps: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, warmup_steps=warmup_steps, cosine_steps=cosine_steps)
        self.first_stage, self.conditioner, self.network = first_stage, conditioner, network
        self.map_stage, self.segmenter_loss = map_stage, segmenter_loss
        self.schedule, self.objective, self.sampler = schedule, objective, sampler
        self.seed = seed
        self.guides: tuple[DiffusionModule, ...] = ()  # at most one; a tuple keeps it out of the state

    def guide_by(self, guide: TrainedModule) -> None:
        """Sample away from what `guide` would make, a worse model of the same latents. ValueError where they
        are others.
        """
        if not isinstance(guide, DiffusionModule):
            raise ValueError("no latent diffusion model; give a smaller or earlier one")
        check_guide(self, guide)
        self.guides = (guide,)

    @staticmethod
    def batch_keys(model: Mapping[str, Any], *, is_cached: bool) -> tuple[str, ...]:
        conditions = model["conditioner"]
        hint = model.get("adapter", {}).get("conditioner", {})
        keys = ["latent" if is_cached else "image"]
        if "latents" in conditions:  # of another modality
            keys.append("source_latent" if is_cached else "source")
        used = {key for key in ("mask", "edges") for of in (conditions, hint) if of.get(f"use_{key}")}
        segmenter = model.get("segmenter") or {}
        if any(segmenter.get(weight) for weight in MAP_WEIGHTS):
            used.add("mask")
        return (*keys, *(key for key in ("mask", "edges") if key in used))

    @property
    def ema_modules(self) -> nn.ModuleDict:
        """What a moving average follows: the denoiser and a learned schedule, not the frozen first stage, and
        of a controlled denoiser the branch alone.
        """
        parts = {"network": self.network, "conditioner": self.conditioner, "schedule": self.schedule}
        return nn.ModuleDict({name: getattr(part, "trained_part", part) for name, part in parts.items()})

    validation_metrics = ("val/loss", "val/unweighted")

    @property
    def size_factors(self) -> tuple[int, ...]:
        return multiplied(self.first_stage.downsampling, getattr(self.network, "downsampling", ()))

    @property
    def condition_keys(self) -> tuple[str, ...]:
        """What a batch must hold to sample: an unconditional model takes the images' number from it."""
        return self.conditioner.batch_keys or ("image",)

    @property
    def outputs(self) -> dict[str, Output]:
        drawn = Output(self.condition_keys, self.draw, is_generative=True, is_latent=True)
        return {"diffusion": drawn} | translations(self.translation)

    @property
    def translation(self) -> FirstStage | None:
        return None if self.first_stage.translator is None else self.first_stage

    @property
    def image_decoder(self) -> nn.Module | None:
        return self.first_stage.autoencoder

    def use_tiles(self, size: int) -> None:
        if self.image_decoder is None:
            raise InputError("tile: this model has no first stage to decode with; set it to null")
        self.first_stage.tile = size
        if self.map_stage is not None:
            self.map_stage.tile = size

    @property
    def compiled_parts(self) -> list[nn.Module]:
        return [self.network, *(part for guide in self.guides for part in guide.compiled_parts)]

    def configure_optimizers(self):
        optimizer = build_optimizer(self.make_optimizer, [self.network, self.conditioner, self.schedule])
        return [optimizer], [{"scheduler": self.learning_rate(optimizer), "interval": "step"}]

    def latents(self, batch: dict) -> Tensor:
        """Normalised latents z (B, Cz, *s) of a batch."""
        return stage_latents(self.first_stage, batch)

    def losses(self, batch: dict, step: int) -> dict[str, Tensor]:
        z, rank, world = self.latents(batch), self.global_rank, self.trainer.world_size
        generator = step_generator(self.seed, step, z.device)
        t = self.objective.sample_times(world * len(z), self.schedule, z.device, generator)
        noise = torch.randn(world * len(z), *z.shape[1:], device=z.device, generator=generator)
        drop = self.conditioner.sample_drop(world * len(z), generator, z.device)
        t, noise, drop = (rank_part(v, rank, world) for v in (t, noise, drop))
        return self.compared(z, batch, drop, t=t, noise=noise)

    def compared(
        self, z: Tensor, batch: dict, drop: Tensor | None, *, t: Tensor, noise: Tensor
    ) -> dict[str, Tensor]:
        """The objective's losses at given times under given noise, with those of a segmenter."""
        condition = self.conditioner(self.with_map_latent(batch), self.first_stage, drop)
        if self.segmenter_loss is None:
            return self.objective(self.network, self.schedule, z, condition, t=t, noise=noise)
        judged = self.objective.judged(self.network, self.schedule, z, condition, t=t, noise=noise)
        further = self.segmenter_loss(self.first_stage, batch, z, judged.x0_hat(), judged.gamma)
        return judged.losses | further | {"loss": judged.losses["loss"] + further["loss"]}

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """The training loss on fixed noise and evenly spread times, so that epochs compare."""
        z = self.latents(batch)
        generator = step_generator(self.seed, -1 - batch_idx, torch.device("cpu"))
        noise = torch.randn(z.shape, generator=generator).to(z.device)
        u = (torch.arange(len(z), device=z.device) + torch.rand((), generator=generator)) / len(z)
        steps = self.schedule.num_timesteps or 1000
        t = ((u * steps).floor().clamp(max=steps - 1) + 1) / steps
        losses = self.compared(z, batch, None, t=t, noise=noise)
        terms = {f"val/{name}": value for name, value in losses.items()}
        self.log_dict(terms, on_epoch=True, batch_size=len(z), sync_dist=True)

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        return self.first_stage.latent_shape(image_shape)

    def condition(self, batch: dict, drop: tuple[str, ...] | None = ()) -> Condition:
        """The condition of a batch without the groups in `drop`; None drops all: the null of guidance."""
        size = len(next(v for v in batch.values() if isinstance(v, Tensor)))
        dropped = self.conditioner.drop_groups(size, drop, self.device)
        return in_float32(self.conditioner(self.with_map_latent(batch), self.first_stage, dropped))

    def conditions(
        self, batch: dict, shape: tuple[int, ...], drop: tuple[str, ...] | None = ()
    ) -> WindowConditions:
        """`condition` for windows of latents of `shape`, made when they are asked for, from the part of the
        batch under a window where the conditioner allows that.
        """
        keys, halo = self.conditioner.batch_keys, getattr(self.conditioner, "halo", None)
        build = in_precision_of_now(partial(self.condition, drop=drop), self.device)
        return WindowConditions(build, batch, keys, shape, halo)

    @torch.no_grad()
    def with_map_latent(self, batch: dict) -> dict:
        if self.map_stage is None or "mask" not in batch:
            return batch
        return batch | {"map_latent": self.map_stage.encode_classes(batch["mask"])}

    def draw(self, batch: dict, size: tuple[int, ...], request: Request) -> Tensor:
        """New images of the grid `size` under the conditions of a batch."""
        options = {"seed": request.seed, "drop": request.drop, "callback": request.callback}
        shape = self.latent_shape(size)
        return self.sample(batch, batch["case_id"], shape, windows=request.windows, **options)

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
        windows: Windows | None = None,
        callback: Callable | None = None,
    ) -> Tensor:
        """Images (B, C, *S) in about [-1, 1] under the batch's condition.

        `names` identify the samples: all noise is seeded by name and `seed`, so a sample is the same in
        every batch. `windows` denoises latents larger than those of training. `callback` sees every step's
        x0_hat.
        """
        sampler = sampler or self.sampler
        check_guidance(sampler, self.conditioner, drop, has_guide=bool(self.guides))
        noise = case_noise(names, (self.first_stage.latent_channels, *latent_shape), seed).to(self.device)
        conditions = (self.conditions(batch, latent_shape, drop), self.opposed(batch, latent_shape, drop))
        generator = case_generators(names, seed, self.device)
        # The denoiser keeps what it has computed from the map: it is to be gone before the decoder runs.
        z = sampler(
            self.denoiser(*conditions, latent_shape, sampler, windows),
            self.schedule,
            noise,
            generator,
            callback,
        )
        return self.decode(z, batch)

    def denoiser(
        self,
        condition: ConditionOf,
        null: ConditionOf,
        latent_shape: tuple[int, ...],
        sampler: Sampler,
        windows: Windows | None = None,
    ) -> Denoise:
        """(z_t, t) -> x0_hat, guided as the sampler says, in windows where there are any. `null` is what
        `opposed` gives.
        """
        options = {"scale": sampler.guidance_scale, "rescale": sampler.guidance_rescale}
        build = partial(guided, self.objective, self.network, self.schedule, **options)
        if self.guides:
            build = partial(autoguided, self.plain_denoiser, self.guides[0].plain_denoiser, **options)
        windows = windows or Windows((None,) * len(latent_shape))
        return windowed(build, condition, null, latent_shape, windows)

    def plain_denoiser(self, condition: Given) -> Denoise:
        return self.objective.denoiser(self.network, self.schedule, condition)

    def opposed(self, batch: dict, shape: tuple[int, ...], drop: tuple[str, ...] = ()) -> WindowConditions:
        """What guidance leads away from: the guide's condition where there is a guide, else the null."""
        return (
            self.guides[0].conditions(batch, shape, drop)
            if self.guides
            else self.conditions(batch, shape, None)
        )

    def decode(self, z: Tensor, batch: dict) -> Tensor:
        """(B, Cz, *s) -> images; a SPADE decoder sees the map of the batch."""
        return self.first_stage.decode(z, self.first_stage.decoder_map(batch))

    @torch.no_grad()
    def interpolate(
        self,
        batch: dict,
        names: list[str],
        shares: Sequence[float],
        *,
        time: float = 0.5,
        sampler: Sampler | None = None,
        seed: int = 0,
        windows: Windows | None = None,
    ) -> Tensor:
        """Volumes between the two cases of a batch, (len(shares), C, *S); share 0 is the first case.

        Latents and conditions are mixed in a straight line, noised to `time` with one noise, and denoised
        from there: time 0 would give the mixture itself, time 1 forget it. Ho et al. 2020, section 4.
        """
        sampler = sampler or self.sampler
        check_guidance(sampler, self.conditioner, has_guide=bool(self.guides))
        z = self.latents(batch)
        shape = tuple(z.shape[2:])
        noise = case_noise(["+".join(names)], z.shape[1:], seed).to(z)
        first = sampler.first_step(self.schedule, time)
        start = sampler.time_grid(self.schedule).times[first].expand(1).to(z.device)
        conditions = [self.conditions(batch, shape), self.opposed(batch, shape)]
        volumes = []
        for share in shares:
            mixed = (partial(mixed_condition, condition, share) for condition in conditions)
            middle = torch.lerp(z[:1], z[1:], share)
            z_t = self.schedule.add_noise(middle, noise, self.schedule.gamma(start))
            generator = case_generators(["+".join(names)], seed, self.device)
            z_0 = sampler(
                self.denoiser(*mixed, shape, sampler, windows), self.schedule, z_t, generator, first=first
            )
            nearer = {key: value[round(share)][None] for key, value in batch.items() if key == "mask"}
            volumes.append(self.decode(z_0, nearer))
        return torch.cat(volumes)

    def picture(self, batch: dict) -> list[Tensor]:
        """Rows for the sample grid: real images (where the batch has them), samples, edges and map."""
        names = [f"grid{i}" for i in range(len(next(iter(batch.values()))))]
        z = self.latents(batch)
        sampled = self.sample(batch, names, tuple(z.shape[2:])).float().clamp(-1, 1)
        real = batch.get("image")
        if real is None:
            real = self.decode(z, batch).float().clamp(-1, 1)
        rows = [real, sampled]
        if "source" in batch or "source_latent" in batch:
            source = stage_latents(self.first_stage, batch, "source")
            rows.insert(0, self.first_stage.decode(source).float().clamp(-1, 1))
        if "edges" in batch:
            rows.append(batch["edges"] * 2 - 1)
        if "mask" in batch:
            rows.append(batch["mask"] / batch["mask"].amax().clamp(min=1) * 2 - 1)
        return rows
