"""Anyone's own images: `images/` and `masks/` with equal file names, or a `manifest.csv`. `masks/` alone, or
a manifest without the column image, are class maps to sample from.
"""

import csv
from collections import Counter
from pathlib import Path

from medldm.data.case import Case, split_path, stem_of
from medldm.data.readers import HDF5_SUFFIXES, NIFTI_SUFFIXES, NUMPY_SUFFIXES, RASTER_SUFFIXES, has_suffix
from medldm.errors import InputError

FILES = ("image", "mask", "foreground", "body")
KNOWN = (*FILES, "subject", "label", "split")
RAW_SUFFIXES = NIFTI_SUFFIXES + RASTER_SUFFIXES + HDF5_SUFFIXES + NUMPY_SUFFIXES


def index(root: str | Path) -> list[Case]:
    """Cases of a folder. Columns of the manifest beyond the known ones become attributes (view and phase have
    a meaning). Several images of a subject that differ by `label` make pairs; `foreground` names the volume
    whose content decides the crop of all of them.

    Paths in the manifest are relative to the root. Without a subject each file is one. InputError names a
    missing file, an image without its mask, and two images that would get the same name.
    """
    root = Path(root)
    if not root.is_dir():
        raise InputError(
            f"data.raw={root}: no such folder; give the folder that holds images/ or manifest.csv"
        )
    manifest = root / "manifest.csv"
    cases = manifest_cases(manifest) if manifest.is_file() else folder_cases(root)
    if not cases:
        raise InputError(
            f"{root}: holds no images; put NIfTI, PNG or JPEG files into images/, or list them in "
            "manifest.csv"
        )
    for key in ("image", "mask"):
        bare = next((case for case in cases if key not in case.paths), None)
        if bare is not None and any(key in case.paths for case in cases):
            raise InputError(
                f"{bare.main_path}: has no {key} while others have; add it, or remove all {key}s"
            )
    names = Counter(case.id for case in cases)
    name, count = names.most_common(1)[0]
    if count > 1:
        raise InputError(f"{root}: {count} images share the name '{name}'; rename them")
    return cases


def case_id(path: str) -> str:
    """A file name without its folder `images/` or `masks/` and suffix; deeper folders are kept with
    underscores.
    """
    parts = Path(path).parts
    parts = parts[1:] if Path(path).is_absolute() else parts
    parts = parts[1:] if parts[0] in ("images", "masks") and len(parts) > 1 else parts
    return "_".join((*parts[:-1], stem_of(parts[-1])))


def manifest_cases(path: Path) -> list[Case]:
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = [
            {(k or "").strip(): (v or "").strip() for k, v in row.items() if isinstance(k, str)}
            for row in csv.DictReader(file)
        ]
    if not rows or not {"image", "mask"} & rows[0].keys():
        raise InputError(f"{path}: needs a header line with the column 'image' and at least one row")
    cases = []
    for number, row in enumerate(rows, 2):
        paths = {key: str(path.parent / row[key]) for key in FILES if row.get(key)}
        if "image" not in paths and ("image" in row or "mask" not in paths):
            raise InputError(f"{path}: line {number} names no image; fill it in or delete the line")
        for file_path in paths.values():
            if not split_path(file_path)[0].is_file():
                raise InputError(
                    f"{file_path}: missing, though {path.name} line {number} names it; restore it or its line"
                )
        identity = case_id(row.get("image") or row["mask"])
        extra = {
            key: value
            for key, value in row.items()
            if value and (key not in KNOWN or key in ("label", "split"))
        }
        cases.append(Case(identity, row.get("subject") or identity, paths, extra))
    return cases


def folder_cases(root: Path) -> list[Case]:
    folder = root / "images"
    masks = named_files(root / "masks")
    if not folder.is_dir() and not masks:
        raise InputError(f"{root}: has neither images/ nor manifest.csv; make one of them")
    if not folder.is_dir():
        return [Case(identity, identity, {"mask": str(path)}) for identity, path in masks]
    with_masks, masks = bool(masks), dict(masks)
    cases = []
    for identity, image in named_files(folder):
        paths = {"image": str(image)}
        if with_masks:
            if identity not in masks:
                raise InputError(
                    f"{image}: has no mask of that name in {root / 'masks'}; add it, or remove the image"
                )
            paths["mask"] = str(masks.pop(identity))
        cases.append(Case(identity, identity, paths))
    if masks:
        raise InputError(
            f"{next(iter(masks.values()))}: no image of that name in {folder}; add it, or remove the mask"
        )
    return cases


def named_files(folder: Path) -> list[tuple[str, Path]]:
    """(case, file) of every image file below a folder; nothing where it is not there."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and has_suffix(p, RAW_SUFFIXES))
    return [(case_id(str(path.relative_to(folder))), path) for path in files]
