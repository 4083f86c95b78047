"""Networks with a target for every voxel: class maps (segmentation) and another modality (regression).

The segmenter is the yardstick of synthesis: trained on real images and tested on synthetic ones, or the other
way round. The regression network is the plain one-to-one baseline of translation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from monai.losses import DiceCELoss
from monai.networks.layers import SkipConnection
from torch import Tensor, nn
from torchmetrics import MeanMetric

from medldm.devices import full_precision
from medldm.metrics.image import psnr, to_unit
from medldm.metrics.overlap import dice
from medldm.models.common import TrainedModule, build_optimizer
from medldm.models.protocols import Output, Request
from medldm.networks.convolution import adopt_convolutions


def apply_network(
    network: nn.Module,
    x: Tensor,
    *,
    window: int | Sequence[int] | None = None,
    overlap: float = 0.5,
    divisible_by: int = 8,
) -> Tensor:
    """The network on images of any size: whole, padded to a multiple of `divisible_by` and cropped back, or
    in Gaussian-weighted windows that overlap by this share.
    """
    shape = x.shape[2:]
    if window is not None:
        size = [window] * len(shape) if isinstance(window, int) else list(window)
        size = [divisible_by * -(-side // divisible_by) for side in size]
        return sliding_window_inference(x, size, 1, network, overlap, mode="gaussian", cval=-1.0)
    out = network(padded_to(x, divisible_by, value=-1.0))
    return out[(..., *(slice(side) for side in shape))]


def padded_to(x: Tensor, factor: int, *, value: float) -> Tensor:
    """(B, C, *S) with `value` after every axis up to a multiple of `factor`."""
    missing = [-side % factor for side in x.shape[2:]]
    padding = [side for n in reversed(missing) for side in (0, n)]
    return F.pad(x, padding, value=value) if any(missing) else x


class VoxelwiseModule(TrainedModule):
    """Trains one network that gives an answer for every voxel.

    Training sees the images or windows that the loader gives. Prediction takes whole images, padded to a
    multiple of `divisible_by`, or, where `window` is set, overlapping windows.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: Callable,
        window: int | Sequence[int] | None = None,
        overlap: float = 0.5,
        divisible_by: int = 8,
        warmup_steps: int = 0,
        cosine_steps: int | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, warmup_steps=warmup_steps, cosine_steps=cosine_steps)
        self.network = adopt_convolutions(network)
        network.is_block = True  # compiled as a whole
        self.inference = {"window": window, "overlap": overlap, "divisible_by": divisible_by}

    @property
    def size_factors(self) -> tuple[int, ...]:
        return (self.inference["divisible_by"],) * getattr(self.network, "dimensions", 0)

    def configure_optimizers(self):
        optimizer = build_optimizer(self.make_optimizer, [self.network])
        return [optimizer], [{"scheduler": self.learning_rate(optimizer), "interval": "step"}]

    def forward(self, x: Tensor) -> Tensor:
        """Logits or the target (B, K, *S), float32."""
        return apply_network(self.network, x, **self.inference).float()

    def loss(self, answer: Tensor, batch: dict) -> Tensor:
        raise NotImplementedError

    def losses(self, batch: dict, step: int) -> dict[str, Tensor]:
        return {"loss": self.loss(self.network(batch[self.input_key]).float(), batch)}


class SegmentationModule(VoxelwiseModule):
    """Trains `network` (image channels -> num_classes) to find batch["mask"] in batch["image"].

    Cross-entropy over all classes plus soft Dice of the foreground classes over the batch, on one-hot targets
    made once. `options`: what `VoxelwiseModule` takes.
    """

    input_key = "image"
    validation_metrics = ("val/loss", "val/dice")

    @staticmethod
    def batch_keys(model: Mapping[str, Any], *, is_cached: bool) -> tuple[str, ...]:
        return ("image", "mask")

    def __init__(
        self, network: nn.Module, *, num_classes: int, label_names: Sequence[str] | None = None, **options
    ) -> None:
        super().__init__(network, **options)
        self.num_classes = num_classes
        names = list(label_names or [])[1:] if len(label_names or []) == num_classes else []
        self.class_names = names or [f"class_{k}" for k in range(1, num_classes)]
        self.criterion = DiceCELoss(
            include_background=False,
            to_onehot_y=True,
            softmax=True,
            batch=True,
            smooth_nr=1e-5,
            smooth_dr=1e-5,
        )
        self.val_dice = MeanMetric(nan_strategy="ignore")

    def loss(self, answer: Tensor, batch: dict) -> Tensor:
        return self.criterion(answer, batch["mask"])

    @property
    def feature_layers(self) -> list[nn.Module]:
        """Layers of the network whose outputs are features: its skip connections, the coarsest first."""
        return [part for part in self.network.modules() if isinstance(part, SkipConnection)][::-1]

    def looked_at(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Features (B, C, *s) of `feature_layers`, and logits (B, K, *S), of images that divide by
        `divisible_by`. Gradients with respect to x are recorded.
        """
        found: list[Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda layer, given, out: found.append(out))
            for layer in self.feature_layers
        ]
        try:
            logits = self.network(x)
        finally:
            for hook in hooks:
                hook.remove()
        return found, logits.float()

    @torch.no_grad()
    def segment(self, x: Tensor) -> Tensor:
        """Class map (B, 1, *S) int64 of images in [-1, 1]."""
        return self(x).argmax(1, keepdim=True)

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        logits = self(batch["image"])
        scores = dice(logits.argmax(1, keepdim=True), batch["mask"], self.num_classes)
        self.val_dice.update(scores)
        terms = {"val/loss": self.loss(logits, batch), "val/dice": self.val_dice}
        self.log_dict(terms, on_epoch=True, batch_size=len(logits), sync_dist=True)

    @torch.no_grad()
    def picture(self, batch: dict) -> list[Tensor]:
        """Rows for the sample grid: images, maps, and the maps found."""
        maps = (batch["mask"], self.segment(batch["image"]))
        return [batch["image"][:, :1], *(m * (2 / max(1, self.num_classes - 1)) - 1 for m in maps)]


class RegressionModule(VoxelwiseModule):
    """Trains `network` (image channels -> image channels) to give batch["image"] for batch["source"]: L1.

    One network serves one ordered pair of modalities, `data.pair_labels`: what ALDM's single model must beat.
    """

    input_key = "source"
    validation_metrics = ("val/loss", "val/psnr")

    @staticmethod
    def batch_keys(model: Mapping[str, Any], *, is_cached: bool) -> tuple[str, ...]:
        return ("image", "source")

    @property
    def outputs(self) -> dict[str, Output]:
        return {"regression": Output(("source",), self.translate)}

    def __init__(self, network: nn.Module, **options) -> None:
        """`options`: what `VoxelwiseModule` takes."""
        super().__init__(network, **options)
        self.val_psnr = MeanMetric()

    def forward(self, x: Tensor) -> Tensor:
        """The target (B, C, *S), computed in float32: its values are an image."""
        with full_precision(x.device):
            return super().forward(x.float())

    def translate(self, batch: dict, size: tuple[int, ...], request: Request) -> Tensor:
        """batch["image"] as it is expected from batch["source"]."""
        return self(batch["source"])

    def loss(self, answer: Tensor, batch: dict) -> Tensor:
        return F.l1_loss(answer, batch["image"])

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        x_hat = self(batch["source"])
        self.val_psnr.update(psnr(to_unit(x_hat), to_unit(batch["image"])))
        terms = {"val/loss": self.loss(x_hat, batch), "val/psnr": self.val_psnr}
        self.log_dict(terms, on_epoch=True, batch_size=len(x_hat), sync_dist=True)

    @torch.no_grad()
    def picture(self, batch: dict) -> list[Tensor]:
        """Rows for the sample grid: sources, targets, predictions."""
        return [batch["source"], batch["image"], self(batch["source"]).clamp(-1, 1)]
