"""A user's own images: `images/` and `masks/` with equal file names, or a `manifest.csv`. Where there are
`masks/` alone, or a manifest without the column image, cases are class maps from which images can be sampled.
"""

import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from medldm.data.case import Case, split_path
from medldm.data.raw.layouts import (
    check_modality_choice,
    image_name,
    images_below,
    modality_cases,
    require_root,
)
from medldm.data.raw.readers import is_image
from medldm.data.raw.tables import Note, Row, read_rows
from medldm.errors import InputError

log = logging.getLogger(__name__)
FILES = ("image", "mask", "foreground", "body")
STATED = ("label", "split", "view", "phase", "visit", "photometric")  # attributes that other modules read
KNOWN_COLUMNS = (*FILES, "subject", *STATED)
# Columns that are refused: they would have no effect, or medldm writes an entry of that name itself.
REFUSED = {
    "edges": "edges are made from the image (data.preprocess.edges)",
    "text": "no model here reads text",
    "spacing": "millimetres come from the file's header",
    "affine": "the affine comes from the file's header",
    "latent": "latents come from `medldm encode`",
} | dict.fromkeys(
    ("slice_index", "num_slices", "source", "source_label", "target_label", "row", "dataset", "fingerprint",
     "label_names", "preprocess_hash", "preprocess_json", "schema_version", "created_with", "intensity_range",
     "original_affine", "original_shape", "box_start", "box_end", "rescaled", "dropped", "spatial_dims",
     "made_from", "coloured"),
    "medldm writes it itself",
)  # fmt: skip
# Other names of the known columns; one is refused where the column that it probably means is missing.
MEANT = {
    "image": ("images", "img", "image_path", "image_file", "filename", "file_name", "filepath", "path",
              "file"),
    "mask": ("masks", "mask_path", "mask_file", "seg", "segmentation", "label_map", "labelmap"),
    "subject": ("subjects", "subject_id", "subjectid", "patient", "patients", "patient_id", "patientid",
                "participant_id", "person", "id"),
    "label": ("labels", "class", "classes", "class_name"),
    "split": ("splits", "subset", "partition"),
}  # fmt: skip
BIDS = re.compile(r"sub-[A-Za-z0-9]+")


def index(root: str | Path, modalities: Sequence[str] | None = None, *, note: Note = log.info) -> list[Case]:
    """Lists the cases of a folder. Further columns of the manifest become attributes, of which medldm itself
    reads view, phase and visit. Images of a subject that differ by `label` make pairs; all are cropped to the
    content of the volume that `foreground` names.

    `modalities` are the labels to take, in this order. Without a manifest they are read from the file names:
    `images/<subject>/<modality>.nii.gz`, `images/<subject>_<modality>.nii.gz`, or nnU-Net's `_0000`, `_0001`
    in the order of `modalities`.

    Paths in the manifest are relative to the root. A file without a subject is a subject of its own.
    InputError names a missing file, an image without its mask, and two images that would get the same name.
    """
    root = require_root(root, "images/ or manifest.csv")
    manifest = root / "manifest.csv"
    if manifest.is_file():
        cases = of_modalities(manifest_cases(manifest, note), modalities, manifest)
    elif modalities is not None:
        cases = modality_folders(root, modalities)
    else:
        cases = image_folder_cases(root, note)
    if not cases:
        raise InputError(
            f"{root}: holds no images; put NIfTI, NRRD, MetaImage, PNG or JPEG files or folders of DICOM "
            "into images/, or list them in manifest.csv"
        )
    check_complete(cases)
    check_names(cases)
    return cases


def check_complete(cases: Sequence[Case]) -> None:
    for key in ("image", "mask"):
        bare = next((case for case in cases if key not in case.paths), None)
        if bare is not None and any(key in case.paths for case in cases):
            raise InputError(
                f"{bare.main_path}: has no {key} while others have; add it, or remove all {key}s"
            )


def check_names(cases: Sequence[Case]) -> None:
    name, count = Counter(case.id for case in cases).most_common(1)[0]
    if count > 1:
        first, second, *_ = (case.main_path for case in cases if case.id == name)
        raise InputError(
            f"{first}: is listed {count} times; keep one line for it"
            if first == second
            else f"{second}: would share the name '{name}' with {first}; rename one of them"
        )


def case_id(path: str, folder: Path) -> str:
    """The name of a case: its path below `images/` or `masks/` without the suffix, with underscores between
    folders.
    """
    parts = [part for part in Path(path).parts if part != ".."]
    parts = parts[1:] if Path(path).is_absolute() else parts
    parts = parts[1:] if parts[0] in ("images", "masks") and len(parts) > 1 else parts
    return "_".join((*parts[:-1], image_name(folder / path)))


# ---- manifest.csv ----


def manifest_cases(path: Path, note: Note) -> list[Case]:
    rows = read_rows(path, ["image", "mask"], known=KNOWN_COLUMNS, note=note)
    columns = list(rows[0].cells)
    check_columns(path, columns)
    others = [name for name in columns if name not in KNOWN_COLUMNS]
    if others:
        note(f"{path.name}: kept as attributes that nothing reads by itself: {', '.join(others)}")
    without = {"subject": "and count as a subject each"} | dict.fromkeys(STATED, "which stays unknown")
    for name, meaning in without.items():
        missing = sum(not row.cells[name] for row in rows) if name in columns else 0
        if missing and name != "split":
            note(f"{path.name}: {missing} of {len(rows)} rows state no {name}, {meaning}")
    return [manifest_case(path, row) for row in rows]


def check_columns(path: Path, columns: Sequence[str]) -> None:
    """InputError for a column that would become an attribute although its name suggests an effect."""
    for name in columns:
        if name.lower() in REFUSED:
            raise InputError(
                f"{path}: the column '{name}' has no effect: {REFUSED[name.lower()]}; remove or rename it"
            )
        meant = next((key for key, names in MEANT.items() if name.lower() in names), None)
        if meant is not None and meant not in columns:
            raise InputError(
                f"{path}: the column '{name}' is not known, and '{meant}' is not there; rename it to "
                f"{meant}, or to something else where it is a mere attribute"
            )


def manifest_case(path: Path, row: Row) -> Case:
    cells = row.cells
    paths = {key: find_file(path, cells[key], row.line) for key in FILES if cells.get(key)}
    if "image" not in paths and ("image" in cells or "mask" not in paths):
        raise InputError(f"{path}: line {row.line} names no image; fill it in or delete the line")
    identity = case_id((cells.get("image") or cells["mask"]).replace("\\", "/"), path.parent)
    known = {key: value for key, value in cells.items() if value and key not in (*FILES, "subject")}
    return Case(identity, cells.get("subject") or identity, paths, known)


def find_file(manifest: Path, text: str, line: int) -> str:
    """The file, DICOM folder or `file::dataset` that a cell names. Backslashes are read as slashes, and names
    are found also where the disk composes their letters in another Unicode form.
    """
    spellings = [text, text.replace("\\", "/")]
    spellings += [unicodedata.normalize(form, spellings[1]) for form in ("NFC", "NFD")]
    for spelling in spellings:
        file, key = split_path(manifest.parent / spelling)
        if is_image(file) or (key and file.is_file()):
            return str(manifest.parent / spelling)
    file = split_path(manifest.parent / text)[0]
    if file.exists():
        raise InputError(
            f"{file}: {manifest.name} line {line} names it, but it is no image that can be read; use NIfTI, "
            "NRRD, MetaImage, a folder of DICOM, PNG, JPEG, NumPy or HDF5"
        )
    raise InputError(f"{file}: missing, though {manifest.name} line {line} names it; restore it or its line")


def of_modalities(cases: list[Case], modalities: Sequence[str] | None, manifest: Path) -> list[Case]:
    """The cases of these labels. InputError for a label that the manifest does not have."""
    if modalities is None:
        return cases
    known = sorted({str(case.attributes["label"]) for case in cases if "label" in case.attributes})
    if not known:
        raise InputError(f"{manifest}: data.modalities are its column label, which it has not; add it")
    check_modality_choice(modalities, known)
    return [case for case in cases if case.attributes.get("label") in modalities]


# ---- images/ and masks/ ----


def image_folder_cases(root: Path, note: Note) -> list[Case]:
    """The cases of `images/` and `masks/`."""
    folder, masks = root / "images", named_images(root / "masks")
    if not folder.is_dir() and not masks:
        raise InputError(f"{root}: has neither images/ nor manifest.csv; make one of them")
    if not folder.is_dir():
        return [Case(name, subject_of(name), {"mask": str(path)}) for name, path in masks]
    with_masks, masks = bool(masks), dict(masks)
    cases = []
    for name, image in named_images(folder):
        paths = {"image": str(image)}
        if with_masks:
            if name not in masks:
                raise InputError(
                    f"{image}: has no mask of that name in {root / 'masks'}; add it, or remove the image"
                )
            paths["mask"] = str(masks.pop(name))
        cases.append(Case(name, subject_of(name), paths))
    if masks:
        raise InputError(
            f"{next(iter(masks.values()))}: no image of that name in {folder}; add it, or remove the mask"
        )
    say_who_is_a_subject([case.id for case in cases if case.subject == case.id], note)
    return cases


def subject_of(name: str) -> str:
    """The subject that a name in the style of BIDS states (sub-01 of sub-01_ses-02_T1w), else the name
    itself.
    """
    match = BIDS.search(name)
    return match[0] if match else name


def say_who_is_a_subject(names: Sequence[str], note: Note) -> None:
    """Notes where images that each count as a subject are named in groups, as slices or visits of one are."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[re.sub(r"[-_][^-_]+$", "", name)].append(name)
    if 1 < len(groups) < len(names):
        pair = next(members for members in groups.values() if len(members) > 1)[:2]
        note(
            f"each image counts as a subject of its own, {pair[0]} and {pair[1]} too; where several show "
            "one person, name it in the column subject of manifest.csv, else it may be trained and tested on"
        )


def modality_folders(root: Path, modalities: Sequence[str]) -> list[Case]:
    """The images of each subject by the modality that their names state. Other images are left out."""
    check_modality_choice(modalities, modalities)
    found: dict[str, dict[str, Path]] = defaultdict(dict)
    for path in images_below(root / "images"):
        subject, modality = split_modality(path.relative_to(root / "images"), image_name(path), modalities)
        if modality is None:
            continue
        if modality in found[subject]:
            raise InputError(
                f"{path}: is {modality} of {subject} like {found[subject][modality]}; remove one of them"
            )
        found[subject][modality] = path
    if not any(found.values()):
        raise InputError(
            f"{root / 'images'}: no image is named by one of data.modalities={list(modalities)}; name them "
            "<subject>/<modality>.nii.gz or <subject>_<modality>.nii.gz, or list them in manifest.csv"
        )
    masks = dict(named_images(root / "masks"))
    cases = []
    for subject, images in sorted(found.items()):
        ordered = {name: images[name] for name in modalities if name in images}
        visit = BIDS.search(subject)
        attributes = {"visit": subject} if visit and visit[0] != subject else {}
        cases += modality_cases(
            subject_of(subject), ordered, {"mask": masks.get(subject)}, name=subject, **attributes
        )
    return [replace_mask(case, masks) for case in cases]


def replace_mask(case: Case, masks: dict[str, Path]) -> Case:
    """The case with the mask of its own name where there is one, else with that of its subject."""
    own = masks.get(case.id)
    return Case(case.id, case.subject, {**case.paths, "mask": str(own)}, case.attributes) if own else case


def split_modality(path: Path, stem: str, modalities: Sequence[str]) -> tuple[str, str | None]:
    """(subject, modality) of an image below images/; None where its name states no modality."""
    above = "_".join(path.parts[:-1])
    by_name = {name.lower(): name for name in modalities}
    if stem.lower() in by_name and above:
        return above, by_name[stem.lower()]
    numbered = {f"{i:04d}": name for i, name in enumerate(modalities)}
    for ending, modality in (by_name | numbered).items():
        if stem.lower().endswith((f"_{ending}", f"-{ending}")):
            name = stem[: -len(ending) - 1]
            return "_".join((above, name)).removeprefix("_") if path.parent.name != name else above, modality
    return stem, None


def named_images(folder: Path) -> list[tuple[str, Path]]:
    """(case, file) of every image below a folder; nothing where there is no such folder."""
    files = images_below(folder, with_maps=folder.name == "masks")
    return [(case_id(str(path.relative_to(folder)), folder), path) for path in files]
