"""NIH ChestX-ray14 (Wang et al., CVPR 2017): 112,120 frontal chest X-rays of 30,805 patients, as PNG of
1024 x 1024 pixels or as DICOM radiographs of the same names.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from medldm.data.case import Case
from medldm.data.raw.dicom import dicom_images
from medldm.data.raw.layouts import files_in, require_root
from medldm.data.raw.tables import read_rows
from medldm.errors import InputError

log = logging.getLogger(__name__)
SEVERAL = "Several Findings"
TASKS = (None, "findings")


def index(root: str | Path, task: str | None = None) -> list[Case]:
    """Lists cases of the published layout: images_001/images/*.png ... (or images/*.png) and
    Data_Entry_2017.csv.

    The subject is the patient, the first number of the file name, so that splits are by patient even without
    the table. From the table come `view` (AP or PA) and the finding as `label`; an image with several has the
    label "Several Findings" and all of them in `findings`. With `task` "findings" an image has all its
    findings as `labels`, and a `label` where it has a single one. Pictures that are listed but missing are
    left out. A DICOM radiograph, 00000001_000.dcm, stands for the picture of that name; InputError where both
    exist.
    """
    if task not in TASKS:
        raise InputError(f"data.task={task}: choose findings, or null for one label an image")
    root = require_root(root, "Data_Entry_2017.csv and images_001/")
    folders = [root / "images", *(root.glob("images_*/images"))]
    files = sorted(path for folder in folders for path in pictures_in(folder))
    if not files:
        raise InputError(
            f"{root}: holds no images_001/images/*.png and no images/*.png (or .dcm); unpack an archive"
        )
    check_twice(files)
    rows = read_findings(root)
    listed = [file for file in files if rows is None or file.stem in rows]
    if rows is not None:
        if len(files) > len(listed):
            log.warning("%s: %d pictures are not in the table and left out", root, len(files) - len(listed))
        if len(rows) > len(listed):
            log.info("%s: %d of %d listed pictures are here", root, len(listed), len(rows))
        if not listed:
            raise InputError(f"{root}: the table lists none of the pictures here; restore the published one")
    return [make_case(file, {} if rows is None else rows[file.stem], task) for file in listed]


def pictures_in(folder: Path) -> list[Path]:
    """The PNG pictures and DICOM radiographs right inside a folder."""
    found = dicom_images(folder) if folder.is_dir() else []
    return [*files_in(folder, (".png",)), *(path for path in found if path.is_file())]


def check_twice(files: Sequence[Path]) -> None:
    by_name: dict[str, Path] = {}
    for file in files:
        other = by_name.setdefault(file.stem, file)
        if other is not file and other.suffix != file.suffix:
            raise InputError(f"{file}: {other} is the same picture in another format; keep one of the two")


def make_case(file: Path, row: dict[str, str], task: str | None) -> Case:
    """The case of one picture and its row in the table."""
    subject, _, number = file.stem.partition("_")
    if not (subject.isdigit() and number):
        raise InputError(f"{file}: not named like 00000001_000.png; rename it, or use data=class_folders")
    patient = row.get("Patient ID")
    if patient and int(patient) != int(subject):
        raise InputError(f"{file}: the table states patient {patient} for it; restore the published table")
    findings = row.get("Finding Labels", "")
    several = "" if task else SEVERAL
    attributes = {
        "label": several if "|" in findings else findings,
        "labels": findings if task else "",
        "findings": findings,
        "view": row.get("View Position", ""),
    }
    return Case(file.stem, subject, {"image": str(file)}, {k: v for k, v in attributes.items() if v})


def read_findings(root: Path) -> dict[str, dict[str, str]] | None:
    """The rows of Data_Entry_2017*.csv by file name without suffix. None where there is no table."""
    path = next(iter(sorted(root.glob("Data_Entry_2017*.csv"))), None)
    if path is None:
        log.warning("%s: no Data_Entry_2017.csv; going on without findings and views", root)
        return None
    rows = [row.cells for row in read_rows(path, ["Image Index"])]
    if not {"Finding Labels", "Patient ID"} <= rows[0].keys():
        raise InputError(
            f"{path}: lacks the columns Image Index, Finding Labels, Patient ID; restore the published file"
        )
    return {Path(row["Image Index"]).stem: row for row in rows}
