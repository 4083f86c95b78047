"""One file to write: the raw cases it holds, its fingerprint, and its entry in the index."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import medldm
from medldm.attributes import TABLES, UNKNOWN
from medldm.data.case import Case, split_path
from medldm.data.preparation.recipe import SCHEMA_VERSION, Recipe
from medldm.data.raw.pictures import is_turned
from medldm.data.raw.readers import files_of
from medldm.errors import InputError
from medldm.files import inside, safe_name
from medldm.fingerprints import array_digest, content_of, digest

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
        known_order(
            values("label") | {name for case in cases for name in findings(case)}, list(modalities or [])
        ),
    )


@dataclass(frozen=True)
class FileJob:
    """One file to write: all acquisitions of a subject in 2D, one volume in 3D; or the frames of its CINE."""

    id: str
    subject: str
    cases: tuple[Case, ...]
    path: Path
    dataset: str
    recipe: Recipe
    tables: Tables
    command: str  # that prepares the dataset: what to run again
    earlier: dict | None = None  # the index's entry of an earlier preparation

    @property
    def is_cine(self) -> bool:
        return self.cases[0].is_cine

    def raw_files(self) -> list[dict]:
        """Every raw file: its `key` in the case, the `dataset` inside it or None, path, size, times and
        sha256. InputError names one that is missing.
        """
        files = []
        for case in self.cases:
            for key, raw in case.paths.items():
                path, dataset = split_path(raw)
                if not path.exists():
                    raise InputError(f"{path}: no such file; restore it, or remove its case from the dataset")
                files.append({"key": key, "dataset": dataset, **content_of(path, files_of(raw))})
        return files

    def fingerprint(self) -> str:
        """Changes when the preprocessing, a raw file's name or content, or what is known of a case changes;
        not with the folder that the raw files lie in.
        """
        return self.fingerprint_with(self.turned_pictures())

    def fingerprint_with(self, turned: Sequence[str]) -> str:
        known: list = [(case.id, case.attributes) for case in self.cases]
        known += [case.relabel for case in self.cases if case.relabel]
        known += (
            [{"turned": list(turned)}] if turned else []
        )  # files made before they were turned are renewed
        return digest(
            [self.recipe.hash, identities(self.raw_files()), known, asdict(self.tables), self.dataset]
        )

    def turned_pictures(self) -> list[str]:
        """The names of raw pictures that are turned as their EXIF says."""
        paths = [split_path(raw)[0] for case in self.cases for raw in case.paths.values()]
        return sorted({path.name for path in paths if path.is_file() and is_turned(path)})

    def reason_to_renew(self) -> str:
        """Why the file that stands is not what this job makes of its raw files."""
        if self.earlier is None or not all("sha256" in file for file in self.earlier["raw"]):
            return "an older medldm or a run that was stopped did not record what they were made from"
        if self.earlier["preprocess_hash"] != self.recipe.hash:
            return "the preprocessing, or a library that does it, has changed"
        if identities(self.earlier["raw"]) != identities(self.raw_files()):
            return "raw files have changed"
        turned = self.turned_pictures()
        if turned and self.earlier.get("fingerprint") == self.fingerprint_with(()):
            return "an older medldm did not turn pictures as their EXIF says"
        if self.earlier.get("fingerprint") != self.fingerprint():
            return "what is known of them (labels, views, attributes) has changed"
        return "their files were damaged or replaced"


def identities(files: Sequence[dict]) -> list[list]:
    """What a raw file is, wherever it lies: key, file name, dataset inside it, and content."""
    return [[file["key"], Path(file["path"]).name, file["dataset"], file["sha256"]] for file in files]


def make_jobs(
    cases: Sequence[Case],
    root: Path,
    dataset: str,
    recipe: Recipe,
    modalities: Sequence[str] | None = None,
    *,
    command: str,
    earlier: Mapping[str, dict],
) -> list[FileJob]:
    """The files to write. `command` is the one that makes them; `earlier` are the index entries of an earlier
    preparation by id. Frames of a CINE get no edges: what reads edges does not read them.
    """
    tables = make_tables(cases, modalities)
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        groups[file_of(case, recipe.spatial_dims), case.subject].append(case)
    return [
        FileJob(
            name, subject, tuple(members), inside(root, "cases", f"{name}.h5"), dataset,
            replace(recipe, edges=None) if members[0].is_cine else recipe, tables, command, earlier.get(name),
        )
        for (name, subject), members in sorted(groups.items())
    ]  # fmt: skip


def file_of(case: Case, spatial_dims: int) -> str:
    """Name of the file that a case is stored in: in 3D one of its own, in 2D that of its subject, of the
    subject's visit, or of the subject's CINE.
    """
    if spatial_dims == 3:
        return case.id
    if case.is_cine:
        return safe_name(f"{case.subject}_cine")
    visit = case.attributes.get("visit")
    return case.subject if visit is None else safe_name(f"{case.subject}_{visit}")


def number_of(value: Any, names: Sequence[str]) -> int:
    """Place of a stated value among the names; UNKNOWN where nothing is stated."""
    return UNKNOWN if value is None or value == "" else names.index(str(value))


def findings(case: Case) -> list[str]:
    """The names in a case's `labels`, several of which may hold at once: "Effusion|Mass"."""
    return [name for part in str(case.attributes.get("labels", "")).split("|") if (name := part.strip())]


def finding_numbers(case: Case, tables: Tables) -> list[int]:
    return sorted({number_of(name, tables.labels) for name in findings(case)})


def has_findings(job: FileJob) -> bool:
    return any("labels" in case.attributes for case in job.cases)


def numbers_of(case: Case, tables: Tables) -> dict[str, int]:
    """View, phase and label of a case as files store them."""
    names = (tables.views, tables.phases, tables.labels)
    return {
        kind: number_of(case.attributes.get(kind), known) for kind, known in zip(TABLES, names, strict=True)
    }


def check_numbers(path: Path, stored: Mapping[str, Any], stated: Mapping[str, Any]) -> None:
    """InputError where a file holds other views, phases or labels than its cases state: earlier versions
    wrote 0 for what nobody stated.
    """
    for kind in TABLES:
        if not np.array_equal(stored[kind], stated[kind]):
            raise InputError(
                f"{path}: stores another {kind} than its cases state; run `medldm prepare` again"
            )


def root_attributes(job: FileJob, fingerprint: str) -> dict:
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


def original_names(job: FileJob) -> dict[str, str]:
    """`original_subject`, and of a volume `original_id`, where they were no safe file names."""
    names = job.cases[0].original
    return names if job.recipe.spatial_dims == 3 else {k: v for k, v in names.items() if k != "original_id"}


def shared_entry(job: FileJob, path: Path, arrays: Mapping[str, np.ndarray | None]) -> dict:
    """The part of an index entry that 2D and 3D share; `content` are the digests of what is stored."""
    image = arrays.get("image")
    return {
        "id": job.id,
        "subject": job.subject,
        **original_names(job),
        "file": f"cases/{job.path.name}",
        "file_size": path.stat().st_size,
        "attributes": common_attributes(job.cases),
        "raw": job.raw_files(),
        "preprocess_hash": job.recipe.hash,
        "fingerprint": job.fingerprint(),
        "content": {key: array_digest(array) for key, array in arrays.items() if array is not None},
        **({} if image is None or image.min() < image.max() else {"is_constant": True}),
    }


def check_stored_range(path: Path, image: np.ndarray, limit: float = 1) -> None:
    if not (np.isfinite(image).all() and np.abs(image).max() <= limit):
        raise InputError(f"{path}: image values leave [-1, 1]; delete it and run `medldm prepare` again")


def check_classes(path: Path, mask: np.ndarray, job: FileJob) -> int:
    """The largest class; InputError where it has no name."""
    largest, names = int(mask.max()), job.recipe.labels.names
    if names is not None and largest >= len(names):
        raise InputError(
            f"{path}: holds class {largest}, known are 0..{len(names) - 1}; map it in data.preprocess.labels"
        )
    return largest
