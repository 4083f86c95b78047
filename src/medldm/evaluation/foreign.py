"""Images of other programs, brought onto the grid and into the range of their reference, or refused.

Where an image lies follows from its affine (grids.py), what its numbers mean from `generated_range` or, by
`auto`, from what the whole folder holds and what the reference records (ranges.py). What is decided is said.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medldm.data.preparation.intensity import scale_to_unit
from medldm.data.preparation.recipe import Recipe
from medldm.data.raw.image import RawImage
from medldm.data.raw.readers import read_image
from medldm.data.records import ImageRecord, every_image_below, list_image_files
from medldm.errors import InputError
from medldm.evaluation.grids import clipped, on_grid_of_reference, stored_as
from medldm.evaluation.names import check_broken, first_names
from medldm.evaluation.ranges import (
    NAMED,
    Limits,
    check_range,
    decide_range,
    decide_reference,
    describe_range,
    known_limits,
)
from medldm.evaluation.stored import StoredImage, hdf5_files, load

GRIDS = ("affine", "array")
BACKGROUND = -0.99  # in [-1, 1]: up to here a reference is empty
EXTREMES = "extremes"  # attribute of an image of an HDF5 file that medldm did not write: (low, high)


@dataclass
class Reading:
    """How images of other programs are read, and, in `notes`, what was decided about them.

    `generated_range` and `reference_range` (plain folders; prepared ones are known): auto, unit, symmetric,
    raw or [low, high]; `grid`: affine, or array to take voxels as they lie.
    """

    generated_range: str | Sequence[float] = "auto"
    reference_range: str | Sequence[float] = "auto"
    grid: str = "affine"
    recipe: Recipe | None = None  # of the prepared reference
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for key in ("generated_range", "reference_range"):
            check_range(key, getattr(self, key))
        if self.grid not in GRIDS:
            raise InputError(f"generated_grid={self.grid}: choose {' or '.join(GRIDS)}")

    def note(self, line: str) -> None:
        if line not in self.notes:
            self.notes.append(line)


class ForeignImage(NamedTuple):
    """What is known of a file before it is placed: its (squeezed) shape, type, extremes and affine."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    low: float
    high: float
    affine: np.ndarray | None
    is_coloured: bool = False

    @property
    def is_picture(self) -> bool:
        """Whether its type alone tells the range of its values: unsigned integers, in a file that says
        nothing of a place in the body.
        """
        return self.affine is None and self.dtype.kind == "u"


def squeezed(image: RawImage) -> np.ndarray:
    array = np.squeeze(image.array)
    return array.astype(np.uint8) if array.dtype == bool else array


def look(file: Path) -> ForeignImage:
    """Read a file to learn what it holds. InputError where it is damaged or holds values that are
    not finite.
    """
    image = read_image(file)
    array = squeezed(image)
    if array.ndim not in (2, 3):
        raise InputError(f"{file}: is neither a picture nor a volume (shape {image.array.shape})")
    low, high = float(array.min()), float(array.max())
    if not np.isfinite(array).all():
        raise InputError(f"{file}: holds values that are not finite")
    return ForeignImage(file, array.shape, array.dtype, low, high, image.affine, image.is_coloured)


def place(image: ForeignImage, real: ImageRecord, limits: Limits, reading: Reading) -> np.ndarray:
    """(1, *S) float32 in [-1, 1] on the grid of `real`. InputError where it cannot be brought there."""
    shape, recipe = tuple(real.image.shape[1:]), reading.recipe
    x = scale_to_unit(squeezed(read_image(image.file)), *limits, clip=False)
    if image.affine is None or reading.grid == "array":
        if x.shape != shape:
            raise InputError(
                f"{image.file}: has shape {x.shape} and its reference {shape}; "
                "generate at the size of the reference"
            )
        return clipped(x, recipe)[None]
    if real.attributes.get("affine") is None or len(shape) != 3 or x.ndim != 3:
        raise InputError(
            f"{image.file}: has a place in the body and its reference none, so their axes cannot be "
            "compared; set generated_grid=array to take its values as they lie"
        )
    placed = on_grid_of_reference(x, image.affine, real, recipe)
    if placed is None:
        raise InputError(
            f"{image.file}: lies on another grid than its reference ({describe_grid(image)}); write it on "
            "the grid of the source image or of the prepared case, or set generated_grid=array to take its "
            "voxels as they lie"
        )
    check_covers(image.file, placed[1], real)
    return stored_as(placed[0], recipe)[None]


def describe_grid(image: ForeignImage) -> str:
    sizes = np.linalg.norm(image.affine[:3, :3], axis=0)
    shape, voxel = " x ".join(map(str, image.shape)), " x ".join(f"{size:.4g}" for size in sizes)
    corner = ", ".join(f"{place:.4g}" for place in image.affine[:3, 3])
    return f"{shape} voxels of {voxel} mm from ({corner})"


def check_covers(file: Path, inside: np.ndarray, real: ImageRecord) -> None:
    """InputError where the file has no voxels for a part of the reference that is not background."""
    missing = 0.0 if inside.all() else float((~inside & (load(real.image)[0] > BACKGROUND)).mean())
    if missing:
        raise InputError(
            f"{file}: has no voxels for {missing:.1%} of its reference, where that is not background; "
            "write it on the whole grid of the source image or of the prepared case"
        )


# ---- whole folders ----


def settle(
    folder: Path,
    records: Mapping[str, ImageRecord],
    reals: Mapping[str, ImageRecord],
    reading: Reading,
    what: str = "generated",
) -> dict[str, ImageRecord]:
    """The records with every foreign image in place; `reals` holds the reference of each by the same name."""
    stated, key = reading.generated_range, "generated_range"
    foreign = {name: as_foreign(record) for name, record in records.items()}
    images = {name: image for name, image in foreign.items() if image is not None}
    if not images:
        if what == "generated" and stated != "auto":
            raise InputError(f"{key}={stated}: {folder} was written by medldm, in [-1, 1]; leave it auto")
        return dict(records)
    units = [known_limits(reals[name].attributes) for name in images]
    found = decide_range(key, stated, folder, list(images.values()), units)
    how = "as stated" if stated != "auto" else "by their type" if is_pictures(images) else "by their extremes"
    reading.note(describe_range(what, folder, found.limits, how))
    note_grid(what, folder, images, reading)
    note_surroundings(what, folder, [reals[name] for name in images], reading)
    note_colours(what, folder, images, reading)
    note_passed_over(what, folder, reading)
    placed, broken = dict(records), []
    for name, image in images.items():
        try:
            limits = found.of(reals[name].attributes)
            placed[name] = settled(records[name], image, reals[name], limits, reading)
        except InputError as error:
            broken.append(str(error))
    check_broken(folder, broken, len(images))
    return placed


def is_pictures(images: Mapping[str, ForeignImage]) -> bool:
    return all(image.is_picture for image in images.values())


def note_grid(what: str, folder: Path, images: Mapping[str, ForeignImage], reading: Reading) -> None:
    files = [image for image in images.values() if len(image.shape) == 3]
    loose = [image for image in files if image.affine is None or reading.grid == "array"]
    if loose:
        reading.note(f"{what} {folder}: voxels of {len(loose)} volumes taken as they lie, not by an affine")


def note_surroundings(what: str, folder: Path, reals: Sequence[ImageRecord], reading: Reading) -> None:
    """Where images could not be emptied as their reference was."""
    if reading.recipe is None or not reading.recipe.mask_out or reading.grid == "array":
        return
    lacking = [real.id for real in reals if "body_file" not in real.attributes]
    if lacking:
        reading.note(
            f"{what} {folder}: {len(lacking)} of {len(reals)} references do not hold the body mask that "
            "data.preprocess.mask_out emptied them by (an older medldm prepared them, or they have none); "
            "these images are compared as they are. Prepare the reference again in a new folder"
        )


def note_colours(what: str, folder: Path, images: Mapping[str, ForeignImage], reading: Reading) -> None:
    coloured = [image.file for image in images.values() if image.is_coloured]
    if coloured:
        names = named(coloured, folder)
        reading.note(
            f"{what} {folder}: {len(coloured)} of {len(images)} images hold colours ({names}); taken as grey "
            "by their luminance, so that what differs in hue alone is not judged"
        )


def note_passed_over(what: str, folder: Path, reading: Reading) -> None:
    """Note how many images of a folder were not looked at, because others in it take precedence."""
    if not folder.is_dir():
        return
    places = sample_places(folder) if what == "generated" else [folder]
    read = {file for place in places for file, _ in list_image_files(place)}
    left = [file for file in every_image_below(folder) if file not in read]
    if left:
        reading.note(
            f"{what} {folder}: {len(left)} images take no part ({named(left, folder)}); HDF5 and volumes at "
            "the top of a folder go before pictures, and these before what lies in folders below"
        )


def sample_places(folder: Path) -> list[Path]:
    """Where the samples of every condition lie: the folder, its `sample_1/`, ... or both."""
    places = sorted(folder.glob("sample_*/"), key=lambda place: int(re.sub(r"\D", "", place.name) or 0))
    volumes = (file for file in folder.glob("*.nii*") if not file.name.startswith("."))
    own = not places or bool(hdf5_files(folder)) or any(volumes)
    return [folder, *places] if own else places


def named(files: Sequence[Path], folder: Path) -> str:
    """The first of these files, as they lie in the folder."""
    return first_names([str(file.relative_to(folder)) for file in files])


def as_foreign(record: ImageRecord) -> ForeignImage | None:
    """The record's image as one of another program; None where it is in [-1, 1] on the prepared
    grid already.
    """
    if isinstance(record.image, ForeignImage):
        return record.image
    ends = record.attributes.get(EXTREMES)
    shape = tuple(record.image.shape[1:])
    return None if ends is None else ForeignImage(Path(record.id), shape, np.dtype(np.float32), *ends, None)


def settled(
    record: ImageRecord, image: ForeignImage, real: ImageRecord, limits: Limits, reading: Reading
) -> ImageRecord:
    if not isinstance(record.image, ForeignImage):
        return record if limits == NAMED["symmetric"] else record._replace(image=mapped(record.image, limits))
    read = partial(place, image, real, limits, reading)
    return record._replace(image=StoredImage(read().shape, read))


def mapped(image: StoredImage, limits: Limits) -> StoredImage:
    return StoredImage(image.shape, lambda: scale_to_unit(image.read(), *limits, clip=False))


def settle_reference(
    folder: Path, records: Mapping[str, ImageRecord], reading: Reading
) -> dict[str, ImageRecord]:
    """Put real images that were not prepared in place, each on its own grid. Raw values are scaled by the
    image's own 0.5 and 99.5 percentiles, and so is what is generated for it.
    """
    stated, key = reading.reference_range, "reference_range"
    images = {name: found for name, record in records.items() if (found := as_foreign(record)) is not None}
    if not images:
        if stated != "auto":
            raise InputError(f"{key}={stated}: {folder} was prepared by medldm, in [-1, 1]; leave it auto")
        return dict(records)
    found = decide_reference(key, stated, folder, list(images.values()))
    how = "as stated" if stated != "auto" else "by their type" if is_pictures(images) else "by their extremes"
    if found.limits is None:
        how = "its own 0.5 and 99.5 percentiles, for what is generated for it too"
    reading.note(describe_range("reference", folder, found.limits, how))
    note_colours("reference", folder, images, reading)
    note_passed_over("reference", folder, reading)
    return {
        name: own_place(record, images[name], found.limits) if name in images else record
        for name, record in records.items()
    }


def own_place(record: ImageRecord, image: ForeignImage, limits: Limits | None) -> ImageRecord:
    """A real image in its file's axes; `intensity_range` keeps its limits, the units of what is compared."""
    if not isinstance(record.image, ForeignImage):
        return record if limits == NAMED["symmetric"] else record._replace(image=mapped(record.image, limits))
    attributes = dict(record.attributes)
    if image.affine is not None:
        spacing = np.linalg.norm(image.affine[:3, :3], axis=0).tolist()
        attributes |= {"affine": image.affine, "spacing": spacing[: len(image.shape)]}
    if limits is None:
        low, high = np.percentile(squeezed(read_image(image.file)), (0.5, 99.5))
        limits, attributes["rescaled"] = (float(low), float(high)), True
    attributes["intensity_range"] = limits
    stored = StoredImage((1, *image.shape), partial(as_it_lies, image.file, limits))
    return record._replace(image=stored, attributes=attributes)


def as_it_lies(file: Path, limits: Limits) -> np.ndarray:
    return scale_to_unit(squeezed(read_image(file)), *limits)[None]
