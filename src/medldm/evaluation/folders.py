"""Reads the folders of an evaluation: images by their names, and all that is wrong in one line."""

import re
from collections.abc import Collection, Iterable, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from medldm.data.datasets.mnms2 import MAPPING_INDEX
from medldm.data.hdf5 import open_hdf5
from medldm.data.raw.image import HDF5_SUFFIXES, has_suffix
from medldm.data.records import ImageRecord, hdf5_records, list_image_files
from medldm.errors import InputError
from medldm.evaluation.foreign import EXTREMES, Reading, look, sample_places, settle_reference
from medldm.evaluation.names import NUM_BROKEN, besides, check_broken, faults_of
from medldm.evaluation.slices import axial_axis
from medldm.evaluation.stacks import SLICE_NAME, holds_slices, read_stacks
from medldm.evaluation.stored import hdf5_files, store

NOTHING_FITS = "holds no images that fit"


def stored_names(path: Path) -> dict[str, str]:
    """The name of each image by its position in a file that holds some of a case's slices: the name of the
    slice's row in the prepared case.
    """
    names: dict[str, str] = {}
    for file in hdf5_files(path):
        try:
            reader = open_hdf5(file)
        except InputError:  # named with all others, when the images are read
            continue
        if "row" in reader:
            rows = reader.read("row").tolist()
            names |= {f"{file.stem}_{i:03d}": f"{file.stem}_{row:03d}" for i, row in enumerate(rows)}
    return names


def read_folder(path: Path, *, ids: Collection[str] | None = None, sample: int = 0) -> dict[str, ImageRecord]:
    """Every image of a folder by name, those of other programs not placed yet (`ForeignImage`).

    InputError where two files would have the same name, or some cannot be used: all of them are named.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    names = stored_names(path)
    wanted = ids if ids is None or not names else {old for old, new in names.items() if new in ids} | set(ids)
    files = list_image_files(path)
    records: dict[str, ImageRecord] = {}
    broken: list[str] = []
    for file, case in files:
        try:
            for record in read_file(file, case, wanted, sample):
                name = names.get(record.id, record.id)
                if ids is not None and name not in ids:
                    continue
                if name in records:
                    broken.append(f"{path}: two images are named {name}; put one of them elsewhere")
                elif isinstance(record.image, np.ndarray) and not np.isfinite(record.image).all():
                    broken.append(f"{path}: '{name}' holds values that are not finite; write it again")
                else:
                    records[name] = store(told_apart(record, path)._replace(id=name), file, sample)
        except InputError as error:
            broken.append(str(error))
    check_broken(path, broken, len(files))
    if not records:
        raise InputError(f"{path}: {NOTHING_FITS}; expected HDF5, NIfTI, NRRD, NumPy, PNG or JPEG")
    return records


def read_file(file: Path, case: dict, ids: Collection[str] | None, sample: int) -> Iterable[ImageRecord]:
    """The images of one file."""
    if has_suffix(file, HDF5_SUFFIXES):
        return hdf5_records(file, case, None, ids, sample)
    if ids is not None and case["id"] not in ids:
        return []
    image = look(file)
    is_slice = len(image.shape) == 2 and image.affine is None
    subject = re.sub(r"_\d+$", "", case["id"]) if is_slice else case["id"]
    return [ImageRecord(case["id"], subject, image, {}, None, None)]


def told_apart(record: ImageRecord, path: Path) -> ImageRecord:
    """The record with the extremes of its values, where neither an index nor a provenance.json says that
    medldm wrote it.
    """
    known = any((path / name).is_file() for name in ("index.json", "provenance.json", MAPPING_INDEX))
    if known or not isinstance(record.image, np.ndarray):
        return record
    ends = float(record.image.min()), float(record.image.max())
    return record._replace(attributes=record.attributes | {EXTREMES: ends})


def listed_names(names: Sequence[str]) -> str:
    """': a, b, ...' of several names, as far as they fit in a line; nothing for one, which was named."""
    if len(names) < 2:
        return ""
    return ": " + ", ".join(names[:NUM_BROKEN]) + (", ..." if len(names) > NUM_BROKEN else "")


def read_matching(
    path: Path, ids: Collection[str], against: Path, reading: Reading | None = None
) -> dict[str, ImageRecord]:
    """The images of `path` with these names; every name must be there. With `reading` they are the real ones,
    each in its own place.
    """
    try:
        with besides(lambda: missing_files(path, ids, against)):
            records = read_folder(path, ids=ids)
    except InputError as error:
        if path.exists() and NOTHING_FITS in str(error):
            first = next(iter(read_folder(path)))
            raise InputError(
                f"{against}: no image has a name in common with {path} "
                f"('{sorted(ids)[0]}' here, '{first}' there); give folders whose files are named alike"
            ) from error
        raise
    if missing := set(ids) - records.keys():
        raise InputError(without_partner(missing, len(ids), path, against))
    return records if reading is None else settle_reference(path, records, reading)


def without_partner(missing: Collection[str], num: int, path: Path, against: Path) -> str:
    names = sorted(missing)
    return (
        f"{against}: '{names[0]}' has no image of that name in {path} "
        f"({len(names)} of {num} missing{listed_names(names)}); take it out or add its reference"
    )


def missing_files(path: Path, ids: Collection[str], against: Path) -> list[str]:
    """The line for names of which, by its list of files, `path` has no image: no file is opened."""
    if not path.exists():
        return []
    there = {case["id"] for _, case in list_image_files(path)}
    missing = [name for name in ids if name not in there and case_of(name) not in there]
    return [without_partner(missing, len(ids), path, against)] if missing else []


def case_of(name: str) -> str:
    """The case that the name of a slice begins with; any other name itself."""
    found = SLICE_NAME.fullmatch(name)
    return found["case"] if found else name


def faults_of_reference(reference: Path, names: Collection[str], facts: dict, generated: Path) -> list[str]:
    """What is wrong with the real images of these names, where those of `generated` cannot all be read."""
    wanted = {*names, *map(case_of, names)}
    cases = [case for case in facts.get("cases", ()) if case["id"] in wanted]
    wanted |= {f"{case['id']}_{row:03d}" for case in cases for row in range(case.get("num_slices") or 0)}
    lines = missing_files(reference, names, generated)
    found = faults_of(partial(read_folder, reference, ids=wanted))
    return lines + [line for line in found if NOTHING_FITS not in line]


def file_names(generated: Path) -> set[str]:
    """The names of generated images as far as their files tell them: of a file of slices, its case."""
    if not generated.exists():
        return set()
    return {case["id"] for place in sample_places(generated) for _, case in list_image_files(place)}


def count_samples(file: Path) -> int | None:
    """How many images of each condition a file holds; None for one that cannot be read, which is named with
    all others when the images are.
    """
    try:
        reader, num = open_hdf5(file), 1
    except InputError:
        return None
    while f"images_{num}" in reader:
        num += 1
    return num


def read_samples(path: Path) -> list[dict[str, ImageRecord]]:
    """The K samples of every condition: `images_1`, ... in the HDF5 files, or folders `sample_1/`, ..."""
    folders = [place for place in sample_places(path) if place != path]
    files = hdf5_files(path)
    num_samples = int(path in sample_places(path))
    counts = {file: count for file in files if (count := count_samples(file)) is not None}
    if counts:
        first, num_samples = next(iter(counts.items()))
        odd = next((file for file, count in counts.items() if count != num_samples), None)
        if odd is not None:
            raise InputError(
                f"{odd}: holds {counts[odd]} samples and {first.name} {num_samples}; sample again"
            )
    samples = [read_folder(path, sample=k) for k in range(num_samples)]
    samples += [read_folder(folder) for folder in folders]
    for extra in samples[1:]:
        if extra.keys() != samples[0].keys():
            name = sorted(extra.keys() ^ samples[0].keys())[0]
            raise InputError(f"{path}: '{name}' does not have as many samples as the others; sample again")
    return samples


def read_generated(path: Path, facts: dict) -> list[dict[str, ImageRecord]]:
    """The samples of a folder; where pictures stand against prepared volumes, the volumes of their slices."""
    if facts.get("spatial_dims") == 3 and holds_slices(path):
        return [read_stacks(path, axial_axis(facts, {}))]
    return read_samples(path)
