"""What the Lightning modules share: optimiser groups, learning-rate schedule, per-step random numbers."""

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from medldm.diffusion.latent import FirstStage
from medldm.diffusion.schedule import NoiseSchedule

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


def warmup_cosine(
    optimizer: torch.optim.Optimizer, *, warmup: int = 0, total: int | None = None, final: float = 0.0
) -> LambdaLR:
    """Multiplier min(1, (step + 1) / warmup) times, where `total` updates are given, a half cosine down to
    `final`.
    """

    def multiplier(step: int) -> float:
        rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
        if total is None:
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
    """Normalised latents (B, Cz, *s) of batch["image"] or batch["source"], from the cache where it is."""
    cached = {"image": "latent", "source": "source_latent"}[image]
    return first_stage.normalize(batch[cached]) if cached in batch else first_stage.encode(batch[image])


def fit_first_stage(first_stage: FirstStage, batches: Iterable[dict], device: torch.device) -> None:
    """Set the latent statistics from the training set, once; a checkpoint that has them keeps them."""

    def latents() -> Iterable[Tensor]:
        seen = 0
        for batch in batches:
            key = "latent" if "latent" in batch else "image"
            x = batch[key].to(device).float()
            yield x if key == "latent" else first_stage.encode_raw(x)
            seen += len(x)
            if seen >= NUM_STATISTICS_SAMPLES:
                return

    first_stage.fit(latents())


def case_generators(names: Sequence[str], seed: int, device: torch.device) -> list[torch.Generator]:
    """For the noise on the way, one a sample: as `case_noise`, whatever the batch."""
    return [torch.Generator(device).manual_seed(seed_of(seed, name, "steps")) for name in names]
