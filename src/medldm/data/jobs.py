"""One file to write: the raw cases it holds, its fingerprint, and its entry in the index."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import medldm
from medldm.attributes import TABLES, UNKNOWN
from medldm.data.case import Case, split_path
from medldm.data.recipe import SCHEMA_VERSION, Recipe, digest
from medldm.errors import InputError

ORIGINAL = ("original_id", "original_subject")  # of an index entry whose names were no safe file names
PER_SLICE = ("view", "phase", "slice_index", "num_slices", "label")


@dataclass(frozen=True)
class Tables:
    """Names behind the numbers that files store."""

    views: list[str]
    phases: list[str]
    labels: list[str]


def known_order(values: set[str], usual: list[str]) -> list[str]:
    def by_number(text: str) -> tuple:
        return (0, float(text), "") if text.lstrip("-").replace(".", "", 1).isdigit() else (1, 0.0, text)

    return usual if values and values <= set(usual) else sorted(values, key=by_number)


def make_tables(cases: Sequence[Case], modalities: Sequence[str] | None = None) -> Tables:
    """`modalities` are the labels in the order that the dataset's config gives them."""

    def values(name: str) -> set[str]:
        return {str(case.attributes[name]) for case in cases if case.attributes.get(name, "") != ""}

    return Tables(
        known_order(values("view"), ["SA", "LA"]),
        known_order(values("phase"), ["ED", "ES"]),
        known_order(values("label"), list(modalities or [])),
    )


@dataclass(frozen=True)
class Job:
    """One file to write: all acquisitions of a subject in 2D, one volume in 3D."""

    id: str
    subject: str
    cases: tuple[Case, ...]
    path: Path
    dataset: str
    recipe: Recipe
    tables: Tables

    def raw_files(self) -> list[dict]:
        """Path, size and time of every raw file. InputError names one that is missing."""
        files = []
        for case in self.cases:
            for raw in case.paths.values():
                path = split_path(raw)[0]
                if path.is_dir():  # a DICOM series
                    states = [file.stat() for file in path.glob("*.dcm")]
                    size, newest = (
                        sum(s.st_size for s in states),
                        max((s.st_mtime_ns for s in states), default=0),
                    )
                    files.append({"path": str(path), "size": size, "mtime_ns": newest})
                    continue
                if not path.is_file():
                    raise InputError(f"{path}: no such file; restore it, or remove its case from the dataset")
                state = path.stat()
                files.append({"path": str(path), "size": state.st_size, "mtime_ns": state.st_mtime_ns})
        return files

    def fingerprint(self) -> str:
        """Changes when the preprocessing, a raw file or what is known of a case changes."""
        known: list = [(case.id, case.attributes) for case in self.cases]
        known += [case.relabel for case in self.cases if case.relabel]
        return digest([self.recipe.hash, self.raw_files(), known, asdict(self.tables), self.dataset])


def make_jobs(
    cases: Sequence[Case], root: Path, dataset: str, recipe: Recipe, modalities: Sequence[str] | None = None
) -> list[Job]:
    tables = make_tables(cases, modalities)
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        groups[(case.subject, case.subject) if recipe.spatial_dims == 2 else (case.id, case.subject)].append(
            case
        )
    return [
        Job(name, subject, tuple(members), root / "cases" / f"{name}.h5", dataset, recipe, tables)
        for (name, subject), members in sorted(groups.items())
    ]


def number(value: Any, names: Sequence[str]) -> int:
    """Place of a stated value among the names; UNKNOWN where nothing is stated."""
    return UNKNOWN if value is None or value == "" else names.index(str(value))


def numbers_of(case: Case, tables: Tables) -> dict[str, int]:
    """View, phase and label of a case as files store them."""
    names = (tables.views, tables.phases, tables.labels)
    return {kind: number(case.attributes.get(kind), known) for kind, known in zip(TABLES, names, strict=True)}


def check_numbers(path: Path, stored: Mapping[str, Any], stated: Mapping[str, Any]) -> None:
    """InputError where a file holds other views, phases or labels than its cases state: earlier versions
    wrote 0 for what nobody stated.
    """
    for kind in TABLES:
        if not np.array_equal(stored[kind], stated[kind]):
            raise InputError(
                f"{path}: stores another {kind} than its cases state; run `medldm prepare` again"
            )


def root_attributes(job: Job, fingerprint: str) -> dict:
    known = {key: str(value) for key, value in common_attributes(job.cases).items() if key not in PER_SLICE}
    return {
        **known,
        "schema_version": SCHEMA_VERSION,
        "subject_id": job.subject,
        "dataset": job.dataset,
        "label_names": json.dumps(job.recipe.labels.names),
        "preprocess_json": json.dumps(job.recipe.as_dict()),
        "preprocess_hash": job.recipe.hash,
        "fingerprint": fingerprint,
        "created_with": f"medldm {medldm.__version__}",
    }


def common_attributes(cases: Sequence[Case]) -> dict:
    """What all acquisitions of a subject agree on."""
    first = cases[0].attributes
    return {
        key: value for key, value in first.items() if all(case.attributes.get(key) == value for case in cases)
    }


def entry_of(job: Job, path: Path) -> dict:
    return {
        "id": job.id,
        "subject": job.subject,
        **{key: job.cases[0].original[key] for key in ORIGINAL if job.cases[0].original},
        "file": f"cases/{job.path.name}",
        "file_size": path.stat().st_size,
        "attributes": common_attributes(job.cases),
        "raw": job.raw_files(),
    }


def check_range(path: Path, image: np.ndarray, limit: float = 1) -> None:
    if not (np.isfinite(image).all() and np.abs(image).max() <= limit):
        raise InputError(f"{path}: image values leave [-1, 1]; delete it and run `medldm prepare` again")


def check_classes(path: Path, mask: np.ndarray, job: Job) -> int:
    """The largest class; InputError where it has no name."""
    largest, names = int(mask.max()), job.recipe.labels.names
    if names is not None and largest >= len(names):
        raise InputError(
            f"{path}: holds class {largest}, known are 0..{len(names) - 1}; map it in data.preprocess.labels"
        )
    return largest
