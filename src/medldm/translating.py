"""Translates one volume to other modalities, for `medldm translate` and `medldm.load(...).translate`."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from medldm.data.case import Case
from medldm.data.raw.grids import edges_of
from medldm.errors import InputError
from medldm.models.protocols import Predictive, Request
from medldm.sampling import predictor_of

log = logging.getLogger(__name__)
SPACING_TOLERANCE = (
    0.2  # a relative difference beyond which the source is resampled to the voxels of training
)
SPACING_NOTED = 0.02  # a relative difference beyond which the log tells it


def choose_targets(known: list[str] | None, source: str, targets: list[str] | None) -> list[str]:
    """The modalities to make. InputError for a name that the checkpoint does not know."""
    if not known:
        raise InputError("checkpoint: knows no modalities; give one of an msspade or ldm experiment of ALDM")
    for key, names in (("source_modality", [source]), ("targets", targets or [])):
        for name in names:
            if name not in known:
                raise InputError(
                    f"{key}: '{name}' is none of the checkpoint's modalities, {', '.join(known)}"
                )
    if targets is None:
        return [name for name in known if name != source]
    if not targets or source in targets or len(set(targets)) < len(targets):
        raise InputError(
            f"targets={targets}: name other modalities than {source}, each once, or null for all of them"
        )
    return list(targets)


def prepare_source(path: str, facts: Mapping[str, Any]) -> Any:
    """The volume in a file, or in a folder of DICOM, as the training data were prepared: a `Volume`.

    Voxels that differ from those of training by a fifth along an axis of the body are resampled to them,
    which a line of the log says.
    """
    from medldm.data.preparation.recipe import recipe_of
    from medldm.data.preparation.volumes import prepare_case, read_volume

    recipe = recipe_of(facts)
    if recipe.spacing is None and recipe.in_plane_size is None and facts["spacing"]:
        raw, trained = spacing_along(read_volume(path).affine, recipe.orientation), facts["spacing"]
        apart = float(np.abs(np.divide(raw, trained) - 1).max())
        about = (path, millimetres(raw), millimetres(trained), recipe.orientation)
        if apart > SPACING_TOLERANCE:
            log.warning("%s: voxels of %s mm; resampled to those of training, %s mm (axes %s)", *about)
            recipe = dataclasses.replace(recipe, spacing=tuple(trained))
        elif apart > SPACING_NOTED:
            log.warning("%s: voxels of %s mm, in training %s mm (axes %s); taken as they are", *about)
    return prepare_case(Case("source", "source", {"image": path}), recipe)


def spacing_along(affine: Any, orientation: str) -> list[float]:
    """The edges of a voxel, in mm, along the axes of the body, in the order of the prepared array, such as S,
    P and L.
    """
    from medldm.data.preparation.volume_transforms import axis_order

    return edges_of(affine)[axis_order(affine, orientation)].tolist()


def millimetres(spacing: Any) -> str:
    return " x ".join(f"{s:.3g}" for s in spacing)


def range_in(
    units: str, facts: Mapping[str, Any], target: int, own: tuple[float, float]
) -> tuple[float, float]:
    """Lower and upper intensity in the output of a command, by its `units`: unit, training or source."""
    if units == "training":
        return tuple(facts["intensity_ranges"][target])
    return own if units == "source" else (0.0, 1.0)


def padded(x: Any, multiples: tuple[int, ...]) -> Any:
    """(1, C, *S) with background at the ends of its axes, up to the next multiples."""
    pads = [(-n) % m for n, m in zip(x.shape[2:], multiples, strict=True)]
    return F.pad(x, [p for pad in reversed(pads) for p in (0, pad)], value=-1.0)


def translate(
    module: Predictive, x: Tensor, source: str, targets: Sequence[str], *, names: Sequence[str], fast: bool,
    request: Request,
) -> Tensor:  # fmt: skip
    """A prepared source (1, 1, *S) in [-1, 1] -> (K, 1, *S) float32 on the host, one for each target, made as
    one batch. `names` and the seed of `request` decide the noise of each; `fast` leaves out the
    diffusion.
    """
    predictor = predictor_of(module, stage="spade" if fast else None)
    factors = module.size_factors if predictor.is_generative else module.translation.downsampling
    size, known = tuple(x.shape[2:]), module.facts["label_values"]
    x = padded(x, factors).to(module.device)
    batch = {
        "case_id": list(names),
        "source": x.expand(len(targets), -1, -1, -1, -1),
        "label": torch.tensor([known.index(name) for name in targets], device=module.device),
        "source_label": torch.full((len(targets),), known.index(source), device=module.device),
    }
    images = predictor(batch, tuple(x.shape[2:]), request)
    return images[..., : size[0], : size[1], : size[2]]
