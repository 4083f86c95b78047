"""Samples images for every case of a dataset with a trained model of any kind, for `medldm sample`."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medldm.data.loading.dataset import CaseDataset
from medldm.devices import Hardware, choose_loop
from medldm.errors import InputError
from medldm.inference import autocast, to_device
from medldm.models.diffusion import DiffusionModule
from medldm.models.protocols import Output, Predictive, Request, Sampleable
from medldm.networks.compiling import compile_loop

__all__ = ["Predictor", "Recorder", "Request", "interpolate", "predictor_of", "sample_cases", "spread"]

STAGES = ("spade", "autoencoder")  # of a translation model, before its diffusion


@dataclass(frozen=True)
class Predictor:
    """One output of a trained model, computed as commands need it. `stage` is the output's name."""

    device: torch.device
    stage: str
    output: Output

    @property
    def keys(self) -> tuple[str, ...]:
        return self.output.keys

    @property
    def is_generative(self) -> bool:
        return self.output.is_generative

    @property
    def is_latent(self) -> bool:
        return self.output.is_latent

    def __call__(self, batch: dict, size: tuple[int, ...], request: Request) -> Tensor:
        """Images of the grid `size` for a batch: (B, C, *S) float32 in [-1, 1] on the host."""
        batch = to_device(batch, self.device)
        with torch.no_grad(), autocast(self.device, request.precision):
            return self.output.predict(batch, size, request).float().clamp(-1, 1).cpu()


def predictor_of(module: Predictive, *, stage: str | None = None, tile: int | None = None) -> Predictor:
    """What a model is for, or, of a translation model, an earlier `stage` (one of STAGES).

    `tile` is the edge of the tiles in which volumes are decoded. InputError where the model makes no images,
    has no such stage, or has no use for tiles.
    """
    if stage not in (None, *STAGES):
        raise InputError(f"stage={stage} is none of null, {', '.join(STAGES)}")
    if tile is not None and tile < 8:
        raise InputError(f"tile={tile}: give at least 8 voxels")
    if tile is not None and stage is not None:
        raise InputError(f"tile: has no effect with stage={stage}; set it to null")
    outputs = module.outputs
    if not outputs:
        raise InputError(
            "checkpoint: makes no images; give a segmenter to `medldm evaluate segmenter=CKPT`, and an "
            "autoencoder of class maps to model.map_stage.checkpoint"
        )
    if stage is not None and stage not in outputs:
        raise InputError(f"stage={stage}: the checkpoint translates nothing; set it to null")
    name = next(iter(outputs)) if stage is None else stage
    if tile is not None:
        module.use_tiles(tile)
    return Predictor(module.device, name, outputs[name])


def compile_networks(
    module: Sampleable, output: Output | None, compiles: bool | str, *, hardware: Hardware
) -> None:
    """Compiles what a sampler calls at every step for this output of the model, as `compiles` (True, False,
    "auto") says for `hardware`; "auto" leaves models alone of which nothing is sampled. InputError where one
    of them is to be compiled.
    """
    settings = choose_loop(compiles, hardware=hardware)
    is_sampled = output is not None and output.is_generative
    if settings.compiles and not is_sampled and compiles != "auto":
        raise InputError("compile: this output takes one pass and no loop; set it to false")
    for part in module.compiled_parts if settings.compiles and is_sampled else ():
        compile_loop(part, records=settings.records)


# ---- all cases ----


class CaseSamples(NamedTuple):
    """A finished case: one (N, C, *S) per seed in the order of `positions`, and its batches of one."""

    case: int
    positions: list[int]
    samples: list[Tensor]
    batches: list[dict]


def spread(positions: list[int], count: int | None) -> list[int]:
    """At most `count` of the positions, evenly spread; all of them where `count` is None."""
    if count is None or len(positions) <= count:
        return positions
    return [positions[round(i * (len(positions) - 1) / max(1, count - 1))] for i in range(count)]


def batches_of_items(
    jobs: Sequence[tuple[int, list[int]]], sizes: Callable[[int], tuple[int, ...]], batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    """All items as (case, position), in batches that may span several cases as long as their images have one
    size.
    """
    batch: list[tuple[int, int]] = []
    for case, positions in jobs:
        if batch and sizes(batch[-1][0]) != sizes(case):
            yield batch
            batch = []
        for position in positions:
            batch.append((case, position))
            if len(batch) == batch_size:
                yield batch
                batch = []
    if batch:
        yield batch


def take(batch: dict[str, Any], i: int) -> dict[str, Any]:
    """A batch of the i-th sample alone."""
    return {key: value[i : i + 1] for key, value in batch.items()}


def sample_cases(
    predictor: Predictor,
    dataset: CaseDataset,
    jobs: Sequence[tuple[int, list[int]]],
    *,
    size_of: Callable[[int], tuple[int, ...]],
    requests: Sequence[Request],
    batch_size: int,
    advance: Callable[[int], None],
    wanted: Collection[int] | None = None,
) -> Iterator[CaseSamples]:
    """Every case as soon as its last image is there, once for each of `requests`.

    What a sample is does not depend on its batch, so batches need not end where a case does. With the cases
    that are `wanted`, batches are those of all `jobs` nevertheless, so that their images are the same to the
    bit; batches without any of them are left out.
    """
    positions_of = dict(jobs)
    wanted = set(positions_of if wanted is None else wanted)
    images: dict[int, list[list[Tensor]]] = {}
    batches: dict[int, list[dict]] = {}
    for items in batches_of_items(jobs, size_of, batch_size):
        kept = [(i, case) for i, (case, _) in enumerate(items) if case in wanted]
        if not kept:
            continue
        batch = dataset.__getitems__([(0, position) for _, position in items])
        for k, request in enumerate(requests):
            made = predictor(batch, size_of(items[0][0]), request)
            advance(len(kept))
            for i, case in kept:
                images.setdefault(case, [[] for _ in requests])[k].append(made[i : i + 1])
        for i, case in kept:
            batches.setdefault(case, []).append(take(batch, i))
            if len(batches[case]) == len(positions_of[case]):
                samples = [torch.cat(parts) for parts in images.pop(case)]
                yield CaseSamples(case, positions_of[case], samples, batches.pop(case))


class Recorder:
    """A sampler's callback that keeps x0_hat of the last sample of the last batch, at `count` evenly spread
    steps of which the last step is one.
    """

    def __init__(self, num_steps: int, count: int, precision: str = "auto") -> None:
        self.precision = precision
        self.steps = {round((k + 1) * num_steps / count) for k in range(count)}
        self.latents: list[Tensor] = []

    def __call__(self, step: int, x0_hat: Tensor) -> None:
        if step == min(self.steps):
            self.latents.clear()
        if step in self.steps:
            self.latents.append(x0_hat[-1:].clone())

    def decoded(self, module: Sampleable, batch: dict) -> list[Tensor]:
        """(1, C, *S) images in [-1, 1] on the host."""
        last = to_device({key: value[-1:] for key, value in batch.items() if key == "mask"}, module.device)
        with torch.no_grad(), autocast(module.device, self.precision):
            return [module.decode(z, last).float().clamp(-1, 1).cpu() for z in self.latents]


def interpolate(
    module: DiffusionModule, batch: dict, shares: Sequence[float], *, time: float, request: Request
) -> Tensor:
    """Images between the two cases of a batch, one for each of `shares`: (len(shares), C, *S) in [-1, 1] on
    the host.
    """
    batch = to_device(batch, module.device)
    options = {"time": time, "seed": request.seed, "windows": request.windows}
    with torch.no_grad(), autocast(module.device, request.precision):
        images = module.interpolate(batch, batch["case_id"], shares, **options)
    return images.float().clamp(-1, 1).cpu()
