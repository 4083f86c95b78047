"""What a config may add to a latent diffusion model: a control branch, the losses of a segmenter."""

from collections.abc import Mapping
from typing import Any

from hydra.utils import instantiate
from torch import nn

from medldm.attributes import known_attributes
from medldm.diffusion.condition import Conditioner
from medldm.diffusion.control import controlled
from medldm.errors import InputError, told_of
from medldm.models.segmenter_loss import MAP_WEIGHTS, SegmenterLoss
from medldm.parts import in_place


def with_branch(
    model: Mapping[str, Any],
    facts: Mapping[str, Any],
    conditioner: Conditioner,
    network: nn.Module,
    downsampling: tuple[int, ...],
) -> tuple[Conditioner, nn.Module]:
    """Conditioner and network of a denoiser, frozen, with the branch that `model.adapter` describes."""
    adapter = model["adapter"]
    with told_of("model.adapter.conditioner"):
        hint = instantiate(in_place(adapter["conditioner"]))(
            facts["num_classes"],
            spatial_dims=facts["spatial_dims"],
            downsampling=downsampling,
            known=known_attributes(facts),
            embedding_dim=1,  # refused where it is used
        )
        return controlled(conditioner, network, hint)


def build_segmenter_loss(model: Mapping[str, Any], facts: Mapping[str, Any]) -> SegmenterLoss | None:
    """The losses that `model.segmenter` asks for, without the segmenter; None where it asks for none."""
    options = dict(model.get("segmenter") or {})
    if not options:
        return None
    options.pop("checkpoint")
    with told_of("model.segmenter"):
        try:
            loss = SegmenterLoss(**options)
        except TypeError as error:
            raise ValueError(str(error).partition(" ")[2]) from None
    if loss.needs_map and not facts["num_classes"]:
        weights = " and ".join(f"{name}={options[name]}" for name in MAP_WEIGHTS if options.get(name))
        raise InputError(f"model.segmenter.{weights}: the dataset has no masks; prepare it with masks")
    return loss
