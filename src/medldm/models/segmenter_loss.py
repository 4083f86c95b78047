"""What a frozen segmenter says of a denoiser's x0_hat, as losses of stage two."""

import torch
from torch import Tensor, nn

from medldm.losses import feature_distances, map_errors, region_contrast
from medldm.models.segmentation import SegmentationModule, padded_to

MAP_WEIGHTS = ("map_weight", "contrast_weight")  # of losses that need the class map


class SegmenterLoss:
    """Losses of the image that x0_hat decodes to, as a segmenter sees it.

    feature_weight: of the distance between its features and those of the real image, as the first stage
    gives that (`losses.feature_distances`).
    map_weight: of the error of the map that is found in it against the map that was asked for
    (`losses.map_errors`).
    contrast_weight: of the region-contrastive loss at `temperature`, averaged over the layers of features
    (`losses.region_contrast`).
    max_noise, in (0, 1]: x0_hat says little of the image where z_t is mostly noise. A sample counts as much
    as its z_t is signal, alpha^2 / (alpha^2 + sigma^2), and not at all where the rest, the share of noise, is
    above `max_noise`.

    The segmenter comes by `ask`, for training alone.
    """

    def __init__(
        self,
        *,
        feature_weight: float = 0.0,
        map_weight: float = 0.0,
        contrast_weight: float = 0.0,
        temperature: float = 0.1,
        max_noise: float = 0.5,
    ) -> None:
        weights = {"features": feature_weight, "map": map_weight, "contrast": contrast_weight}
        for key, weight in zip(("feature_weight", *MAP_WEIGHTS), weights.values(), strict=True):
            if not weight >= 0:
                raise ValueError(f"{key}={weight} must be 0 or above")
        if not any(weights.values()):
            raise ValueError("feature_weight=0, and map_weight and contrast_weight too: set one above 0")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        if not 0 < max_noise <= 1:
            raise ValueError(f"max_noise={max_noise} must lie in (0, 1]")
        self.weights = {name: weight for name, weight in weights.items() if weight}
        self.temperature, self.max_noise = temperature, max_noise
        self.segmenter: SegmentationModule | None = None
        self.device: torch.device | None = None  # where the segmenter is

    @property
    def needs_map(self) -> bool:
        return bool({"map", "contrast"} & self.weights.keys())

    def ask(self, segmenter: SegmentationModule) -> None:
        """The trained segmenter to ask, frozen. ValueError where it has no features and some are weighed."""
        if {"features", "contrast"} & self.weights.keys() and not segmenter.feature_layers:
            raise ValueError("its network has no skip connections to take features from; weigh the map alone")
        self.segmenter = segmenter.eval().requires_grad_(False)

    def share(self, gamma: Tensor) -> Tensor:
        """(B,) how much samples of these levels count."""
        return torch.sigmoid(-gamma) * (torch.sigmoid(gamma) <= self.max_noise)

    def __call__(
        self, first_stage: nn.Module, batch: dict, z: Tensor, x0_hat: Tensor, gamma: Tensor
    ) -> dict[str, Tensor]:
        """The weighted sum as "loss", and each term without its weight: segmenter_<name>.

        z, x0_hat (B, Cz, *s) are normalised latents, gamma (B,) the levels.
        """
        if self.device != z.device:  # once: it is not moved with the module that holds this loss
            self.segmenter.to(z.device)
            self.device = z.device
        decoder_map = first_stage.decoder_map(batch)
        side = self.segmenter.inference["divisible_by"]
        generated = self.look(first_stage.decode_through(x0_hat, decoder_map), side)
        with torch.no_grad():
            real = self.look(first_stage.decode(z, decoder_map), side) if self.compares else ([], None)
        mask = padded_to(batch["mask"], side, value=0) if self.needs_map else None
        share = self.share(gamma.float())
        errors = {name: (share * self.term(name, generated, real[0], mask)).mean() for name in self.weights}
        total = sum(self.weights[name] * error for name, error in errors.items())
        return {"loss": total} | {f"segmenter_{name}": error.detach() for name, error in errors.items()}

    @property
    def compares(self) -> bool:
        """Whether real images are looked at too."""
        return bool({"features", "contrast"} & self.weights.keys())

    def look(self, x: Tensor, side: int) -> tuple[list[Tensor], Tensor]:
        return self.segmenter.looked_at(padded_to(x.float(), side, value=-1.0))

    def term(
        self, name: str, generated: tuple[list[Tensor], Tensor], real: list[Tensor], mask: Tensor | None
    ) -> Tensor:
        """(B,) of one loss: `generated` are features and logits, `real` features."""
        features, logits = generated
        if name == "features":
            return feature_distances(features, real)
        return map_errors(logits, mask) if name == "map" else self.contrast(features, real, mask)

    def contrast(self, generated: list[Tensor], real: list[Tensor], mask: Tensor) -> Tensor:
        options = {"num_classes": self.segmenter.num_classes, "temperature": self.temperature}
        layers = zip(generated, real, strict=True)
        return torch.stack([region_contrast(a, b, mask, **options) for a, b in layers]).mean(0)
