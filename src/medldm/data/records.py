"""Reads the images of any folder one after another: prepared ones, samples of a model, or other pictures."""

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medldm.attributes import NO_CONDITIONS, TABLES, UNKNOWN
from medldm.data.case import stem_of
from medldm.data.datasets.mnms2 import MAPPING_INDEX
from medldm.data.hdf5 import BODY, HDF5Reader, open_hdf5
from medldm.data.prepared import load_index
from medldm.data.raw.image import HDF5_SUFFIXES, RASTER_SUFFIXES, RawImage, has_suffix
from medldm.data.raw.readers import is_image, read_image
from medldm.errors import InputError
from medldm.files import walk

PER_IMAGE = ("view", "phase", "slice_index", "num_slices", "spacing", "label")  # what files of slices hold


class ImageRecord(NamedTuple):
    """One image with all that is known of it."""

    id: str  # pairs the records of two folders: `<case>_<row, three digits>` in 2D, `<case>` in 3D
    subject: str
    image: np.ndarray  # (C, *S) float32 in [-1, 1]
    attributes: dict  # view, phase, slice_index, num_slices, spacing, affine, vendor... where known
    edges: np.ndarray | None  # (1, *S) uint8 {0, 1}
    mask: np.ndarray | None  # (1, *S) class map


def read_images(
    path: str | Path,
    *,
    subjects: Collection[str] | None = None,
    ids: Collection[str] | None = None,
    sample: int = 0,
) -> Iterator[ImageRecord]:
    """Images of a prepared folder, of a folder that `medldm sample` wrote, or of any folder or file of
    pictures.

    HDF5 and volumes at the top of the folder take precedence over pictures below it, and HDF5 over a volume
    of the same name. HDF5 keeps its values; integers of a picture are scaled by the range of their type; a
    NIfTI within [-1, 1] is read as it is, any other is scaled by its own 0.5 and 99.5 percentiles
    (`attributes["rescaled"]` says so). `subjects` and `ids` restrict what is read; `sample` picks
    `images_<k>` where a file holds several samples a condition.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    found = False
    for record in iterate_records(path, subjects, ids, sample):
        found = True
        yield record
    if not found:
        raise InputError(f"{path}: holds no images that fit; expected HDF5, NIfTI, PNG or JPEG")


def iterate_records(
    path: Path, subjects: Collection[str] | None, ids: Collection[str] | None, sample: int
) -> Iterator[ImageRecord]:
    for file, case in list_image_files(path):
        if has_suffix(file, HDF5_SUFFIXES):
            yield from hdf5_records(file, case, subjects, ids, sample)
            continue
        record_id = case["id"]
        subject = re.sub(r"_\d+$", "", record_id) if has_suffix(file, RASTER_SUFFIXES) else record_id
        if (subjects is None or subject in subjects) and (ids is None or record_id in ids):
            image, attributes = to_unit_range(read_image(file))
            yield ImageRecord(record_id, subject, image, attributes, None, None)


def list_image_files(path: Path) -> list[tuple[Path, dict]]:
    """The image files of a folder (or the one file), each with what is known of its case."""
    if path.is_file():
        return [(path, {"id": stem_of(path)})]
    if (path / "index.json").is_file() or (path / MAPPING_INDEX).is_file():
        return [(path / case["file"], case) for case in load_index(path)["cases"]]
    top = [path / name for name in next(walk(path))[1] if (path / name).is_file() and is_image(path / name)]
    known = {stem_of(p) for p in top if has_suffix(p, HDF5_SUFFIXES)}
    files = [p for p in top if has_suffix(p, HDF5_SUFFIXES)]
    files += [
        p for p in top if not has_suffix(p, HDF5_SUFFIXES + RASTER_SUFFIXES) and stem_of(p) not in known
    ]
    if not files:
        below = (folder / name for folder, names in walk(path) for name in names)
        files = [p for p in below if is_image(p) and not has_suffix(p, HDF5_SUFFIXES)]
    files.sort()
    return [(file, {"id": stem_of(file)}) for file in files]


def every_image_below(path: Path) -> list[Path]:
    """Every file of an image in a folder and below it, also those that `list_image_files` passes over."""
    return [folder / name for folder, names in walk(path) for name in names if is_image(folder / name)]


def hdf5_records(
    file: Path,
    case: dict,
    subjects: Collection[str] | None,
    ids: Collection[str] | None,
    sample: int,
) -> Iterator[ImageRecord]:
    """The images of one HDF5 file: its slices in 2D, or its volume."""
    reader = open_hdf5(file)
    attributes = {**case.get("attributes", {}), **reader.attributes}
    stated = attributes.get("subject_id", attributes.get("subject", case["id"]))
    subject = str(case.get("subject", stated))
    if subjects is not None and subject not in subjects:
        return
    key = "images" if sample == 0 else f"images_{sample}"
    names = reader.names
    if not {"image", "images"} & names:
        raise InputError(f"{file}: holds a class map and no image, so there is nothing to see or to compare")
    for name, digest in (case.get("content") or {}).items():
        reader.check_content(name, digest)
    if "image" in names or attributes.get("spatial_dims") == 3:  # one volume, prepared or generated
        if ids is None or case["id"] in ids:
            mask = reader.read("mask") if "mask" in reader else None
            image = np.asarray(reader.read("image" if "image" in names else key), np.float32)
            stated = {kind: case[kind] for kind in TABLES if kind in case}
            stated |= {"body_file": str(file)} if BODY in reader.file else {}
            yield ImageRecord(case["id"], subject, image, known({**attributes, **stated}), None, mask)
        return
    slices = case.get("slices", {})
    per_slice = {
        name: slices[name] if name in slices else reader.read(name)
        for name in (*PER_IMAGE, *(name for name in slices if name not in NO_CONDITIONS))
        if name in slices or name in reader
    }
    for row in range(len(reader.dataset(key))):
        record_id = f"{case['id']}_{row:03d}"
        if ids is not None and record_id not in ids:
            continue
        facts = {name: np.asarray(values[row]).tolist() for name, values in per_slice.items()}
        yield ImageRecord(
            record_id,
            subject,
            slice_image(reader, key, row),
            known({**attributes, **facts, "row": row}),
            reader.read_row("edges", row)[None] if "edges" in reader else None,
            reader.read_row("mask", row)[None] if "mask" in reader else None,
        )


def slice_image(reader: HDF5Reader, key: str, row: int) -> np.ndarray:
    """One slice of a file of slices, (1, H, W) float32."""
    return np.asarray(reader.read_row(key, row), np.float32)[None]


def known(attributes: dict) -> dict:
    """The attributes without unknown views, phases and labels."""
    return {k: value for k, value in attributes.items() if not (k in TABLES and value == UNKNOWN)}


def to_unit_range(image: RawImage) -> tuple[np.ndarray, dict]:
    """(1, *S) float32 in [-1, 1], and the attributes that tell what was done to it."""
    array = image.array
    attributes: dict = {} if image.affine is None else {"affine": image.affine, "spacing": image.spacing}
    if image.affine is None and np.issubdtype(array.dtype, np.unsignedinteger):
        return (array.astype(np.float32) / (np.iinfo(array.dtype).max / 2) - 1)[None], attributes
    array = np.squeeze(np.nan_to_num(array.astype(np.float32)))
    if np.abs(array).max() > 1.001:
        low, high = np.percentile(array, (0.5, 99.5))
        array = (array - low) * (2 / max(high - low, 1e-12)) - 1
        attributes["rescaled"] = True
    return np.clip(array, -1, 1)[None], attributes
