"""Volumes that a 2D model made slice by slice: pictures `<case>_<slice>.png`, read as volumes."""

import re
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from medldm.data.case import stem_of
from medldm.data.preparation.intensity import scale_to_unit
from medldm.data.raw.image import RASTER_SUFFIXES, has_suffix
from medldm.data.raw.readers import read_image
from medldm.data.records import ImageRecord, list_image_files
from medldm.errors import InputError
from medldm.evaluation.stored import StoredImage

# What `medldm export` and segmentation-guided diffusion call a slice.
SLICE_NAME = re.compile(r"(?:condon_)?(?P<case>.+?)(?:_slice)?_(?P<slice>\d+)")


def holds_slices(folder: Path) -> bool:
    """Whether a folder holds pictures and nothing else that could be an image."""
    files = [file for file, _ in list_image_files(folder)] if folder.is_dir() else []
    return bool(files) and all(has_suffix(file, RASTER_SUFFIXES) for file in files)


def read_stacks(folder: Path, axis: int) -> dict[str, ImageRecord]:
    """{case: volume (1, *S) in [-1, 1]} whose slices lie along spatial `axis`, read when they are asked for.

    InputError names a picture that numbers no slice, a slice that is missing, and one that is there twice.
    """
    slices: dict[str, dict[int, Path]] = defaultdict(dict)
    for file, _ in list_image_files(folder):
        match = SLICE_NAME.fullmatch(stem_of(file))
        if match is None:
            raise InputError(f"{file}: the reference holds volumes; name slices <case>_<number>.png")
        number = int(match["slice"])
        if number in slices[match["case"]]:
            raise InputError(
                f"{file}: slice {number} of '{match['case']}' is there twice, also as "
                f"{slices[match['case']][number]}; give the folder that holds the images alone"
            )
        slices[match["case"]][number] = file
    return {case: stack_record(folder, case, files, axis) for case, files in sorted(slices.items())}


def stack_record(folder: Path, case: str, files: dict[int, Path], axis: int) -> ImageRecord:
    numbers = sorted(files)
    gap = next((n for n in range(numbers[0], numbers[-1]) if n not in files), None)
    if gap is not None:
        raise InputError(f"{folder}: slice {gap} of '{case}' is missing; write all of its slices")
    ordered = [files[n] for n in numbers]
    plane = read_plane(ordered[0]).shape[1:]
    shape = (1, *plane[:axis], len(ordered), *plane[axis:])
    volume = StoredImage(shape, partial(read_stack, ordered, axis))
    return ImageRecord(case, case, volume, {}, None, None)


def read_plane(file: Path) -> np.ndarray:
    """(1, H, W) float32 in [-1, 1] of an 8-bit picture, as `medldm export` writes them."""
    array, _, _, is_coloured = read_image(file)
    if is_coloured:
        raise InputError(f"{file}: slices of volumes are grey pictures, this holds colours; save it as grey")
    if array.dtype != np.uint8:
        raise InputError(f"{file}: slices of volumes are read from 8-bit pictures, this is {array.dtype}")
    return scale_to_unit(array, 0, 255)[None]


def read_stack(files: Sequence[Path], axis: int) -> np.ndarray:
    planes = [read_plane(file) for file in files]
    odd = next((i for i, plane in enumerate(planes) if plane.shape != planes[0].shape), None)
    if odd is not None:
        raise InputError(f"{files[odd]}: has another size than the first slice of its volume")
    return np.stack(planes, axis + 1)
