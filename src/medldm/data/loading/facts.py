"""What a prepared folder tells a model: sizes, names, and what its images state."""

from collections.abc import Sequence

import numpy as np

from medldm.attributes import TABLES, UNKNOWN
from medldm.data.loading.dataset import Item

FACTS = (
    "spatial_dims",
    "image_channels",
    "num_classes",
    "label_names",
    "num_views",
    "view_names",
    "num_phases",
    "phase_names",
    "num_labels",
    "label_values",
    "attributes",
    "multi_label",
    "image_size",
    "orientation",
    "has_images",
    "preprocess",
)


def typical_volume(index: dict) -> dict:
    """Medians over the prepared volumes: `spacing`, mm, and `intensity_ranges`, [low, high] of each label (0
    where the dataset has none), in raw units. None where there are no volumes.
    """
    cases = [case for case in index["cases"] if "intensity_range" in case]
    if not cases or index["spatial_dims"] != 3:
        return {"spacing": None, "intensity_ranges": None}
    ranges: dict[int, list] = {}
    for case in cases:
        label = case.get("label", UNKNOWN) if index.get("label_values") else 0
        if label != UNKNOWN:
            ranges.setdefault(label, []).append(case["intensity_range"])
    return {
        "spacing": np.median([case["spacing"] for case in cases], axis=0).tolist(),
        "intensity_ranges": {label: np.median(r, axis=0).tolist() for label, r in ranges.items()},
    }


def view_weights(items: Sequence[Item]) -> np.ndarray:
    """Weight of each item such that every view is drawn equally often; the unknown one counts as a view."""
    _, place, counts = np.unique([item.view for item in items], return_inverse=True, return_counts=True)
    return 1 / counts[place]


def unknown_attributes(items: Sequence[Item]) -> list[str]:
    """Attributes that some of the items do not state."""
    further = (name for name, _ in items[0].further) if items else ()
    names = (*TABLES, "slice_position", *further)
    return [name for name in names if not all(item.stated(name) for item in items)]
