"""Loads the trained segmenter with which an evaluation compares class maps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from medldm.attributes import check_class_names
from medldm.build import load_module
from medldm.errors import InputError
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
    module = load_module(checkpoint)
    if not module.class_names:
        raise InputError(f"segmenter={checkpoint}: holds no segmenter; train one with model=segmentation")
    expected = (module.facts["image_channels"], module.facts["spatial_dims"])
    if expected != (image_shape[0], len(image_shape) - 1):
        raise InputError(
            f"segmenter={checkpoint}: takes {expected[0]} channels in {expected[1]}D, the images have "
            f"{image_shape[0]} in {len(image_shape) - 1}D"
        )
    check_class_names(module.facts, facts, f"segmenter={checkpoint}: finds", "the reference")
    module.to(device)

    def segment(x: Tensor) -> Tensor:
        with autocast(device, precision):
            return module.segment(x)

    return Segmenter(segment, module.class_names)
