"""The segmenter that a training of stage two asks: loaded for training alone, and remembered by its hash."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medldm.build import load_segmenter_of
from medldm.errors import InputError, told_of
from medldm.held_out import origin_of
from medldm.models.common import TrainedModule

log = logging.getLogger(__name__)
KEY_OF_SEGMENTER = "model.segmenter.checkpoint"


def ask_segmenter(
    module: TrainedModule,
    model: Mapping[str, Any],
    facts: Mapping[str, Any],
    *,
    resume: Path | None,
    content: Mapping[str, Any] | None,
) -> dict[str, Any] | None:
    """Give the module the segmenter of its config and return what a checkpoint keeps of it; None where the
    config names none. `content` is that of the checkpoint `resume`. InputError where a resumed run was begun
    with another one, or with one and has none now, which would forget whom that was trained on.
    """
    kept = None if content is None else content["medldm"].get("segmenter")
    if not model.get("segmenter") or getattr(module, "segmenter_loss", None) is None:
        if kept:
            raise InputError(
                f"model.segmenter: none, but resume={resume} was begun with one; give that, or start a "
                "new run from its weights with init_from"
            )
        return None
    path = model["segmenter"]["checkpoint"]
    if path == "???":
        raise InputError(f"{KEY_OF_SEGMENTER}: not given; name a checkpoint of model=segmentation")
    if content is not None and not kept:
        raise InputError(
            f"model.segmenter: resume={resume} was begun without a segmenter; leave it out, or start a "
            "new run from its weights with init_from"
        )
    images = (facts["image_channels"], facts["spatial_dims"])
    segmenter = load_segmenter_of(path, images, facts, key=KEY_OF_SEGMENTER, whose="the dataset")
    sha256 = segmenter.checkpoint_sha256
    if kept and kept["sha256"] != sha256:
        raise InputError(
            f"{KEY_OF_SEGMENTER}={path}: not the file that the resumed run was begun with; give that, or "
            "start a new run"
        )
    with told_of(f"{KEY_OF_SEGMENTER}={path}"):
        module.segmenter_loss.ask(segmenter)
    log.info("asking the segmenter of %s", path)
    return origin_of(segmenter.description) | {"sha256": sha256}
