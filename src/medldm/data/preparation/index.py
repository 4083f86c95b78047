"""What `index.json` says of a prepared folder, and whether it is true."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medldm.attributes import declared_by, with_attributes
from medldm.data.preparation.jobs import FileJob, has_findings
from medldm.data.preparation.labels import mapping_override
from medldm.data.preparation.recipe import SCHEMA_VERSION, Recipe
from medldm.data.prepared import load_index
from medldm.errors import InputError


def count_classes(recipe: Recipe, jobs: Sequence[FileJob], entries: Sequence[dict]) -> int | None:
    """Number of classes with the background, or None without masks. InputError where the numbering has wide
    gaps.
    """
    mapped = [
        (job, entry) for job, entry in zip(jobs, entries, strict=True) if entry["max_class"] is not None
    ]
    if not mapped:
        return None
    if recipe.labels.names is not None:
        return len(recipe.labels.names)
    largest = [entry["max_class"] for _, entry in mapped]
    present = sorted({value for entry in entries for value in entry["classes"]})
    if max(largest) >= 16 and 4 * len(present) < max(largest):
        case = mapped[int(np.argmax(largest))][0].cases[0]
        mapping = {value: i for i, value in enumerate(present)}
        raise InputError(
            f"{case.paths.get('mask', case.main_path)}: class numbers go up to {max(largest)} but only "
            f"{len(present)} occur; number them anew with {mapping_override(mapping)}"
        )
    return max(max(largest) + 1, 2)


def make_index(dataset: str, recipe: Recipe, jobs: Sequence[FileJob], entries: Sequence[dict]) -> dict:
    """What `index.json` says. Files of CINE frames stand under `cine`, which is there where they are: nothing
    but the training of an autoencoder reads them.
    """
    both = list(zip(jobs, entries, strict=True))
    cine = [{**entry, "cine": True} for job, entry in both if job.is_cine]
    tables = jobs[0].tables
    shapes = {tuple(entry["shape"]) for entry in entries}
    names = recipe.labels.names
    num_classes = count_classes(recipe, jobs, entries)
    index = {
        "schema_version": SCHEMA_VERSION,
        "dataset": dataset,
        "spatial_dims": recipe.spatial_dims,
        "image_channels": 1,
        "num_classes": num_classes,
        "label_names": None if names is None or num_classes is None else list(names),
        "num_views": len(tables.views),
        "view_names": tables.views,
        "num_phases": len(tables.phases),
        "phase_names": tables.phases,
        "num_labels": len(tables.labels),
        "label_values": tables.labels,
        "multi_label": any(map(has_findings, jobs)),
        "attributes": declared_by(entries),
        "image_size": list(shapes.pop()) if len(shapes) == 1 else None,
        "has_images": jobs[0].cases[0].has_image,
        "has_edges": recipe.edges is not None,
        "num_edge_levels": 0 if recipe.edges is None else len(recipe.edges.levels),
        "orientation": recipe.orientation if recipe.spatial_dims == 3 else None,
        "preprocess": recipe.as_dict(),
        "preprocess_hash": recipe.hash,
        "cases": [entry for job, entry in both if not job.is_cine],
        **({"cine": cine} if cine else {}),
    }
    return with_attributes(index)


def verify(root: Path) -> None:
    """Check the index against the files beside it: each is there, whole, and as long as stated. What is
    inside every file was checked when it was written or taken over.
    """
    index = load_index(root)
    for case in [*index["cases"], *index.get("cine", ())]:
        path = root / case["file"]
        if not path.is_file() or path.stat().st_size != case["file_size"]:
            raise InputError(f"{path}: missing or changed while preparing; run `medldm prepare` again")
        if index["spatial_dims"] == 2 and any(
            len(values) != case["num_slices"] for values in case["slices"].values()
        ):
            raise InputError(f"{path}: the index does not match its slices; run `medldm prepare` again")
