"""Distillation: a student learns to sample in a few evaluations what its teacher samples in many.

It learns pairs of noise and the teacher's deterministic sample of it, as in the reflow of rectified flow (Liu
et al. 2022) and in knowledge distillation of samplers (Luhman & Luhman 2021), along the path of the teacher.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from medldm.diffusion.condition import Condition, in_float32
from medldm.diffusion.objective import guided
from medldm.diffusion.sampler import SAMPLERS, Sampler, check_guidance
from medldm.diffusion.timegrid import spaced_times
from medldm.models.common import rank_part, step_generator
from medldm.models.diffusion import DiffusionModule


def teachers_sampler(kind: str, num_steps: int, guidance_scale: float) -> Sampler:
    """The sampler of a teacher, which must be deterministic. ValueError for a kind that adds noise."""
    if kind not in SAMPLERS or kind == "ancestral":
        kinds = ", ".join(name for name in SAMPLERS if name != "ancestral")
        raise ValueError(f"kind={kind} is none of {kinds}: a student learns one image for each noise")
    return SAMPLERS[kind](num_steps=num_steps, guidance_scale=guidance_scale)


class DistillationModule(DiffusionModule):
    """A student with the networks of its teacher, trained on (noise, the teacher's sample of it).

    It is trained at those times alone at which it will be evaluated: of a trailing spacing for each of the
    numbers of evaluations in `student_steps`. Every pair is used at all of them, since it has cost as many
    evaluations of the teacher as its sampler takes. `teacher` names that sampler: kind, num_steps and
    guidance_scale; the student learns guided samples, and needs no second evaluation for guidance. The
    teacher itself is given to `learn_from` for a training, and is not needed to sample. Other arguments are
    those of `DiffusionModule`.
    """

    def __init__(
        self,
        first_stage: nn.Module,
        conditioner: nn.Module,
        network: nn.Module,
        *,
        teacher: Mapping[str, Any],
        student_steps: Sequence[int],
        optimizer: Callable,
        **options: Any,
    ) -> None:
        super().__init__(first_stage, conditioner, network, optimizer=optimizer, **options)
        if self.objective.prediction == "noise":
            raise ValueError(
                "the teacher predicts noise, which at pure noise says nothing of an image; give one that "
                "predicts the velocity or the image, or a preconditioned one"
            )
        if not student_steps or min(student_steps) < 1:
            raise ValueError(f"student_steps={list(student_steps)} must be whole numbers of at least 1")
        self.student_steps = tuple(student_steps)
        self.teachers_sampler = teachers_sampler(
            teacher["kind"], teacher["num_steps"], teacher["guidance_scale"]
        )
        self.teachers: tuple[
            DiffusionModule, ...
        ] = ()  # one in training; a tuple keeps it out of the state dict

    def learn_from(self, teacher: DiffusionModule) -> None:
        """Sets the trained model whose samples are learnt, and freezes it."""
        check_guidance(self.teachers_sampler, teacher.conditioner)
        self.teachers = (teacher.eval().requires_grad_(False),)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.teachers[0].to(self.device)

    def student_times(self) -> Tensor:
        """(K,) falling float64 times at which any of the student's samplers evaluates it."""
        grids = [spaced_times(n, self.schedule, "trailing", None)[0] for n in self.student_steps]
        return torch.cat(grids).unique().flip(0)

    @torch.no_grad()
    def teachers_image(self, batch: dict, noise: Tensor, drop: Tensor | None) -> Tensor:
        """The samples of the teacher from `noise` (B, Cz, *s) under the conditions of a batch."""
        teacher, sampler = self.teachers[0], self.teachers_sampler

        def condition(dropped: Tensor | None) -> Condition:
            found = teacher.conditioner(teacher.with_map_latent(batch), teacher.first_stage, dropped)
            return in_float32(found)  # as in the last step of a sampler

        null = None
        if sampler.guidance_scale != 1:
            null = condition(teacher.conditioner.drop_groups(len(noise), None, noise.device))
        denoise = guided(
            teacher.objective,
            teacher.network,
            teacher.schedule,
            condition(drop),
            null,
            scale=sampler.guidance_scale,
        )
        return sampler(denoise, teacher.schedule, noise)

    def pair_losses(self, batch: dict, noise: Tensor, drop: Tensor | None) -> dict[str, Tensor]:
        """The losses of the objective on the teacher's images, as means over the student's times."""
        x = self.teachers_image(batch, noise, drop)
        condition = self.conditioner(self.with_map_latent(batch), self.first_stage, drop)
        losses = [
            self.objective(
                self.network, self.schedule, x, condition, t=time.float().expand(len(x)), noise=noise
            )
            for time in self.student_times().to(x.device)
        ]
        return {name: torch.stack([loss[name] for loss in losses]).mean() for name in losses[0]}

    def noise_like(self, batch: dict, count: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise (count, Cz, *s) of the shape of the latents of a batch."""
        shape = (
            batch["latent"].shape[2:] if "latent" in batch else self.latent_shape(batch["image"].shape[2:])
        )
        size = (count, self.first_stage.latent_channels, *shape)
        return torch.randn(size, device=generator.device, generator=generator)

    def losses(self, batch: dict, step: int) -> dict[str, Tensor]:
        rank, world = self.global_rank, self.trainer.world_size
        image = batch["latent" if "latent" in batch else "image"]
        generator = step_generator(self.seed, step, image.device)
        noise = self.noise_like(batch, world * len(image), generator)
        drop = self.conditioner.sample_drop(world * len(image), generator, image.device)
        noise, drop = (rank_part(v, rank, world) for v in (noise, drop))
        return self.pair_losses(batch, noise, drop)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Logs the training loss on fixed noise, so that epochs can be compared."""
        image = batch["latent" if "latent" in batch else "image"]
        generator = step_generator(self.seed, -1 - batch_idx, torch.device("cpu"))
        noise = self.noise_like(batch, len(image), generator).to(image.device)
        losses = self.pair_losses(batch, noise, None)
        terms = {f"val/{name}": value for name, value in losses.items()}
        self.log_dict(terms, on_epoch=True, batch_size=len(image), sync_dist=True)
