"""2D preparation: all acquisitions of a subject become the slices of one HDF5 file."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from medldm.attributes import NO_CONDITIONS, TABLES
from medldm.data.case import Case
from medldm.data.preparation.casts import exact, finite, within
from medldm.data.preparation.edges import EdgeRecipe
from medldm.data.preparation.intensity import looks_inverted, scale_to_unit
from medldm.data.preparation.jobs import (
    PER_SLICE,
    FileJob,
    Tables,
    check_classes,
    check_numbers,
    check_stored_range,
    finding_numbers,
    has_findings,
    numbers_of,
    shared_entry,
)
from medldm.data.preparation.labels import relabelled
from medldm.data.preparation.planes import Planes, as_volume, cut_planes, find_cut
from medldm.data.preparation.recipe import COMPRESSION, Recipe
from medldm.data.raw.dicom import is_dicom
from medldm.data.raw.grids import is_same_grid, on_grid_of
from medldm.data.raw.readers import read_image, read_mask
from medldm.errors import InputError

log = logging.getLogger(__name__)
TEXTS = ("source", "plane")  # of every slice: its file, and the plane in which it lies


class Part(NamedTuple):
    """One acquisition as the datasets of schema v1, and the grid of its slices before resizing."""

    arrays: dict[str, np.ndarray]
    plane: str
    shape: tuple[int, ...]
    affine: np.ndarray  # (slice, row, column) -> RAS, mm; -> pixels of a picture
    is_coloured: bool  # a picture whose colours were made grey


def read_slices(case: Case, recipe: Recipe) -> tuple[Planes, np.ndarray | None]:
    """Slices of a case and their classes (N, H, W), those of the map brought to the grid of the image. A map
    alone comes with an empty image.
    """
    path = case.main_path
    image = as_volume((read_image if case.has_image else read_mask)(path), path)
    cut = find_cut(image, recipe, path)
    planes, classes = cut_planes(image, cut), None
    if "mask" in case.paths:
        mask_path = case.paths["mask"]
        mask = as_volume(read_mask(mask_path), mask_path) if case.has_image else image
        on_grid = on_grid_of(image, mask, mask_path, recipe.mask_grid)
        lying = cut_planes(image._replace(array=on_grid), cut).array
        classes = recipe.labels(relabelled(lying, case.relabel), mask_path + case.numbering)
    if not case.has_image:
        planes = planes._replace(array=np.zeros(planes.array.shape, np.float32))
    return planes, classes


def is_inverted(case: Case, volume: np.ndarray, rule: str) -> bool:
    """Whether a picture shows air bright (MONOCHROME1): `declared` by its manifest, or seen by `auto`."""
    stated = str(case.attributes.get("photometric", "")).upper()
    if rule == "none" or is_dicom(case.main_path):
        return False  # what reads DICOM has turned MONOCHROME1 already
    if stated or rule == "declared":
        return stated == "MONOCHROME1"
    inverted = looks_inverted(volume[len(volume) // 2])
    if inverted:
        log.warning("%s: looks inverted, turned; declare it, or set preprocess.invert", case.main_path)
    return inverted


def prepare_slices(case: Case, recipe: Recipe, tables: Tables) -> Part:
    """All slices of one acquisition."""
    planes, classes = read_slices(case, recipe)
    spacing = planes.spacing
    volume = finite(planes.array, case.main_path)
    size, count = recipe.image_size, len(volume)
    low, high = recipe.intensity.volume_range(volume)
    if is_inverted(case, volume, recipe.invert):
        volume = (low + high) - volume
    affine = np.eye(4) if planes.affine is None else planes.affine
    if recipe.crop_label_margin is not None:
        box = label_box(classes, spacing, recipe.crop_label_margin, case)
        volume, classes = cut_box(volume, box, low), cut_box(classes, box, 0)
        affine = affine @ shift(0, *(start for start, _ in box))
    images, ranges = [], []
    for plane in volume:
        resized = recipe.resize.image(plane, spacing, size, fill=low)
        if recipe.intensity.mode == "slice_minmax":
            low, high = float(resized.min()), float(resized.max())
        images.append(scale_to_unit(resized, low, high))
        ranges.append((low, high))
    out: dict[str, np.ndarray] = {"images": np.stack(images)} if case.has_image else {}
    if classes is not None:
        out["semantic_maps"] = np.stack([recipe.resize.label(plane, spacing, size) for plane in classes])
    if recipe.edges is not None:
        out |= edge_maps(case, recipe.edges, images, out.get("semantic_maps"))
    out |= slice_numbers(case, tables, count)
    out["spacing"] = np.tile(
        np.float32(recipe.resize.spacing_after(volume.shape[1:], spacing, size)), (count, 1)
    )
    out["orig_shape"] = np.tile(np.int32(volume.shape[1:]), (count, 1))
    out["intensity_range"] = np.float32(ranges)
    return Part(out, planes.plane, volume.shape, affine, planes.is_coloured)


def edge_maps(
    case: Case, recipe: EdgeRecipe, images: Sequence[np.ndarray], maps: np.ndarray | None
) -> dict[str, np.ndarray]:
    """Edges of every slice, and the rougher ones where the recipe has levels."""
    detect = recipe.for_view(str(case.attributes.get("view", "")))
    if not case.has_image and detect.source != "labels":
        raise InputError(
            f"{case.main_path}: a map without an image has no edges to detect; set "
            "data.preprocess.edges.source=labels for its contours, or data.preprocess.edges=null"
        )
    masks = [None] * len(images) if maps is None else maps
    out = {"edges": np.stack([detect(image, mask) for image, mask in zip(images, masks, strict=True)])}
    if detect.levels:
        out["edges_levels"] = np.stack([detect.pyramid(image) for image in images])
    return out


def slice_numbers(case: Case, tables: Tables, count: int) -> dict[str, np.ndarray]:
    """View, phase and label of every slice, and its place in the stack."""
    facts = {**numbers_of(case, tables), "slice_index": np.arange(count), "num_slices": count}
    return {
        key: exact(np.broadcast_to(value, count), np.int16, f"{case.main_path}: {key}")
        for key, value in facts.items()
    }


# (start, stop) of rows and columns; may reach beyond the slice
PixelBox = tuple[tuple[int, int], tuple[int, int]]


def label_box(classes: np.ndarray | None, spacing: Sequence[float], margin: float, case: Case) -> PixelBox:
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


def cut_box(x: np.ndarray, box: PixelBox, fill: float) -> np.ndarray:
    """(N, H, W) -> what lies in `box`, `fill` where it reaches beyond the slice."""
    out = np.full((len(x), *(stop - start for start, stop in box)), fill, x.dtype)
    inside = [(max(0, start), min(n, stop)) for (start, stop), n in zip(box, x.shape[1:], strict=True)]
    source = tuple(slice(first, last) for first, last in inside)
    target = tuple(
        slice(first - start, last - start) for (first, last), (start, _) in zip(inside, box, strict=True)
    )
    out[:, *target] = x[:, *source]
    return out


def shift(*offset: float) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, 3] = offset
    return matrix


def number_grids(parts: Sequence[Part]) -> list[int]:
    """The same number for acquisitions whose slices lie on one grid: only they can be pairs."""
    numbers: list[int] = []
    for part in parts:
        same = (
            number
            for number, other in zip(numbers, parts, strict=False)
            if (part.plane == "picture") == (other.plane == "picture")
            and is_same_grid(part.shape, part.affine, other.shape, other.affine)
        )
        numbers.append(next(same, max(numbers, default=-1) + 1))
    return numbers


def write_slices(job: FileJob, file: h5py.File) -> None:
    """Prepares the slices of a subject and writes them to its file."""
    parts = [prepare_slices(case, job.recipe, job.tables) for case in job.cases]
    arrays = {key: np.concatenate([part.arrays[key] for part in parts]) for key in parts[0].arrays}
    counts = [part.shape[0] for part in parts]
    arrays["grid"] = exact(np.repeat(number_grids(parts), counts), np.int16, f"{job.id}: grids")
    if "images" in arrays:
        arrays["images"] = within(arrays["images"], job.recipe.dtype, job.id)
    for key, array in arrays.items():
        layout = (
            {"chunks": (1, *array.shape[1:]), **COMPRESSION[job.recipe.compression]}
            if array.ndim >= 3
            else {}
        )
        file.create_dataset(key, data=array, **layout)
    if "edges_levels" in file:
        file["edges_levels"].attrs["parameters"] = json.dumps(list(map(dict, job.recipe.edges.levels)))
    texts = {"source": [Path(case.main_path).name for case in job.cases], "plane": [p.plane for p in parts]}
    coloured = [case.id for case, part in zip(job.cases, parts, strict=True) if part.is_coloured]
    if coloured:
        file.attrs["coloured"] = coloured
    for key, values in texts.items():
        file.create_dataset(key, data=np.repeat(values, counts).tolist(), dtype=h5py.string_dtype())


def stated_numbers(job: FileJob, slice_index: np.ndarray) -> dict[str, np.ndarray]:
    """View, phase and label of every slice of a file as its acquisitions state them, one after another."""
    stated = [numbers_of(case, job.tables) for case in job.cases]
    return {kind: np.array([n[kind] for n in stated])[acquisitions(slice_index)] for kind in TABLES}


def differing_values(cases: Sequence[Case], slice_index: np.ndarray) -> dict[str, list]:
    """The attributes to condition on that not all acquisitions of a file agree on, for every slice."""
    columns = {
        name: [case.attributes.get(name, "") for case in cases]
        for name in sorted({name for case in cases for name in case.attributes} - NO_CONDITIONS)
    }
    return {
        name: [column[i] for i in acquisitions(slice_index)]
        for name, column in columns.items()
        if len(set(map(str, column))) > 1
    }


def acquisitions(slice_index: np.ndarray) -> np.ndarray:
    """The number of the acquisition that each slice of a file belongs to."""
    return np.cumsum(slice_index == 0) - 1


def describe_slices(file: h5py.File, path: Path, job: FileJob) -> dict:
    """The entry in index.json of a subject's slices. InputError where the file does not fit its cases."""
    arrays = {key: file[key][()] for key in file if key not in TEXTS}
    lengths = {key: len(array) for key, array in arrays.items()}
    needed = {*PER_SLICE, "spacing", "orig_shape", "intensity_range", "grid"}
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
        check_stored_range(path, arrays["images"])
    if any(arrays[key].max() > 1 for key in ("edges", "edges_levels") if key in arrays):
        raise InputError(f"{path}: edges are not 0 and 1; delete it and prepare again")
    shapes = {arrays[key].shape for key in ("images", "semantic_maps", "edges") if key in arrays}
    if shapes != {(lengths["slice_index"], *job.recipe.image_size)}:
        raise InputError(
            f"{path}: images, maps and edges have shapes {sorted(shapes)}; delete it and prepare again"
        )
    stored = {"image": "images", "mask": "semantic_maps", "edges": "edges", "edges_levels": "edges_levels"}
    entry = shared_entry(job, path, {key: arrays.get(name) for key, name in stored.items()})
    entry["num_slices"] = lengths["slice_index"]
    entry["shape"] = list(job.recipe.image_size)
    entry["spacing"] = [float(s) for s in arrays["spacing"][0]]
    entry["slices"] = {key: arrays[key].tolist() for key in (*PER_SLICE, "grid")}
    if has_findings(job):
        of_case = [finding_numbers(case, job.tables) for case in job.cases]
        entry["slices"]["labels"] = [of_case[i] for i in acquisitions(arrays["slice_index"])]
    entry["slices"] |= differing_values(job.cases, arrays["slice_index"])
    entry["slices"]["source"] = file["source"].asstr()[()].tolist()
    if "coloured" in file.attrs:
        entry["coloured"] = list(map(str, file.attrs["coloured"]))
    entry["planes"] = sorted(set(file["plane"].asstr()[()].tolist()))
    entry["max_class"] = (
        check_classes(path, arrays["semantic_maps"], job) if "semantic_maps" in arrays else None
    )
    entry["classes"] = np.unique(arrays["semantic_maps"]).tolist() if "semantic_maps" in arrays else []
    return entry


def warn_of_planes(cases: Sequence[Mapping[str, Any]]) -> None:
    """One line where a folder mixes planes, such as axial and oblique slices."""
    planes = {plane: case["id"] for case in cases for plane in case.get("planes", ())}
    if len(planes) > 1:
        found = ", ".join(f"{plane} ({example})" for plane, example in sorted(planes.items()))
        log.warning("slices lie in different planes: %s, for instance", found)
