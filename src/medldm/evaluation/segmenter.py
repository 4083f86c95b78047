"""Loads the trained segmenter with which an evaluation compares class maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medldm.build import load_segmenter_of
from medldm.evaluation.tools import Segmenter
from medldm.inference import autocast


def load_segmenter(
    checkpoint: str | None,
    image_shape: Sequence[int],
    device: torch.device,
    facts: Mapping[str, Any],
    precision: str = "auto",
) -> Segmenter | None:
    """The segmenter of a checkpoint for images (C, *S), None without a checkpoint.

    InputError where it was trained for images of another shape or for other classes than those of the
    reference, whose index.json is `facts`.
    """
    if checkpoint is None:
        return None
    images = (image_shape[0], len(image_shape) - 1)
    module = load_segmenter_of(checkpoint, images, facts, key="segmenter", whose="the reference")
    module.to(device)

    def segment(x: Tensor) -> Tensor:
        with autocast(device, precision):
            return module.segment(x)

    return Segmenter(segment, module.class_names)
