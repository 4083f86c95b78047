"""Rough edges in batches: at a level drawn in training, or at one level of sampling."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medldm.data.preparation.edges import EdgeDegrade, EdgeRecipe
from medldm.errors import InputError

log = logging.getLogger(__name__)
CONTOURS = "contours"  # an edge level: the class map's outlines alone


@dataclass(frozen=True)
class EdgeDegradation:
    """`EdgeDegrade` at a level drawn uniformly from `levels`; the upper end grows over the first
    `ramp_epochs`.
    """

    degrade: EdgeDegrade
    levels: tuple[float, float] = (0.0, 1.0)
    ramp_epochs: int = 0

    def __call__(
        self, item: dict, epoch: int, generator: np.random.Generator, view: str | None = None
    ) -> dict:
        ramp = min(1.0, (epoch + 1) / self.ramp_epochs) if self.ramp_epochs else 1.0
        low, high = self.levels
        level = float(generator.uniform(low, max(low, high * ramp)))
        image, mask = (item[key][0] if key in item else None for key in ("image", "mask"))
        degrade = self.degrade.for_view(view)
        edges = degrade(item["edges"][0], level, generator, image, mask, item.get("edges_levels"))
        return {**item, "edges": edges[None], "edge_level": level}


def make_degradation(
    root: Path,
    index: Mapping,
    keys: Sequence[str],
    settings: Mapping[str, Any],
    edge_level: float | str | None,
) -> EdgeDegradation:
    """The degradation of edges that `data.edge_degrade` asks for in training, where `edge_level` is None;
    else that of one level, or the `contours` of the class map alone. InputError where the data have no edges
    to degrade, or a setting makes no sense.
    """
    if index["spatial_dims"] != 2:
        raise InputError("data.edge_degrade: edges exist in 2D only; set it to null")
    check_edge_level(edge_level, keys)
    settings = dict(settings)
    levels = tuple(settings.pop("level", (0.0, 1.0)))
    ramp_epochs = settings.pop("ramp_epochs", 0)
    stored = index.get("preprocess", {}).get("edges") or {}
    try:
        degrade = EdgeDegrade(recipe=EdgeRecipe(**stored), **settings)
    except TypeError as error:
        raise InputError(f"data.edge_degrade: {error}; see EdgeDegrade for its keys") from error
    if edge_level == CONTOURS:
        return EdgeDegradation(replace(degrade, contours_only_prob=1, full_drop_prob=0), (1.0, 1.0))
    has_source = "image" in keys or bool(index.get("num_edge_levels"))
    if not has_source and degrade.redetect_prob and degrade.recipe.source != "labels":
        tell_no_redetection(root, is_training=edge_level is None)
    if edge_level is not None:
        return EdgeDegradation(degrade, (edge_level, edge_level))
    return EdgeDegradation(degrade, levels, ramp_epochs)


def tell_no_redetection(root: Path, *, is_training: bool) -> None:
    """Tell that a detector has nothing to run on, where neither images nor rougher edges are read: in
    training by an InputError.
    """
    what = f"{root}: holds no rougher edges and no image is read, so none are detected again"
    if is_training:
        raise InputError(
            f"data.edge_degrade: {what}; prepare with 'data.preprocess.edges.levels=[{{blur: 1}}]', or "
            "do without by +data.edge_degrade.redetect_prob=0"
        )
    log.warning("edge_level: %s; all other degradations are", what)


def check_edge_level(level: float | str | None, keys: Sequence[str]) -> None:
    if level is None:
        return
    if "edges" not in keys:
        raise InputError(f"edge_level={level}: this model reads no edges; set it to null")
    if isinstance(level, str) and level == CONTOURS:
        if "mask" not in keys:
            raise InputError("edge_level=contours: this model reads no class maps; give a number in [0, 1]")
    elif isinstance(level, str) or not 0 <= level <= 1:
        raise InputError(f"edge_level={level}: give a number in [0, 1], or contours")
