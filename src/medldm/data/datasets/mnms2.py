"""M&Ms-2 (Martin-Isla et al., IEEE JBHI 2023): 360 subjects, short and long axis, end-diastole and
end-systole.
"""

import logging
from pathlib import Path

from medldm.data.case import Case
from medldm.data.layouts import require_root
from medldm.data.tables import read_rows
from medldm.errors import InputError

log = logging.getLogger(__name__)
# The author's sample order; CINE series carry no labels and are left out.
ACQUISITIONS = [(view, phase) for view in ("LA", "SA") for phase in ("ED", "ES")]
COLUMNS = {"DISEASE": "disease", "VENDOR": "vendor", "SCANNER": "scanner", "FIELD": "field_T"}


def index(root: str | Path) -> list[Case]:
    """Cases of the published layout `[dataset/]NNN/NNN_{LA,SA}_{ED,ES}[_gt].nii.gz`, four a subject.

    `dataset_information.csv` may be absent. InputError names the first missing file.
    """
    root = require_root(root, "M&Ms-2's dataset/001, dataset/002...")
    folder = root / "dataset" if (root / "dataset").is_dir() else root
    subjects = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit())
    if not subjects:
        raise InputError(
            f"{folder}: holds no subject folders 001, 002...; data.raw must be the M&Ms-2 folder"
        )
    information = read_information(root)
    return [
        subject_case(subject, view, phase, information.get(int(subject.name), {}))
        for subject in subjects
        for view, phase in ACQUISITIONS
    ]


def subject_case(folder: Path, view: str, phase: str, information: dict) -> Case:
    name = f"{folder.name}_{view}_{phase}"
    paths = {"image": folder / f"{name}.nii.gz", "mask": folder / f"{name}_gt.nii.gz"}
    for path in paths.values():
        if not path.is_file():
            raise InputError(f"{path}: missing; restore it, or remove the folder {folder}")
    attributes = {"view": view, "phase": phase, **information}
    return Case(name, folder.name, {key: str(path) for key, path in paths.items()}, attributes)


def read_information(root: Path) -> dict[int, dict]:
    """Disease, vendor, scanner and field strength by subject number."""
    path = next(
        (
            p / "dataset_information.csv"
            for p in (root, root.parent, root / "dataset")
            if (p / "dataset_information.csv").is_file()
        ),
        None,
    )
    if path is None:
        log.warning("%s: no dataset_information.csv; going on without disease, vendor and scanner", root)
        return {}
    rows = [row.cells for row in read_rows(path, ["SUBJECT_CODE"], known=COLUMNS)]
    return {
        int(row["SUBJECT_CODE"]): {name: row[column] for column, name in COLUMNS.items() if row.get(column)}
        for row in rows
        if row["SUBJECT_CODE"].isdigit()
    }
