"""The protocols of models: what the rest of medldm needs of one that is trained, gives images, or samples.

`medldm.models.common.TrainedModule` has the defaults, so that a new kind of model states what it does
differently. Commands, callbacks and `medldm plan` use nothing else of a model.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from medldm.diffusion.condition import Conditioner
from medldm.diffusion.latent import FirstStage
from medldm.diffusion.sampler import Sampler
from medldm.diffusion.windows import Windows


class Request(NamedTuple):
    """What a model is asked for besides a batch. Models that draw nothing at random ignore most of it."""

    seed: int = 0
    drop: tuple[str, ...] = ()  # groups of conditions to withhold
    windows: Windows | None = None  # for latents larger than those of training
    callback: Callable[[int, Tensor], None] | None = None  # sees (step, x0_hat)
    precision: str = "auto"


class Output(NamedTuple):
    """One kind of image that a trained model gives."""

    keys: tuple[str, ...]  # the arrays of a batch that it needs
    predict: Callable[[dict, tuple[int, ...], Request], Tensor]  # (batch, image size, request) -> (B, C, *S)
    is_generative: bool = False  # seeds, samplers and dropped conditions matter
    is_latent: bool = False  # windows, trajectories and interpolations of latents are possible


def translations(stage: FirstStage | None) -> dict[str, Output]:
    """What a first stage with a translator gives without diffusion; nothing where there is none.

    "spade" is the translation of batch["source"]; "autoencoder" is the target itself through the autoencoder,
    the best that any translation could be.
    """
    if stage is None:
        return {}

    def translate(batch: dict, size: tuple[int, ...], request: Request) -> Tensor:
        return stage.translate_image(batch["source"], batch["label"])

    def reconstruct(batch: dict, size: tuple[int, ...], request: Request) -> Tensor:
        return stage.reconstruct(batch["image"])

    return {
        "spade": Output(("source",), translate),
        "autoencoder": Output(("source", "image"), reconstruct),
    }


class Trainable(Protocol):
    """A Lightning module that `medldm train` trains."""

    takes_unlabelled: ClassVar[bool]  # images without map or label may join those of its training
    description: dict[str, Any]  # what its checkpoints say of it: see `medldm.checkpoints.describe`
    facts: Mapping[str, Any]  # of its training data, where it comes from a checkpoint
    conditioner: Conditioner | None
    sampler: Sampler | None
    first_stage: nn.Module | None

    @staticmethod
    def batch_keys(model: Mapping[str, Any], *, is_cached: bool) -> tuple[str, ...]:
        """The arrays that a training batch holds under the config `model`, with cached latents in the place
        of images where `is_cached`. What is not named is never read from disk.
        """

    @property
    def size_factors(self) -> tuple[int, ...]:
        """The number by which images in training must divide, for each axis; () where any size is
        possible.
        """

    @property
    def smallest_size(self) -> tuple[int, ...]:
        """What images in training must measure at least, for each axis; () where any size will do."""

    @property
    def validation_metrics(self) -> tuple[str, ...]:
        """Names that validation logs: checkpoints may be chosen by any of them."""

    @property
    def ema_modules(self) -> nn.ModuleDict | None:
        """The modules that a moving average follows; None for a model without one."""

    @property
    def needs_latent_statistics(self) -> bool:
        """Whether `fit_first_stage` must be called before the first step."""

    def fit_first_stage(self, batches: Iterable[dict]) -> None:
        """Set the statistics that latents are normalised with, from batches of the training set."""

    automatic_optimization: bool  # False for a module that steps its optimisers itself (`AdversarialModule`)

    def training_step(self, batch: dict, batch_idx: int) -> Tensor | None:
        """The loss to minimise, or None where the module updates its weights itself."""

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        """Logs `validation_metrics`."""

    def picture(self, batch: dict) -> list[Tensor]:
        """Rows (B, C, *S) in [-1, 1] of the grid of samples."""

    def figures(self, batch: dict) -> dict[str, Tensor]:
        """Other pictures by name, (3, H, W) uint8."""

    def use_channels_last(self) -> None:
        """Change the memory layout of weights and batches."""


class Predictive(Protocol):
    """A trained model that `medldm sample` and `medldm translate` take images from."""

    description: dict[str, Any]
    facts: Mapping[str, Any]
    device: torch.device
    class_names: Sequence[str]  # the classes of `segment` without the background; () where it has none

    @property
    def outputs(self) -> dict[str, Output]:
        """The kinds of images that it gives, by name, the main one first. Empty for a model that makes no
        images.
        """

    def use_tiles(self, size: int) -> None:
        """Decode volumes in tiles of this edge from now on. InputError for a model that cannot."""

    @property
    def encodes(self) -> str | None:
        """ "image" or "mask" for a model that is, or holds, the autoencoder that it trains on them: what a
        second stage can be built on. None for all others.
        """

    def as_first_stage(self, **options: Any) -> FirstStage:
        """The frozen stage of a diffusion model; `options` say how its latents are taken (`FirstStage`).

        InputError for a model that encodes nothing, ValueError for options where its latents are settled.
        """

    def segment(self, x: Tensor) -> Tensor:
        """Class map (B, 1, *S) int64 of images (B, C, *S) in [-1, 1]. InputError where it has none."""

    @property
    def image_decoder(self) -> nn.Module | None:
        """The autoencoder that decodes the images, None where there is none."""

    @property
    def translation(self) -> FirstStage | None:
        """The autoencoder and the translator between modalities, where the model holds both."""


class Sampleable(Predictive, Protocol):
    """A trained model that draws images under conditions."""

    conditioner: Conditioner
    sampler: Sampler

    @property
    def compiled_parts(self) -> list[nn.Module]:
        """The networks that a sampler calls at every step: what `compile=true` compiles."""

    @property
    def condition_keys(self) -> tuple[str, ...]:
        """What a batch must hold to sample from it."""

    def latent_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The grid of the latents of images (*S)."""

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
        """Images (B, C, *S) in about [-1, 1]: `names` and `seed` alone decide the noise of each."""

    def decode(self, z: Tensor, batch: dict) -> Tensor:
        """Clean latents (B, Cz, *s), as a sampler's callback sees them, to images (B, C, *S)."""
