"""Images of every case of a dataset by a trained model of any kind: what `medldm sample` runs."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from medldm.data.loading.dataset import CaseDataset
from medldm.diffusion.windows import Windows
from medldm.errors import InputError
from medldm.inference import autocast, to_device
from medldm.models.autoencoder import AutoencoderModule
from medldm.models.diffusion import DiffusionModule
from medldm.models.segmentation import RegressionModule, SegmentationModule
from medldm.models.translation import TranslationModule
from medldm.networks.tiling import TiledAutoencoder

STAGES = ("spade", "autoencoder")  # of a translation model, before its diffusion


class Request(NamedTuple):
    """What is asked of a model besides a batch; those that draw nothing ignore most of it."""

    seed: int = 0
    drop: tuple[str, ...] = ()  # groups of conditions to withhold
    windows: Windows | None = None  # for latents larger than those of training
    callback: Callable[[int, Tensor], None] | None = None  # sees (step, x0_hat)
    precision: str = "auto"


@dataclass(frozen=True)
class Predictor:
    """A model as seen from outside: the arrays of a batch that it needs, and `predict(batch, image_size,
    request)` -> (B, C, *S) on its device. `stage` names what it is; `is_generative` says that seeds matter.
    """

    device: torch.device
    keys: tuple[str, ...]
    stage: str
    predict: Callable[[dict, tuple[int, ...], Request], Tensor]
    is_generative: bool = False

    def __call__(self, batch: dict, size: tuple[int, ...], request: Request) -> Tensor:
        """float32 in [-1, 1] on the host."""
        batch = to_device(batch, self.device)
        with torch.no_grad(), autocast(self.device, request.precision):
            return self.predict(batch, size, request).float().clamp(-1, 1).cpu()


def predictor_of(module: nn.Module, *, stage: str | None = None, tile: int | None = None) -> Predictor:
    """`stage` (translation models): null is the diffusion where there is one, else `spade`. `tile`: edge of
    the tiles in which volumes are decoded. InputError where the model has no use for them.
    """
    name, device = type(module).__name__.removesuffix("Module").lower(), module.device
    if isinstance(module, SegmentationModule):
        raise InputError("checkpoint: holds a segmenter; `medldm evaluate segmenter=CKPT` takes it")
    stage = translation_stage(module, stage)
    if tile is not None:
        check_tile(module, tile, stage)
    if stage is not None:
        keys = ("source", "image") if stage == "autoencoder" else ("source",)
        return Predictor(device, keys, stage, partial(run_stage, module, stage))
    if isinstance(module, RegressionModule):
        return Predictor(device, ("source",), name, lambda batch, size, request: module(batch["source"]))
    if isinstance(module, AutoencoderModule):
        if module.reconstructs == "mask":
            raise InputError("checkpoint: reconstructs class maps; `medldm sample` takes models of images")
        keys = ("image",) if module.autoencoder.decoder_map_channels is None else ("image", "mask")
        return Predictor(device, keys, name, partial(reconstruct, module, tile))
    if tile is not None:
        module.first_stage.tile = tile
    return Predictor(device, module.condition_keys, name, partial(draw, module), is_generative=True)


def translation_stage(module: nn.Module, stage: str | None) -> str | None:
    if stage not in (None, *STAGES):
        raise InputError(f"stage={stage} is none of null, {', '.join(STAGES)}")
    if isinstance(module, TranslationModule):
        return stage or "spade"
    if stage is not None and getattr(getattr(module, "first_stage", None), "translator", None) is None:
        raise InputError(f"stage={stage}: the checkpoint translates nothing; set it to null")
    return stage


def check_tile(module: nn.Module, tile: int, stage: str | None) -> None:
    if tile < 8:
        raise InputError(f"tile={tile}: give at least 8 voxels")
    if stage is not None or not isinstance(module, AutoencoderModule | DiffusionModule):
        raise InputError("tile: needs an autoencoder or latent diffusion checkpoint; set it to null")
    if isinstance(module, DiffusionModule) and not hasattr(module.first_stage, "tile"):
        raise InputError("tile: this model has no first stage to decode with; set it to null")


def run_stage(module: nn.Module, stage: str, batch: dict, size: tuple[int, ...], request: Request) -> Tensor:
    """What a stage before diffusion makes of a batch of pairs."""
    earlier = module.as_first_stage() if isinstance(module, TranslationModule) else module.first_stage
    if stage == "autoencoder":
        return earlier.reconstruct(batch["image"])
    return earlier.translate_image(batch["source"], batch["label"])


def reconstruct(
    module: AutoencoderModule, tile: int | None, batch: dict, size: tuple[int, ...], request: Request
) -> Tensor:
    """The images through the autoencoder: the ceiling of stage two."""
    if tile is None:
        return module(batch["image"], module.decoder_map(batch))
    tiled = TiledAutoencoder(module.autoencoder, tile)
    h = module.autoencoder.quantize(tiled.encode(batch["image"]).to(module.device)).z
    return tiled.decode(h, module.decoder_map(batch))


def draw(module: nn.Module, batch: dict, size: tuple[int, ...], request: Request) -> Tensor:
    """New images under the conditions of a batch."""
    options = {"seed": request.seed, "drop": request.drop, "callback": request.callback}
    if request.windows is not None:
        options["windows"] = request.windows
    return module.sample(batch, batch["case_id"], module.latent_shape(size), **options)


# ---- all cases ----


class CaseSamples(NamedTuple):
    """A finished case: one (N, C, *S) per seed in the order of `positions`, and its batches of one."""

    case: int
    positions: list[int]
    samples: list[Tensor]
    batches: list[dict]


def spread(positions: list[int], count: int | None) -> list[int]:
    """At most `count` positions, evenly spread."""
    if count is None or len(positions) <= count:
        return positions
    return [positions[round(i * (len(positions) - 1) / max(1, count - 1))] for i in range(count)]


def batches_of_items(
    jobs: Sequence[tuple[int, list[int]]], sizes: Callable[[int], tuple[int, ...]], batch_size: int
) -> Iterator[list[tuple[int, int]]]:
    """(case, position) in batches that run on from case to case as long as images have one size."""
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
) -> Iterator[CaseSamples]:
    """Every case as soon as its last image is there, once for each of `requests`.

    What a sample is does not depend on its batch, so batches need not end where a case does.
    """
    positions_of = dict(jobs)
    images: dict[int, list[list[Tensor]]] = {}
    batches: dict[int, list[dict]] = {}
    for items in batches_of_items(jobs, size_of, batch_size):
        batch = dataset.__getitems__([(0, position) for _, position in items])
        for k, request in enumerate(requests):
            made = predictor(batch, size_of(items[0][0]), request)
            advance(len(items))
            for i, (case, _) in enumerate(items):
                images.setdefault(case, [[] for _ in requests])[k].append(made[i : i + 1])
        for i, (case, _) in enumerate(items):
            batches.setdefault(case, []).append(take(batch, i))
            if len(batches[case]) == len(positions_of[case]):
                samples = [torch.cat(parts) for parts in images.pop(case)]
                yield CaseSamples(case, positions_of[case], samples, batches.pop(case))


class Recorder:
    """Keeps x0_hat of the last sample of the last batch at `count` evenly spread steps, the last included."""

    def __init__(self, num_steps: int, count: int, precision: str = "auto") -> None:
        self.precision = precision
        self.steps = {round((k + 1) * num_steps / count) for k in range(count)}
        self.latents: list[Tensor] = []

    def __call__(self, step: int, x0_hat: Tensor) -> None:
        if step == min(self.steps):
            self.latents.clear()
        if step in self.steps:
            self.latents.append(x0_hat[-1:].clone())

    def decoded(self, module: DiffusionModule, batch: dict) -> list[Tensor]:
        """(1, C, *S) images in [-1, 1] on the host."""
        last = to_device({key: value[-1:] for key, value in batch.items() if key == "mask"}, module.device)
        with torch.no_grad(), autocast(module.device, self.precision):
            return [module.decode(z, last).float().clamp(-1, 1).cpu() for z in self.latents]


def interpolate(
    module: DiffusionModule, batch: dict, shares: Sequence[float], *, time: float, request: Request
) -> Tensor:
    """(len(shares), C, *S) in [-1, 1] on the host: images between the two cases of a batch."""
    batch = to_device(batch, module.device)
    options = {"time": time, "seed": request.seed, "windows": request.windows}
    with torch.no_grad(), autocast(module.device, request.precision):
        images = module.interpolate(batch, batch["case_id"], shares, **options)
    return images.float().clamp(-1, 1).cpu()
