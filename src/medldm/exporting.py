"""Writes prepared images and class maps as 8-bit PNG slices, in a folder for each part of a split."""

import logging
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from medldm.data.loading.dataset import array_digests
from medldm.data.preparation.casts import exact
from medldm.data.prepared import load_index
from medldm.data.raw.grids import body_axis
from medldm.data.records import read_images
from medldm.data.splits import SUBSETS, read_splits
from medldm.errors import InputError
from medldm.files import inside, replacing, write_json
from medldm.fingerprints import digest
from medldm.outputs import claim
from medldm.progress import tracked
from medldm.schemas import Provenance, read_checked

log = logging.getLogger(__name__)
MAX_CLASSES = 256  # the number of classes that 8 bits can hold


def planes_of(record: Any, axis: int | None) -> Iterator[tuple[str, Any, Any]]:
    """(name, image (H, W), class map or None) of every slice."""
    if axis is None:
        yield record.id, record.image[0], None if record.mask is None else record.mask[0]
        return
    for k in range(record.image.shape[axis + 1]):
        mask = None if record.mask is None else record.mask[0].take(k, axis)
        yield f"{record.id}_{k:03d}", record.image[0].take(k, axis), mask


def write_grey(path: Path, array: np.ndarray) -> None:
    with replacing(path) as aside:
        Image.fromarray(array).save(aside, format="PNG")


def write_case(record: Any, axis: int | None, output: Path, part: str) -> None:
    """Writes the missing slices of one case. The image of a slice is written last, after its map."""
    for name, image, mask in planes_of(record, axis):
        path = inside(output, "images", part, f"{name}.png")
        if path.is_file():
            continue
        if mask is not None:
            classes = exact(mask, np.uint8, f"{record.id}: class map")
            write_grey(inside(output, "masks", "all", part, f"{name}.png"), classes)
        levels = np.rint((np.clip(image, -1, 1) + 1) * 127.5)
        write_grey(path, levels.astype(np.uint8))


def remove_stale(output: Path, cases: Mapping[str, Mapping[str, str]]) -> None:
    """Delete the slices of cases that were prepared again or left out since they were written.

    Only then does provenance.json name the new ones, so that a run that is stopped leaves no old slice.
    """
    path = output / "provenance.json"
    if not path.is_file():
        return
    known = read_checked(path, Provenance, "delete the folder")
    earlier = known.get("cases")
    if earlier is None:
        log.warning("%s: an older medldm did not record what the cases hold; slices are kept by name", output)
        return
    stale = {name for name, content in earlier.items() if cases.get(name) != content}
    if not stale:
        return
    log.warning(
        "%s: %d of %d cases changed since they were written; written again", output, len(stale), len(earlier)
    )
    for picture in output.glob("*/**/*.png"):
        if re.sub(r"_\d+$", "", picture.stem) in stale:
            picture.unlink()
    write_json(path, known | {"cases": dict(cases)})


def claim_folder(
    root: Path, output: Path, split: str, index: Mapping[str, Any], part_of: Mapping[str, str]
) -> None:
    """Write the folder's provenance.json. InputError where it holds slices of another dataset or split."""
    about = {"data_root": str(root.resolve()), "split": split, "subjects": digest(part_of)}
    contents = {case["id"]: array_digests(case) for case in index["cases"]}
    if all(contents.values()):
        remove_stale(output, contents)
        about["cases"] = contents
    else:  # prepared by an older medldm: the recipe is all that is known
        about["preprocess_hash"] = index.get("preprocess_hash")
    claim(output, about)


def export_slices(root: Path, output: Path, split: str) -> None:
    """The PNG slices of every case of a split."""
    index, splits = load_index(root), read_splits(root / "splits.json")
    if split not in splits:
        raise InputError(f"split={split}: {root / 'splits.json'} has {', '.join(splits)}")
    part_of = {subject: part for part in SUBSETS for subject in splits[split].get(part, ())}
    if (index["num_classes"] or 0) > MAX_CLASSES:
        raise InputError(f"{root}: {index['num_classes']} classes do not fit 8-bit pictures")
    axis = body_axis(index["orientation"]) if index["spatial_dims"] == 3 else None
    claim_folder(root, output, split, index, part_of)
    for case in tracked(index["cases"], "writing slices"):
        if (part := part_of.get(case["subject"])) is not None:
            for record in read_images(root / case["file"]):
                write_case(record, axis, output, part)
