"""Manual optimisation of a generator and its discriminators, shared by every model that trains with both."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medldm.losses import (
    AdversarialLoss,
    adaptive_weight,
    feature_matching,
    norm_ratio,
    random_slices,
    total,
    weighted,
)
from medldm.models.common import (
    TrainedModule,
    build_optimizer,
    clip_gradients,
    rank_part,
    scaled_rate,
    step_generator,
)
from medldm.networks.compiling import Function, is_wrapped


class GeneratorStep(NamedTuple):
    """What one forward pass leaves for the two updates."""

    losses: dict[str, Tensor]  # "loss" is what the generator minimises; the others are logged
    real: Tensor  # (B, C, *S) what the discriminators compare
    fake: Tensor
    slices: tuple[int, Tensor]  # axis and index of the slice that 2D discriminators of volumes see
    label: Tensor | None = None  # (B,) class of `real`, for discriminators that tell classes apart
    logs: Mapping[str, Tensor] = MappingProxyType({})


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """While the block runs, the module's own parameters get no gradients. They do again afterwards, even if
    the block fails.
    """
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)


def mixes_samples(discriminator: nn.Module) -> bool:
    """Whether what it makes of an image depends on the others of the batch."""
    return any(isinstance(part, _BatchNorm) for part in discriminator.modules())


class AdversarialModule(TrainedModule):
    """Trains a generator and its discriminators from one forward pass a step. A subclass gives `generator`
    and `generator_step`.

    `trainer.global_step` counts the generator's updates: the discriminators' optimiser steps outside
    Lightning's count. Accumulation and clipping are done here, because Lightning refuses them under manual
    optimisation; `medldm train` moves the trainer's keys to this module.
    A discriminator of fewer dimensions than the image sees one random slice per sample.
    """

    def __init__(
        self,
        *,
        optimizer: Callable,
        discriminators: Sequence[nn.Module] = (),
        adversarial: AdversarialLoss | None = None,
        discriminator_optimizer: Callable | None = None,
        warmup_steps: int = 0,
        cosine_steps: int | None = None,
        slice_axes: Sequence[int] = (0,),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer=optimizer, warmup_steps=warmup_steps, cosine_steps=cosine_steps)
        if bool(discriminators) != (adversarial is not None):
            raise ValueError("discriminators and adversarial belong together: give both or neither")
        self.automatic_optimization = False
        self.discriminators = nn.ModuleList(discriminators)
        self.adversarial = adversarial
        self.make_discriminator_optimizer = discriminator_optimizer or optimizer
        self.slice_axes, self.seed = tuple(slice_axes), seed
        self.gradient_clip_val: float | None = None
        self.is_accumulating = False  # gradients of a part of a batch are pending
        self.features_of_real: dict[nn.Module, list[Tensor]] = {}  # with their graphs, for this step
        self.matching, self.ratio = Function(feature_matching), Function(norm_ratio)
        if adversarial is not None:
            self.generator_loss = Function(adversarial.generator_loss)
            self.judgement = Function(adversarial.discriminator_loss)

    def scale_learning_rates(self, factor: float) -> None:
        super().scale_learning_rates(factor)
        self.make_discriminator_optimizer = scaled_rate(self.make_discriminator_optimizer, factor)

    @property
    def generator(self) -> list[nn.Module]:
        """The modules that the generator's optimiser updates."""
        raise NotImplementedError

    def generator_step(self, batch: dict, batch_idx: int, factor: float) -> GeneratorStep:
        """Forward pass and losses; `factor` is how much the discriminators count now, 0 before their start.

        Their `adversarial_term` is to be added to the loss exactly where `factor` is not 0.
        """
        raise NotImplementedError

    @property
    def judges(self) -> list[nn.Module]:
        """The networks that compare images in training, each with its `spatial_dims` and `smallest_size`."""
        return list(self.discriminators)

    @property
    def judged_factors(self) -> tuple[int, ...]:
        """How many voxels of an image stand for one of what is judged, for each axis."""
        return (1,) * len(self.size_factors)

    @property
    def smallest_size(self) -> tuple[int, ...]:
        axes = range(len(self.judged_factors))
        needed = [1] * len(axes)
        for judge in self.judges:
            is_whole = judge.spatial_dims == len(axes)
            for axis in axes:
                if is_whole or any(across != axis for across in self.slice_axes):
                    needed[axis] = max(needed[axis], judge.smallest_size)
        return tuple(n * f for n, f in zip(needed, self.judged_factors, strict=True))

    def configure_optimizers(self):
        optimizer = build_optimizer(self.make_optimizer, self.generator)
        schedule = self.learning_rate(optimizer)
        optimizers = [optimizer]
        if self.discriminators:
            optimizers.append(build_optimizer(self.make_discriminator_optimizer, [self.discriminators]))
        return optimizers, [schedule]

    def training_step(self, batch: dict, batch_idx: int) -> None:
        """One step of the generator and of the discriminators. They update after accumulated batches."""
        factor = self.adversarial.factor(self.global_step) if self.adversarial else 0.0
        is_last = (batch_idx + 1) % self.accumulate_grad_batches == 0 or self.trainer.is_last_batch
        self.is_accumulating = not is_last

        with frozen(self.discriminators):  # the generator's backward leaves no gradient in them
            step = self.generator_step(batch, batch_idx, factor)
            losses = dict(step.losses)
            self.manual_backward(self.share_of(losses["loss"]))
        if is_last:
            self.update_generator()
        if factor:
            losses["discriminator"] = self.discriminator_loss(
                step.real.detach(), step.fake.detach(), step.slices, step.label
            )
            self.manual_backward(self.share_of(weighted(factor, losses["discriminator"])))
            if is_last:
                self.update_discriminators()
        terms = {f"train/{name}": value.detach() for name, value in {**losses, **step.logs}.items()}
        self.log_dict(terms, batch_size=len(step.real))
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False, batch_size=len(step.real))

    def share_of(self, loss: Tensor) -> Tensor:
        """Of one of the batches that are accumulated."""
        return loss if self.accumulate_grad_batches == 1 else loss / self.accumulate_grad_batches

    def adversarial_term(
        self,
        losses: dict[str, Tensor],
        reconstruction: Tensor,
        real: Tensor,
        fake: Tensor,
        slices: tuple[int, Tensor],
        *,
        factor: float,
        last_layer: Tensor,
        label: Tensor | None = None,
    ) -> Tensor:
        """The weighted term of the generator's loss; its parts are added to `losses` by name."""
        losses |= self.adversarial_losses(real, fake, slices, label)
        weight = self.adversarial.weight * factor
        if self.adversarial.adaptive:
            adaptive = adaptive_weight(reconstruction, losses["adversarial"], last_layer, ratio=self.ratio)
            weight = weighted(weight, adaptive)
        term = weighted(weight, losses["adversarial"])
        if "feature_matching" in losses:
            weight = self.adversarial.feature_matching_weight * factor
            term = term + weighted(weight, losses["feature_matching"])
        return term

    def adversarial_losses(
        self, x: Tensor, x_hat: Tensor, slices: tuple[int, Tensor], label: Tensor | None = None
    ) -> dict[str, Tensor]:
        adversarial, matching = [], []
        for discriminator in self.discriminators:
            fake = discriminator(self.view(x_hat, discriminator.spatial_dims, slices))
            term = self.generator_loss(fake[-1], label)
            adversarial.append(weighted(discriminator.weight, term))
            if self.adversarial.feature_matching_weight:
                real = self.real_features(discriminator, x, slices)
                matching.append(self.matching([r.detach() for r in real], fake))
        losses = {"adversarial": total(adversarial)}
        return losses | ({"feature_matching": total(matching)} if matching else {})

    def logits(self, discriminator: nn.Module, real: Tensor, fake: Tensor) -> Sequence[Tensor]:
        """Of real and fake images. In one pass on a GPU, where no batch norm would mix them; on a CPU that
        would change the order of sums.
        """
        features = self.features_of_real.pop(discriminator, None)
        if features is not None:
            return features[-1], discriminator(fake)[-1]
        if is_wrapped(discriminator) and not mixes_samples(discriminator):
            return discriminator(torch.cat([real, fake]))[-1].chunk(2)
        return discriminator(real)[-1], discriminator(fake)[-1]

    def real_features(self, discriminator: nn.Module, x: Tensor, slices: tuple[int, Tensor]) -> list[Tensor]:
        """What a discriminator makes of the real images. Its own update needs the same, so the graph is kept
        for it; not by batch norms, whose statistics see the real images twice a step.
        """
        view = self.view(x.detach(), discriminator.spatial_dims, slices)
        if mixes_samples(discriminator):
            with torch.no_grad():
                return discriminator(view)
        discriminator.requires_grad_(True)
        try:
            features = discriminator(view)
        finally:
            discriminator.requires_grad_(False)
        self.features_of_real[discriminator] = features
        return features

    def discriminator_loss(
        self, x: Tensor, x_hat: Tensor, slices: tuple[int, Tensor], label: Tensor | None = None
    ) -> Tensor:
        losses = []
        for discriminator in self.discriminators:
            views = (self.view(v, discriminator.spatial_dims, slices) for v in (x, x_hat))
            real, fake = self.logits(discriminator, *views)
            losses.append(self.judgement(real, fake, label))
        return total(losses)

    def draw_slices(self, x: Tensor, batch_idx: int) -> tuple[int, Tensor]:
        """An axis and one slice index per sample: a function of the seed, the step and the sample's place in
        the global batch.
        """
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
        clip_gradients((p for part in self.generator for p in part.parameters()), self.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
        schedulers = self.lr_schedulers()
        (schedulers[0] if isinstance(schedulers, list) else schedulers).step()

    def update_discriminators(self) -> None:
        # The raw optimiser: Lightning would count its steps in global_step.
        optimizer = self.optimizers()[1].optimizer
        clip_gradients(self.discriminators.parameters(), self.gradient_clip_val)
        optimizer.step()
        optimizer.zero_grad()
