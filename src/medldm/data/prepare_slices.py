"""2D preparation: all acquisitions of a subject become the slices of one HDF5 file."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

import h5py
import numpy as np

from medldm.attributes import TABLES
from medldm.data.case import Case
from medldm.data.jobs import (
    PER_SLICE,
    Job,
    Tables,
    check_classes,
    check_numbers,
    check_range,
    entry_of,
    numbers_of,
)
from medldm.data.readers import Image, read_image, read_mask
from medldm.data.recipe import COMPRESSION, Recipe
from medldm.data.transforms import finite, looks_inverted, renumber, to_unit
from medldm.errors import InputError

log = logging.getLogger(__name__)


def as_slices(image: Image, axis: int, path: str) -> tuple[np.ndarray, tuple[float, float]]:
    """(N, H, W), and mm per pixel (H, W). A NIfTI plane (X, Y) becomes rows Y and columns X."""
    if image.affine is None:
        return image.array[None], image.spacing or (1.0, 1.0)
    array, spacing = image.array, [s or 1.0 for s in image.spacing]
    while array.ndim > 3 and array.shape[-1] == 1:
        array, spacing = array[..., 0], spacing[:-1]
    if array.ndim not in (2, 3):
        raise InputError(f"{path}: has {array.ndim} axes {array.shape}; give one volume a file")
    if array.ndim == 2:
        array, spacing = array[..., None], [*spacing, 1.0]
    planes = np.moveaxis(array, axis, 2).transpose(2, 1, 0)
    in_plane = [s for i, s in enumerate(spacing) if i != axis]
    return planes, (in_plane[1], in_plane[0])


def read_pair(case: Case) -> tuple[Image, Image | None]:
    """Image and mask of a case on one grid; InputError where their shapes differ. A mask alone comes with an
    empty image.
    """
    if not case.has_image:
        mask = read_mask(case.paths["mask"])
        return mask._replace(array=np.zeros(mask.array.shape, np.float32)), mask
    image = read_image(case.paths["image"])
    if "mask" not in case.paths:
        return image, None
    mask = read_mask(case.paths["mask"])
    if mask.array.shape != image.array.shape:
        raise InputError(
            f"{case.paths['mask']}: mask of shape {mask.array.shape} for an image of shape "
            f"{image.array.shape}; "
            "resample one onto the other's grid"
        )
    if mask.affine is not None and image.affine is not None:
        apart = np.abs(mask.affine - image.affine)[:3, 3].max()
        if apart > max(image.spacing[:3]):
            log.warning(
                "%s: lies %.1f mm away from its image, whose grid is taken", case.paths["mask"], apart
            )
    return image, mask


def is_inverted(case: Case, volume: np.ndarray, rule: str) -> bool:
    """Whether a picture shows air bright (MONOCHROME1): `declared` by its manifest, or seen by `auto`."""
    stated = str(case.attributes.get("photometric", "")).upper()
    if rule == "none":
        return False
    if stated or rule == "declared":
        return stated == "MONOCHROME1"
    inverted = looks_inverted(volume[len(volume) // 2])
    if inverted:
        log.warning("%s: looks inverted, turned; declare it, or set preprocess.invert", case.main_path)
    return inverted


def prepare_slices(case: Case, recipe: Recipe, tables: Tables) -> dict[str, np.ndarray]:
    """All slices of one acquisition as the datasets of schema v1."""
    raw, raw_mask = read_pair(case)
    volume, spacing = as_slices(raw, recipe.slice_axis, case.main_path)
    volume = finite(volume, case.main_path)
    size, count = recipe.image_size, len(volume)
    view = str(case.attributes.get("view", ""))
    low, high = recipe.intensity.volume_range(volume)
    if is_inverted(case, volume, recipe.invert):
        volume = (low + high) - volume
    classes = None
    if raw_mask is not None:
        planes, _ = as_slices(raw_mask, recipe.slice_axis, case.paths["mask"])
        classes = recipe.labels(renumber(planes, case.relabel), case.paths["mask"]).astype(np.uint8)
    if recipe.crop_label_margin is not None:
        box = label_box(classes, spacing, recipe.crop_label_margin, case)
        volume, classes = cut(volume, box, low), cut(classes, box, 0)
    images, ranges = [], []
    for plane in volume:
        resized = recipe.resize.image(plane, spacing, size, fill=low)
        if recipe.intensity.mode == "slice_minmax":
            low, high = float(resized.min()), float(resized.max())
        images.append(to_unit(resized, low, high))
        ranges.append((low, high))
    out: dict[str, np.ndarray] = {"images": np.stack(images)} if case.has_image else {}
    if classes is not None:
        out["semantic_maps"] = np.stack([recipe.resize.label(plane, spacing, size) for plane in classes])
    if recipe.edges is not None:
        detect = recipe.edges.for_view(view)
        if not case.has_image and detect.source != "labels":
            raise InputError(
                f"{case.main_path}: a map without an image has no edges to detect; set "
                "data.preprocess.edges.source=labels for its contours, or data.preprocess.edges=null"
            )
        maps = out.get("semantic_maps", [None] * count)
        out["edges"] = np.stack([detect(image, mask) for image, mask in zip(images, maps, strict=True)])
        if detect.levels:
            out["edges_levels"] = np.stack([detect.pyramid(image) for image in images])
    for kind, value in numbers_of(case, tables).items():
        out[kind] = np.full(count, value, np.int16)
    out["slice_index"] = np.arange(count, dtype=np.int16)
    out["num_slices"] = np.full(count, count, np.int16)
    out["spacing"] = np.tile(
        np.float32(recipe.resize.spacing_after(volume.shape[1:], spacing, size)), (count, 1)
    )
    out["orig_shape"] = np.tile(np.int32(volume.shape[1:]), (count, 1))
    out["intensity_range"] = np.float32(ranges)
    return out


Box = tuple[tuple[int, int], tuple[int, int]]  # (start, stop) of rows and columns; may reach beyond the slice


def label_box(classes: np.ndarray | None, spacing: Sequence[float], margin: float, case: Case) -> Box:
    """The square, in mm, about every labelled pixel of a stack (N, H, W), wider by `margin` of its side at
    each edge: one box for all slices. InputError where nothing is labelled.
    """
    if classes is None or not classes.any():
        file = case.paths.get("mask", case.main_path)
        raise InputError(
            f"{file}: nothing is labelled, so there is nothing to crop to; take the case out, or set "
            "data.preprocess.crop_label_margin=null"
        )
    marked = classes.any(0)
    lines = [np.flatnonzero(marked.any(1 - axis)) for axis in (0, 1)]
    side = max((at[-1] - at[0] + 1) * s for at, s in zip(lines, spacing, strict=True)) * (1 + 2 * margin)
    box = []
    for at, s in zip(lines, spacing, strict=True):
        length = max(1, round(side / s))
        start = round((at[0] + at[-1] + 1 - length) / 2)
        box.append((start, start + length))
    return tuple(box)


def cut(x: np.ndarray, box: Box, fill: float) -> np.ndarray:
    """(N, H, W) -> what lies in `box`, `fill` where it reaches beyond the slice."""
    out = np.full((len(x), *(stop - start for start, stop in box)), fill, x.dtype)
    inside = [(max(0, start), min(n, stop)) for (start, stop), n in zip(box, x.shape[1:], strict=True)]
    source = tuple(slice(first, last) for first, last in inside)
    target = tuple(
        slice(first - start, last - start) for (first, last), (start, _) in zip(inside, box, strict=True)
    )
    out[:, *target] = x[:, *source]
    return out


def write_slices(job: Job, file: h5py.File) -> None:
    parts = [prepare_slices(case, job.recipe, job.tables) for case in job.cases]
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    if "images" in arrays:
        arrays["images"] = arrays["images"].astype(job.recipe.dtype)
    for key, array in arrays.items():
        layout = (
            {"chunks": (1, *array.shape[1:]), **COMPRESSION[job.recipe.compression]}
            if array.ndim >= 3
            else {}
        )
        file.create_dataset(key, data=array, **layout)
    if "edges_levels" in file:
        file["edges_levels"].attrs["parameters"] = json.dumps(list(map(dict, job.recipe.edges.levels)))
    sources = [
        Path(case.main_path).name for case, part in zip(job.cases, parts, strict=True) for _ in part["view"]
    ]
    file.create_dataset("source", data=sources, dtype=h5py.string_dtype())


def stated_numbers(job: Job, slice_index: np.ndarray) -> dict[str, np.ndarray]:
    """View, phase and label of every slice of a file as its acquisitions state them, one after another."""
    acquisition = np.cumsum(slice_index == 0) - 1
    stated = [numbers_of(case, job.tables) for case in job.cases]
    return {kind: np.array([numbers[kind] for numbers in stated])[acquisition] for kind in TABLES}


def describe_slices(file: h5py.File, path: Path, job: Job) -> dict:
    arrays = {key: file[key][()] for key in file if key != "source"}
    lengths = {key: len(array) for key, array in arrays.items()}
    needed = {
        "slice_index",
        "num_slices",
        "view",
        "phase",
        "label",
        "spacing",
        "orig_shape",
        "intensity_range",
    }
    needed |= {"images"} if job.cases[0].has_image else set()
    needed |= {"semantic_maps"} if "mask" in job.cases[0].paths else set()
    needed |= {"edges"} if job.recipe.edges is not None else set()
    needed |= {"edges_levels"} if job.recipe.edges is not None and job.recipe.edges.levels else set()
    if not needed <= lengths.keys() or len(set(lengths.values())) != 1:
        raise InputError(
            f"{path}: datasets are missing or of unequal length {lengths}; delete it and prepare again"
        )
    check_numbers(path, arrays, stated_numbers(job, arrays["slice_index"]))
    if "images" in arrays:
        check_range(path, arrays["images"])
    if any(arrays[key].max() > 1 for key in ("edges", "edges_levels") if key in arrays):
        raise InputError(f"{path}: edges are not 0 and 1; delete it and prepare again")
    shapes = {arrays[key].shape for key in ("images", "semantic_maps", "edges") if key in arrays}
    if shapes != {(lengths["slice_index"], *job.recipe.image_size)}:
        raise InputError(
            f"{path}: images, maps and edges have shapes {sorted(shapes)}; delete it and prepare again"
        )
    entry = entry_of(job, path)
    entry["num_slices"] = lengths["slice_index"]
    entry["shape"] = list(job.recipe.image_size)
    entry["spacing"] = [float(s) for s in arrays["spacing"][0]]
    entry["slices"] = {key: arrays[key].tolist() for key in PER_SLICE}
    entry["slices"]["source"] = file["source"].asstr()[()].tolist()
    entry["max_class"] = (
        check_classes(path, arrays["semantic_maps"], job) if "semantic_maps" in arrays else None
    )
    entry["classes"] = np.unique(arrays["semantic_maps"]).tolist() if "semantic_maps" in arrays else []
    return entry
