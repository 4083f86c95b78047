"""Whether a prepared folder has what a training or a model asks of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from medldm.data.loading.dataset import ARRAY_DTYPES
from medldm.data.loading.pairs import OF_SOURCE, check_pairs
from medldm.data.loading.settings import LoaderSettings
from medldm.errors import InputError


def check_keys(keys: Sequence[str], settings: LoaderSettings) -> None:
    """InputError where the arrays that a model reads and the settings do not fit each other."""
    for key in keys:
        if key not in ARRAY_DTYPES:
            raise InputError(f"keys: '{key}' is none of {', '.join(ARRAY_DTYPES)}")
    if settings.edge_degrade is not None and "edges" not in keys:
        raise InputError("data.edge_degrade: this model reads no edges; set data.edge_degrade=null")
    if any("latent" in key for key in keys) != (settings.latents is not None):
        raise InputError("data.latents: name a latent cache exactly where the model trains on latents")
    if settings.latents is not None and settings.flip_axes:
        raise InputError("data.latents: cached latents cannot be flipped; set data.flip_axes=[]")


def check_prepared(root: Path, index: Mapping, keys: Sequence[str], settings: LoaderSettings) -> None:
    """InputError where a folder was prepared without something that `keys` or the settings name."""
    if not index.get("has_images", True) and {"image", "source", *OF_SOURCE} & set(keys):
        raise InputError(
            f"{root}: was prepared from class maps alone, to sample from; add the images for this"
        )
    for case in index["cases"] if index["spatial_dims"] == 3 else ():
        if None in (case.get("spacing"), case.get("affine")):
            raise InputError(f"{root}: index.json states no spacing or affine of {case['id']}; prepare again")
    check_pairs(settings.pairs, settings.pair_labels, keys, index.get("label_values") or [])
    if "mask" in keys:
        check_has_masks(root, index)
    if "edges" in keys and not index.get("has_edges", False):
        raise InputError(
            f"{root}: was prepared without edges; prepare with data.preprocess.edges.source=image"
        )
    check_views(index.get("view_names") or [], settings)


def check_has_masks(root: Path, index: Mapping) -> None:
    if index.get("num_classes") is None:
        raise InputError(f"{root}: was prepared without masks; add them, or use a model that needs none")
    bare = [case["id"] for case in index["cases"] if case.get("max_class", 0) is None]
    if bare:
        raise InputError(
            f"{root}: {len(bare)} cases were prepared without a class map ({bare[0]}...), which this model "
            "needs; add the maps, or take these cases away, and prepare again"
        )


def check_views(names: Sequence[str], settings: LoaderSettings) -> None:
    """InputError where `views` or `balance_views` ask for what the data's view `names` do not give."""
    unknown = [view for view in settings.views or () if view not in names]
    if unknown:
        raise InputError(
            f"data.views: the dataset has no view '{unknown[0]}', but {', '.join(names) or 'none'}"
        )
    if settings.views is not None and not settings.views:
        raise InputError("data.views=[]: name at least one view, or null for all")
    if settings.balance_views and len(names) < 2:
        raise InputError("data.balance_views: the dataset has one view only; set it to false")


def check_files(root: Path, cases: Sequence[Mapping]) -> None:
    """InputError for a file of the index that is not there, or has another size."""
    for case in cases:
        path = root / case["file"]
        size = path.stat().st_size if path.is_file() else None
        if size is None or size != case.get("file_size", size):
            state = "missing" if size is None else "damaged: its size has changed"
            raise InputError(f"{path}: {state}; run `medldm prepare` again, finished cases are kept")
