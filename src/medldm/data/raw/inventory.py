"""Tells what a raw folder held, what of it was prepared, and what was left out and why."""

import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from medldm.data.case import Case, split_path
from medldm.data.raw.dicom import is_dicom_file
from medldm.data.raw.image import IMAGE_SUFFIXES, has_suffix
from medldm.data.raw.layouts import looks_like_map
from medldm.data.raw.readers import files_of
from medldm.data.splits import describe_split
from medldm.files import is_hidden, walk

NUM_NAMES_KEPT = 200  # of one reason; its count is of all names
NUM_NAMES_SHOWN = 3  # of those that are kept


def take_inventory(
    root: Path,
    found: Sequence[Case],
    used: Sequence[Case],
    *,
    notes: Sequence[str] = (),
    modalities: Sequence[str] = (),
) -> dict:
    """The inventory as index.json holds it: counts of files, cases and subjects, `left_out` (reason, count,
    names), and the `notes` of the dataset. `found` are the cases of the folder, `used` those that are
    prepared, `modalities` what each subject should have. CINE frames count as used files, but not as cases.
    """
    labelled = [case for case in used if not case.is_cine]
    files = list(every_file(root))
    of_used, of_found = raw_files(used), raw_files(found)
    reasons: dict[str, list[str]] = defaultdict(list)
    for path, is_hidden_file in files:
        if os.path.abspath(path) not in of_used:
            why = reason_of(path, is_hidden_file, of_used, of_found)
            reasons[why].append(str(path.relative_to(root)))
    for why, names in lacking(labelled, modalities).items():
        reasons[why] = names
    return {
        "raw": str(root),
        "files_found": len(files),
        "files_used": sum(os.path.abspath(path) in of_used for path, _ in files),
        "files_used_elsewhere": len(of_used - {os.path.abspath(path) for path, _ in files}),
        "cases": len(labelled),
        "subjects": len({case.subject for case in labelled}),
        "left_out": [
            {"why": why, "count": len(names), "names": names[:NUM_NAMES_KEPT]}
            for why, names in reasons.items()
        ],
        "notes": list(notes),
    }


def every_file(root: Path) -> Iterable[tuple[Path, bool]]:
    """Every file below a folder, broken links too, with whether it or a folder above it is hidden."""
    for folder, names in walk(root, with_hidden=True):
        hidden_folder = any(map(is_hidden, folder.relative_to(root).parts))
        for name in names:
            yield folder / name, hidden_folder or is_hidden(name)


def raw_files(cases: Iterable[Case]) -> set[str]:
    """Absolute paths of every file that cases read."""
    raw = {path for case in cases for path in case.paths.values()}
    single = {split_path(path)[0] for path in raw}
    return {
        os.path.abspath(file) for path in single for file in (files_of(path) if path.exists() else [path])
    }


def reason_of(path: Path, hidden: bool, of_used: set[str], of_found: set[str]) -> str:
    """Why no prepared case reads a file."""
    if hidden:
        return "hidden files, left out"
    if not path.exists():
        return "links that lead nowhere, left out"
    if os.path.abspath(path) in of_found:
        return "images left out by data.select"
    if not (has_suffix(path, IMAGE_SUFFIXES) or is_dicom_file(path)):
        return "files that are no images, tables among them"
    if os.path.realpath(path) in of_used:
        return "links to images that are used already, left out"
    return (
        "maps that no image uses, left out"
        if looks_like_map(path)
        else "images that are none of the dataset's, left out"
    )


def lacking(cases: Sequence[Case], modalities: Sequence[str]) -> dict[str, list[str]]:
    """Lists subjects that lack one of several modalities, and those that lack a map where others have one."""
    reasons = {}
    labels: dict[str, set[str]] = defaultdict(set)
    for case in cases:
        labels[case.subject].add(str(case.attributes.get("label", "")))
    for label in modalities if len(modalities) > 1 else ():
        names = [subject for subject, own in labels.items() if label not in own]
        if names:
            reasons[f"subjects without {label}"] = names
    bare = [case.subject for case in cases if not case.has_mask]
    if bare and len(bare) < len(cases):
        reasons["subjects without a class map, though others have one"] = list(dict.fromkeys(bare))
    return reasons


def same_images(entries: Sequence[dict]) -> list[str]:
    """A note on different subjects with one and the same image, raw or prepared: one must be a copy."""
    owners: dict[str, dict[str, None]] = defaultdict(dict)
    for entry in entries:
        raw = (file.get("sha256") for file in entry["raw"] if file.get("key") == "image")
        for digest in {(entry.get("content") or {}).get("image"), *raw} - {None}:
            owners[digest][entry["subject"]] = None
    copies = [list(subjects) for subjects in owners.values() if len(subjects) > 1]
    if not copies:
        return []
    return [
        f"{len(set().union(*copies))} subjects share an image with another, such as {copies[0][0]} and "
        f"{copies[0][1]}: copies may be trained and tested on; remove them, or give both one subject"
    ]


def coloured_pictures(entries: Sequence[dict]) -> list[str]:
    """A note on coloured pictures that were made grey: their marks and colour maps became grey values."""
    names = [name for entry in entries for name in entry.get("coloured", ())]
    if not names:
        return []
    return [
        f"{len(names)} pictures hold colours, such as {names[0]}; they were made grey by their luminance "
        "(ITU-R BT.601)"
    ]


def constant_images(entries: Sequence[dict]) -> list[str]:
    """A note on images whose voxels all have one value, as those of a failed export do."""
    names = [entry["id"] for entry in entries if entry.get("is_constant")]
    if not names:
        return []
    return [
        f"{len(names)} of {len(entries)} cases have one value throughout, such as {names[0]}; look "
        "at the raw file and at data.preprocess.intensity, or take the case away"
    ]


def summary(inventory: dict[str, Any], splits: dict[str, Any]) -> list[str]:
    """The lines that `medldm prepare` ends with."""
    elsewhere = inventory["files_used_elsewhere"]
    lines = [
        f"Used {inventory['files_used']} of {inventory['files_found']} files below {inventory['raw']}"
        + (f" and {elsewhere} elsewhere" if elsewhere else "")
        + f": {inventory['cases']} cases of {inventory['subjects']} subjects."
    ]
    for part in inventory["left_out"]:
        shown = ", ".join(part["names"][:NUM_NAMES_SHOWN]) + (
            ", ..." if part["count"] > NUM_NAMES_SHOWN else ""
        )
        lines.append(f"{part['why'].capitalize()}: {part['count']} ({shown})")
    lines += [f"Note: {note}" for note in inventory["notes"]]
    return [*lines, describe_split(splits.get("default", {}))]
