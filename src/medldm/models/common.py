"""What the Lightning modules share: optimiser groups, learning-rate schedule, clipping, per-step random
numbers.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from medldm.devices import in_channels_last, to_channels_last
from medldm.diffusion.latent import FirstStage
from medldm.diffusion.schedule import NoiseSchedule
from medldm.errors import InputError
from medldm.models.protocols import Output
from medldm.ranks import num_ranks

log = logging.getLogger(__name__)
NUM_STATISTICS_SAMPLES = 4096  # images whose latents give the mean and deviation per channel


def parameter_groups(modules: Iterable[nn.Module], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices and kernels decay; biases, norms, embeddings and schedules do not."""
    modules = list(modules)
    parts = [part for module in modules for part in module.modules()]
    scheduled = {id(p) for part in parts if isinstance(part, NoiseSchedule) for p in part.parameters()}
    decayed, exempt, seen = [], [], set()
    for module in modules:
        for owner in module.modules():
            for parameter in owner.parameters(recurse=False):
                if not parameter.requires_grad or id(parameter) in seen:
                    continue
                seen.add(id(parameter))
                is_table = isinstance(owner, nn.Embedding) or id(parameter) in scheduled
                decays = parameter.ndim > 1 and not is_table
                (decayed if decays else exempt).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def build_optimizer(factory: Callable, modules: Sequence[nn.Module]) -> torch.optim.Optimizer:
    """`factory` is a partial of an optimiser class; its weight decay goes to the decaying group alone."""
    decay = factory.keywords.get("weight_decay", 0.0) if isinstance(factory, partial) else 0.0
    return factory(parameter_groups(modules, decay))


def scaled_rate(factory: Callable, factor: float) -> Callable:
    """The factory of an optimiser with its learning rate times `factor`. ValueError where it states none."""
    options = factory.keywords if isinstance(factory, partial) else {}
    if "lr" not in options:
        raise ValueError("the optimiser states no learning rate `lr` that could be scaled")
    return partial(factory.func, *factory.args, **options | {"lr": factor * options["lr"]})


class TrainedModule(LightningModule):
    """What every model shares: the defaults of `protocols.Trainable` and `protocols.Predictive`, the training
    step of models with one optimiser, the learning rate, clipping and memory layout.

    `cosine_steps` is the number of updates over which the learning rate falls along half a cosine to
    `cosine_final` of its value. None keeps it constant; 0 or less takes the length of the training, which is
    the trainer's max_steps or follows from its max_epochs and the number of batches.
    """

    takes_unlabelled: ClassVar[bool] = False
    validation_metrics: tuple[str, ...] = ("val/loss",)
    ema_modules: nn.ModuleDict | None = None
    encodes: str | None = None
    class_names: Sequence[str] = ()
    image_decoder: nn.Module | None = None
    translation: FirstStage | None = None

    def __init__(
        self,
        *,
        optimizer: Callable,
        warmup_steps: int = 0,
        cosine_steps: int | None = None,
        cosine_final: float = 0.0,
    ) -> None:
        super().__init__()
        self.conditioner = self.sampler = self.first_stage = None
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps}: the rate would be negative; give 0 or more")
        self.make_optimizer = optimizer
        self.warmup_steps, self.cosine_steps, self.cosine_final = warmup_steps, cosine_steps, cosine_final
        self.accumulate_grad_batches = 1  # of a module that steps by hand; else the trainer accumulates
        self.is_channels_last = False
        self.description: dict[str, Any] = {}
        self.first_stage_description: dict[str, Any] | None = None
        self.map_stage_description: dict[str, Any] | None = None
        self.facts: Mapping[str, Any] = {}

    def scale_learning_rates(self, factor: float) -> None:
        """Multiply the learning rate of every optimiser that is made from now on."""
        self.make_optimizer = scaled_rate(self.make_optimizer, factor)

    @property
    def size_factors(self) -> tuple[int, ...]:
        return ()

    @property
    def smallest_size(self) -> tuple[int, ...]:
        return ()

    @property
    def outputs(self) -> dict[str, Output]:
        return {}

    @property
    def needs_latent_statistics(self) -> bool:
        return self.first_stage is not None and not bool(self.first_stage.is_fitted)

    def fit_first_stage(self, batches: Iterable[dict]) -> None:
        """Set the latent statistics from the training set, once; a checkpoint that has them keeps them."""
        fit_first_stage(self.first_stage, batches, self.device)

    def figures(self, batch: dict) -> dict[str, Tensor]:
        return {}

    def segment(self, x: Tensor) -> Tensor:
        raise InputError(f"{type(self).__name__} segments no images; give a segmentation model")

    def use_tiles(self, size: int) -> None:
        raise InputError("tile: needs an autoencoder or latent diffusion checkpoint; set it to null")

    def as_first_stage(self, **options: Any) -> FirstStage:
        raise InputError(f"{type(self).__name__} encodes no images; give an autoencoder or a translator")

    def losses(self, batch: dict, step: int) -> dict[str, Tensor]:
        """ "loss", which is minimised, and the terms that are logged beside it; random numbers are a function
        of `step`.
        """
        raise NotImplementedError

    def training_step(self, batch: dict, batch_idx: int) -> Tensor | None:
        losses = self.losses(batch, self.trainer.fit_loop.total_batch_idx)
        size = len(next(value for value in batch.values() if isinstance(value, Tensor)))
        self.log_dict({f"train/{name}": value.detach() for name, value in losses.items()}, batch_size=size)
        self.log("loss", losses["loss"].detach(), prog_bar=True, logger=False, batch_size=size)
        return losses["loss"]

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["medldm"] = self.description

    def learning_rate(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        """Warm-up and cosine of this module's generator. InputError where a cosine has no end."""
        total = self.cosine_steps
        trainer = self._trainer  # `self.trainer` raises where there is none
        if trainer is not None and total is not None:
            length = num_updates(trainer, self.accumulate_grad_batches)
            if total <= 0 and length is None:
                raise InputError(
                    f"cosine_steps={total}: the training has no end; set max_steps or max_epochs of the "
                    "trainer, or cosine_steps to null"
                )
            if 0 < total < (length or math.inf) and self.cosine_final == 0:
                log.warning(
                    "cosine_steps=%s: the rate is 0 from there on, and the training has %s updates",
                    total, length or "no end of",
                )  # fmt: skip
            total = total if total > 0 else length
        return warmup_cosine(optimizer, warmup=self.warmup_steps, total=total, final=self.cosine_final)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Lightning's own refuses fused optimisers under mixed precision, whose bf16 needs no unscaling."""
        clip_gradients((p for group in optimizer.param_groups for p in group["params"]), gradient_clip_val)

    def use_channels_last(self) -> None:
        """Lay out the weights with channels last now, and every batch when it is moved to the device."""
        to_channels_last(self)
        self.is_channels_last = True

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return in_channels_last(batch) if self.is_channels_last else batch


def multiplied(*factors: Sequence[int]) -> tuple[int, ...]:
    """The product of several factors for each axis. Empty ones are left out; () where all are empty."""
    return tuple(math.prod(axis) for axis in zip(*filter(None, factors), strict=True))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> None:
    """Scale the gradients to a norm of at most `max_norm`; None or 0 leaves them. Nothing waits for the
    device.
    """
    if max_norm:
        nn.utils.clip_grad_norm_(parameters, max_norm)


def num_updates(trainer: Trainer, accumulate: int = 1) -> int | None:
    """Updates of the whole training, of the generator where two optimisers run; None where it has no end.

    `accumulate` is the module's own number of batches an update, which Lightning does not know of.
    """
    ends = [trainer.max_steps] if trainer.max_steps > 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        if trainer.train_dataloader is None:
            trainer.fit_loop.setup_data()
        batches = trainer.num_training_batches
        if math.isfinite(batches):
            accumulated = max(accumulate, trainer.accumulate_grad_batches)
            ends.append(math.ceil(batches / accumulated) * trainer.max_epochs)
    return min(ends, default=None)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, *, warmup: int = 0, total: int | None = None, final: float = 0.0
) -> LambdaLR:
    """The learning rate rises linearly over the first `warmup` updates. Where `total` is above 0, it also
    falls along half a cosine, to `final` of its value after `total` updates.
    """

    def multiplier(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if total is None or total <= 0:
            return rising
        progress = min(step, total) / total
        return rising * ((1 - final) * 0.5 * (1 + math.cos(math.pi * progress)) + final)

    return LambdaLR(optimizer, multiplier)


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """Random numbers of one step: a function of seed and step alone, so a resumed run draws the same ones.

    Every rank makes the same generator and draws for the global batch, then takes its part: N processes see
    the numbers that one process with N times the batch would see.
    """
    return torch.Generator(device).manual_seed((seed * 1_000_003 + step * 7_919 + 17) % 2**63)


def rank_part(x: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
    return x.chunk(world_size)[rank] if world_size > 1 else x


def seed_of(*parts: object) -> int:
    """A seed from names: the same on every machine and in every order of cases."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:7], "big")


def case_noise(names: Sequence[str], shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Starting noise (B, *shape) that belongs to a case and a seed, whatever the batch it is sampled in."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed_of(seed, n))) for n in names]
    )


def stage_latents(first_stage: FirstStage, batch: dict, image: str = "image") -> Tensor:
    """Normalised latents (B, Cz, *s) of batch["image"] or batch["source"]. Where the batch holds cached
    latents, the image is not encoded.
    """
    cached = {"image": "latent", "source": "source_latent"}[image]
    return first_stage.normalize(batch[cached]) if cached in batch else first_stage.encode(batch[image])


def fit_first_stage(first_stage: FirstStage, batches: Iterable[dict], device: torch.device) -> None:
    """Set the latent statistics from this rank's `batches` of the training set and those of the others."""

    def latents() -> Iterable[Tensor]:
        seen = 0
        for batch in batches:
            key = "latent" if "latent" in batch else "image"
            x = batch[key].to(device).float()
            yield x if key == "latent" else first_stage.encode_raw(x)
            seen += len(x) * num_ranks()
            if seen >= NUM_STATISTICS_SAMPLES:
                return

    first_stage.fit(latents())


def case_generators(names: Sequence[str], seed: int, device: torch.device) -> list[torch.Generator]:
    """One generator a sample for the noise that a sampler adds on its way: as with `case_noise`, it depends
    on the case and the seed, and not on the batch.
    """
    return [torch.Generator(device).manual_seed(seed_of(seed, name, "steps")) for name in names]
