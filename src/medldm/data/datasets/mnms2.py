"""M&Ms-2 (Martin-Isla et al., IEEE JBHI 2023): 360 subjects, short and long axis, end-diastole and
end-systole.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from medldm.data.case import Case
from medldm.data.hdf5 import open_hdf5
from medldm.data.raw.image import require_file
from medldm.data.raw.layouts import require_root
from medldm.data.raw.nifti import nifti_shape
from medldm.data.raw.tables import Note, read_rows
from medldm.data.splits import SUBSETS, Split
from medldm.errors import InputError
from medldm.schemas import SubjectFiles, read_checked

log = logging.getLogger(__name__)
# In the order in which ldm-medical-image stores the slices of each.
ACQUISITIONS = [(view, phase) for view in ("LA", "SA") for phase in ("ED", "ES")]
SUBJECTS = [f"{i:03d}" for i in range(1, 361)]
MAPPING_INDEX = "dataset_index_mapping.json"  # lies beside the files that ldm-medical-image prepared
INFORMATION_COLUMNS = {"DISEASE": "disease", "VENDOR": "vendor", "SCANNER": "scanner", "FIELD": "field_T"}


def index(root: str | Path, cine: int | None = None, *, note: Note = log.info) -> list[Case]:
    """Lists cases of the published layout `[dataset/]NNN/NNN_{LA,SA}_{ED,ES}[_gt].nii.gz`, four a subject;
    then every `cine`-th frame of `NNN_{LA,SA}_CINE.nii.gz`, which has no map (None: no frames).

    `dataset_information.csv` may be missing, and so may the CINE of a subject, which is noted. InputError
    names the first of the other files that is missing.
    """
    root = require_root(root, "M&Ms-2's dataset/001, dataset/002...")
    folder = root / "dataset" if (root / "dataset").is_dir() else root
    subjects = sorted(p for p in folder.iterdir() if p.is_dir() and p.name.isdigit())
    if not subjects:
        raise InputError(
            f"{folder}: holds no subject folders 001, 002...; data.raw must be the M&Ms-2 folder"
        )
    information = read_information(root)
    cases = [
        subject_case(subject, view, phase, information.get(int(subject.name), {}))
        for subject in subjects
        for view, phase in ACQUISITIONS
    ]
    return cases if cine is None else cases + all_frames(subjects, information, cine, note)


def all_frames(subjects: list[Path], information: dict[int, dict], every: int, note: Note) -> list[Case]:
    """Every `every`-th frame of the CINE files, from the first on. InputError where there are none."""
    files = {
        (folder, view): path
        for folder in subjects
        for view in ("LA", "SA")
        if (path := folder / f"{folder.name}_{view}_CINE.nii.gz").is_file()
    }
    if not files:
        raise InputError(
            f"{subjects[0].parent}: holds no NNN_SA_CINE.nii.gz; restore them, or set data.cine=false"
        )
    frames = [
        frame
        for (folder, view), path in files.items()
        for frame in cine_frames(folder, view, path, information.get(int(folder.name), {}), every)
    ]
    count = len({frame.subject for frame in frames})
    note(
        f"CINE: {len(frames)} frames of {count} subjects, without maps; autoencoders train on those of their "
        "training subjects, nothing else reads them"
    )
    if lacking := 2 * len(subjects) - len(files):
        note(f"CINE: {lacking} of {2 * len(subjects)} files (one a subject and view) are not there")
    return frames


def cine_frames(folder: Path, view: str, path: Path, information: dict, every: int) -> list[Case]:
    """A case for every `every`-th frame of one CINE file."""
    shape = nifti_shape(path)
    if len(shape) != 4:
        raise InputError(
            f"{path}: has shape {shape}, but a CINE has four axes, of which the last counts frames; "
            "restore it, or set data.cine=false"
        )
    return [
        Case(
            f"{folder.name}_{view}_CINE_{frame:03d}",
            folder.name,
            {"image": f"{path}::{frame}"},
            {"view": view, **information},
            is_cine=True,
        )
        for frame in range(0, shape[3], every)
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
    rows = [row.cells for row in read_rows(path, ["SUBJECT_CODE"], known=INFORMATION_COLUMNS)]
    return {
        int(row["SUBJECT_CODE"]): {
            name: row[column] for column, name in INFORMATION_COLUMNS.items() if row.get(column)
        }
        for row in rows
        if row["SUBJECT_CODE"].isdigit()
    }


# ---- files that ldm-medical-image (tonyyunyang, GitHub) prepared ----


def mapped_slices(num_samples: int) -> dict[str, list[int]]:
    """The view, phase and slice number of each sample of a file. Files do not state them, but have a fixed
    order: LA ED, LA ES, all slices of SA ED, all slices of SA ES.
    """
    per_phase = (num_samples - 2) // 2
    view = [1, 1] + [0] * (2 * per_phase)
    phase = [0, 1] + [0] * per_phase + [1] * per_phase
    slice_index = [0, 0] + 2 * list(range(per_phase))
    num_slices = [1, 1] + [per_phase] * (2 * per_phase)
    return {"view": view, "phase": phase, "slice_index": slice_index, "num_slices": num_slices}


def load_mapping_index(root: Path) -> dict:
    """Makes an index of `{NNN}_data.h5` files from the `dataset_index_mapping.json` of ldm-medical-image."""
    mend = "restore it beside the `NNN_data.h5` files"
    mapping = read_checked(root / MAPPING_INDEX, SubjectFiles, mend)
    cases = []
    for subject, entry in sorted(mapping.items()):
        path = require_file(root / (entry.get("file_name") or f"{subject}_data.h5"))
        num_samples = int(entry["num_samples"])
        if num_samples < 4 or num_samples % 2:
            raise InputError(f"{path}: {num_samples} samples are no LA ED, LA ES, SA ED..., SA ES... series")
        cases.append(
            {
                "id": subject,
                "subject": subject,
                "file": path.name,
                "num_slices": num_samples,
                "slices": mapped_slices(num_samples),
                "attributes": {},
            }
        )
    if not cases:
        raise InputError(f"{root / MAPPING_INDEX}: lists no subjects; prepare the data again")
    image_size = list(open_hdf5(root / cases[0]["file"]).dataset("image").shape[1:])
    return {
        "schema_version": 1,
        "dataset": "mnms2",
        "spatial_dims": 2,
        "image_channels": 1,
        "num_classes": 4,
        "label_names": ["background", "LV cavity", "LV myocardium", "RV"],
        "num_views": 2,
        "view_names": ["SA", "LA"],
        "num_phases": 2,
        "phase_names": ["ED", "ES"],
        "num_labels": 0,
        "label_values": [],
        "image_size": image_size,
        "has_edges": True,
        "cases": cases,
    }


# ---- published splits ----


def published_splits(subjects: Sequence[str]) -> dict[str, Split]:
    """The published splits by name, that of ldm-medical-image first. {} where one of the 360 subjects is
    missing.
    """
    if sorted(set(subjects)) != SUBJECTS:
        return {}
    return {"seed42_350_10": seed42_350_10(), "official_160_40_160": official_160_40_160()}


def seed42_350_10(num_val: int = 20) -> Split:
    """The split that ldm-medical-image drew with the seed 42: 350 subjects to train on and ten held out.

    Its authors used the ten for validation and for testing. Here they are the test set, and `num_val` of the
    350 become the validation set.
    """
    order = np.random.RandomState(42).permutation(360)  # NumPy's legacy generator, as published
    test, rest = order[:10], order[10:]
    names = {"test": test, "val": rest[:num_val], "train": rest[num_val:]}
    return {
        key: [SUBJECTS[i] for i in (names[key] if key == "test" else sorted(names[key]))] for key in SUBSETS
    }


def official_160_40_160() -> Split:
    """The split of the M&Ms-2 challenge: of subjects in order, 160 to train, 40 to validate, 160 to test."""
    return {"train": SUBJECTS[:160], "val": SUBJECTS[160:200], "test": SUBJECTS[200:]}
