"""3D preparation: one volume becomes one HDF5 file."""

from pathlib import Path
from typing import TYPE_CHECKING

import h5py
import numpy as np

from medldm.attributes import TABLES
from medldm.data.case import Case
from medldm.data.hdf5 import BODY
from medldm.data.preparation.casts import finite, within
from medldm.data.preparation.jobs import (
    FileJob,
    check_classes,
    check_numbers,
    check_stored_range,
    finding_numbers,
    has_findings,
    numbers_of,
    shared_entry,
)
from medldm.data.preparation.labels import relabelled
from medldm.data.preparation.recipe import COMPRESSION, Recipe
from medldm.data.raw.grids import REGISTER, on_grid_of
from medldm.data.raw.image import RawImage
from medldm.data.raw.readers import read_image, read_mask
from medldm.errors import InputError

if TYPE_CHECKING:
    from medldm.data.preparation.volume_transforms import Volume

RECORD = (
    "affine",
    "spacing",
    "original_affine",
    "original_shape",
    "intensity_range",
    "box_start",
    "box_end",
)


def read_volume(path: str, *, is_mask: bool = False) -> RawImage:
    """(X, Y, Z) with its affine. InputError where the file holds anything else."""
    image = (read_mask if is_mask else read_image)(path)
    shape = image.array.shape
    if image.affine is None or len(shape) < 3 or any(n != 1 for n in shape[3:]):
        raise InputError(f"{path}: is no 3D volume (shape {shape}); give NIfTI files with three axes")
    return RawImage(image.array.reshape(shape[:3]), image.affine, image.spacing[:3])


def read_classes(case: Case, image: RawImage, recipe: Recipe) -> np.ndarray:
    """The class map of a case on the grid of its image: one file, or binary masks merged in the order of
    their classes.
    """
    if "mask" in case.paths:
        path = case.paths["mask"]
        on_grid = on_grid_of(image, read_volume(path, is_mask=True), path, recipe.mask_grid)
        return recipe.labels(relabelled(on_grid, case.relabel), path + case.numbering)
    parts = [(int(key.split(":")[1]), path) for key, path in case.paths.items() if key.startswith("mask:")]
    merged = np.zeros(image.array.shape, np.uint8 if max(parts)[0] < 256 else np.uint16)
    for class_number, path in sorted(parts):
        inside = on_grid_of(image, read_volume(path, is_mask=True), path, recipe.mask_grid) > 0
        merged[inside] = class_number
    return recipe.labels(merged, case.main_path)


def prepare_case(case: Case, recipe: Recipe) -> "Volume":
    """Read the files of a case and prepare them: a `volumes.Volume`."""
    from medldm.data.preparation.volume_transforms import (
        prepare_volume,  # MONAI and torch: 2D workers do without
    )

    path, mask = case.main_path, None
    image = read_volume(path, is_mask=not case.has_image)
    if case.has_mask:
        mask = read_classes(case, image, recipe)
    if not case.has_image:  # an empty image stands in; nobody stores it
        image = image._replace(array=np.zeros(image.array.shape, np.float32))
    others = {}
    wanted = {"foreground": recipe.crop_foreground, "body": recipe.mask_out}
    for key in (key for key, is_used in wanted.items() if is_used and key in case.paths):
        other = image if case.paths[key] == path else read_volume(case.paths[key])
        others[key] = finite(on_grid_of(image, other, case.paths[key], "same", REGISTER), case.paths[key])
    if not case.has_image and recipe.crop_foreground:
        others.setdefault("foreground", mask > 0)
    try:
        return prepare_volume(finite(image.array, path), mask, image.affine, recipe, **others)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def write_volume(job: FileJob, file: h5py.File) -> None:
    """Prepares a volume and writes it to its file."""
    (case,), recipe = job.cases, job.recipe
    volume = prepare_case(case, recipe)
    layout = COMPRESSION[recipe.compression]
    if case.has_image:
        file.create_dataset("image", data=within(volume.image, recipe.dtype, case.main_path), **layout)
    if volume.mask is not None:
        file.create_dataset("mask", data=volume.mask, **layout)
    if volume.body is not None:  # images of others are emptied alike when they are compared with this one
        file.create_dataset(BODY, data=volume.body, **COMPRESSION["gzip"]).attrs["outside"] = volume.outside
    file.attrs.update(
        **{key: np.asarray(value) for key, value in volume.record().items()},
        spacing=volume.spacing,
        box_start=volume.box[0],
        box_end=volume.box[1],
        **numbers_of(case, job.tables),
        source=Path(case.main_path).name,
    )


def describe_volume(file: h5py.File, path: Path, job: FileJob) -> dict:
    """The entry in index.json of a prepared volume. InputError where the file does not fit the case."""
    case = job.cases[0]
    image, mask = (file[key][()] if key in file else None for key in ("image", "mask"))
    if image is not None:
        check_stored_range(path, image, limit=1 if job.recipe.intensity.clip else np.inf)
    shapes = {array.shape for array in (image, mask) if array is not None}
    if (case.has_image, case.has_mask) != (image is not None, mask is not None) or len(shapes) != 1:
        raise InputError(f"{path}: image and mask do not match; delete it and prepare again")
    entry = shared_entry(job, path, {"image": image, "mask": mask})
    for key in RECORD:
        entry[key] = np.asarray(file.attrs[key]).tolist()
    check_numbers(path, file.attrs, numbers_of(case, job.tables))
    entry |= {kind: int(file.attrs[kind]) for kind in TABLES} | {"source": file.attrs["source"]}
    if has_findings(job):
        entry["labels"] = finding_numbers(case, job.tables)
    entry["shape"] = list(shapes.pop()[1:])
    entry["max_class"] = None if mask is None else check_classes(path, mask, job)
    entry["classes"] = [] if mask is None else np.unique(mask).tolist()
    return entry
