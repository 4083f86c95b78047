"""Raw cases -> one HDF5 file a subject (2D) or a case (3D), index.json and splits.json: parallel, resumable,
atomic.

A file is written beside its place, verified and renamed, so that whatever stands under `cases/` is whole; a
second run keeps what was made from the same raw files with the same preprocessing.
"""

import inspect
import json
import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import h5py
import numpy as np

from medldm.data.case import Case
from medldm.data.datasets import find_dataset, published_splits
from medldm.data.preparation.jobs import Job, has_findings, make_jobs, root_attributes
from medldm.data.preparation.recipe import SCHEMA_VERSION, Recipe, make_recipe
from medldm.data.preparation.slices import describe_slices, warn_of_planes, write_slices
from medldm.data.preparation.transforms import mapping_override
from medldm.data.preparation.volumes import describe_volume, write_volume
from medldm.data.prepared import UNFINISHED, load_index
from medldm.data.raw.grids import warn_of_grids
from medldm.data.raw.inventory import same_images, take_inventory
from medldm.data.raw.tables import Note
from medldm.data.splits import make_splits, subset_of, write_splits_once
from medldm.errors import InputError
from medldm.files import nothing_empty, read_json, replacing, safe_names, write_json
from medldm.fingerprints import recall

log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """A file that stands: its entry of the index, and why it took the place of an earlier one, if it did."""

    entry: dict
    renewed_because: str | None


def run_job(job: Job) -> Prepared:
    """Write the job's file unless it stands already, and verify it. Before an earlier file is replaced the
    index beside it is marked as unfinished: it no longer says what lies there.
    """
    reason = None
    recall(job.earlier["raw"] if job.earlier else ())
    fingerprint = job.fingerprint()
    if job.path.is_file():
        try:
            return Prepared(describe(job.path, job, fingerprint), None)
        except InputError as error:
            log.debug("%s: made anew (%s)", job.path, error)
            reason = job.reason_to_renew()
    with replacing(job.path) as temporary:
        with h5py.File(temporary, "w") as file:
            file.attrs.update(root_attributes(job, fingerprint))
            (write_slices if job.recipe.spatial_dims == 2 else write_volume)(job, file)
        entry = describe(temporary, job, fingerprint)
        if reason is not None:
            mark_unfinished(job.path.parents[1], job.command)
    return Prepared(entry, reason)


def mark_unfinished(root: Path, command: str) -> None:
    """The index of `root` is refused by everything that reads it until `command` has run to its end."""
    path = root / "index.json"
    index = read_json(path, "prepare again") if path.is_file() else {}
    if index and UNFINISHED not in index:
        write_json(path, index | {UNFINISHED: command})


def describe(path: Path, job: Job, fingerprint: str) -> dict:
    """The index entry of a prepared file, after checking the file against schema and job. InputError if it
    fails.
    """
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("fingerprint") != fingerprint:
                raise InputError(
                    f"{path}: was made from other raw files or with other preprocessing; run prepare again"
                )
            return (describe_slices if job.recipe.spatial_dims == 2 else describe_volume)(file, path, job)
    except OSError as error:
        raise InputError(
            f"{path}: not a complete HDF5 file; delete it and run `medldm prepare` again"
        ) from error


# ---- the whole dataset ----


def prepare_dataset(
    *,
    dataset: str,
    raw: str | Path,
    root: str | Path,
    spatial_dims: int,
    image_size: int | Sequence[int] | None,
    num_workers: int,
    preprocess: Mapping[str, Any],
    splits: Mapping[str, Any],
    select: Mapping[str, Any] | None = None,
    modalities: Sequence[str] | None = None,
    label_dir: str | Path | None = None,
    task: str | None = None,
    cine: bool | int | None = None,
    command: str | None = None,
) -> Path:
    """Prepare every case under `raw` into `root`; returns `root`. `splits` holds seed, val and test
    (fractions); `modalities`, `label_dir`, `task` and `cine` go to datasets that have them. `command` is what
    a message tells to run again where this run is stopped halfway.

    InputError names the first bad file; finished cases are kept and the next run goes on from them.
    """
    root, notes = Path(root), []
    recipe = make_recipe(spatial_dims, image_size, preprocess)
    options = {"modalities": modalities, "label_dir": label_dir, "task": task, "cine": frame_step(cine)}
    found = find_cases(dataset, raw, options, notes.append)
    cases = with_their_cine(found, recipe, seed=splits["seed"], **(select or {}))
    inventory = take_inventory(Path(raw), found, cases, notes=notes, modalities=modalities or ())
    cases = with_safe_names(cases, inventory["notes"].append)
    stated = stated_splits(cases)
    command = command or f"medldm prepare data.raw={raw} data.root={root}"
    jobs = make_jobs(cases, root, dataset, recipe, modalities, command=command, earlier=earlier_entries(root))
    with nothing_empty(root / "cases"):
        prepared = list(run_jobs(jobs, num_workers))
    say_what_was_renewed(jobs, prepared)
    entries = [one.entry for one in prepared]
    subjects = [job.subject for job in jobs]
    published = published_splits(dataset, subjects)
    drawn = make_splits(subjects, fractions=splits, seed=splits["seed"], stated=stated, published=published)
    inventory["notes"] += same_images(entries)
    index = make_index(dataset, recipe, jobs, entries)
    index |= {"raw": str(Path(raw).resolve()), "inventory": inventory}
    warn_of_planes(entries)
    if modalities:
        warn_of_grids(entries)
    write_splits_once(root / "splits.json", drawn, subjects)
    write_json(root / "index.json", index)
    verify(root)
    return root


def frame_step(cine: bool | int | None) -> int | None:
    """`data.cine` as a step from frame to frame, None for no frames."""
    if cine is None or cine is False:
        return None
    if not isinstance(cine, int) or cine < 1:
        raise InputError(f"data.cine={cine}: give true (every frame), a number n (every nth frame), or false")
    return int(cine)


def earlier_entries(root: Path) -> dict[str, dict]:
    """id -> entry of the index that an earlier preparation left, finished or not; {} where it says too little
    to tell what has changed since.
    """
    path = root / "index.json"
    if not path.is_file():
        return {}
    try:
        index = json.loads(path.read_text())
        cases = [*index["cases"], *index.get("cine", ())]
        return {case["id"]: case for case in cases if {"raw", "preprocess_hash"} <= case.keys()}
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError):
        log.warning("%s: not a readable index, taken away; every case is checked anew", path)
        path.unlink()
        return {}


def say_what_was_renewed(jobs: Sequence[Job], prepared: Sequence[Prepared]) -> None:
    """One line a reason."""
    reasons = Counter(one.renewed_because for one in prepared if one.renewed_because)
    for reason, count in reasons.items():
        first = next(job.id for job, one in zip(jobs, prepared, strict=True) if one.renewed_because == reason)
        log.warning("%d of %d cases made anew (%s, ...): %s", count, len(jobs), first, reason)


def find_cases(
    dataset: str, raw: str | Path, options: Mapping[str, Any], note: Note = log.info
) -> list[Case]:
    """The cases of a dataset, which tells `note` what is worth a line; InputError for an option that it has
    not.
    """
    index = find_dataset(dataset).index
    given = {key: value for key, value in options.items() if value is not None}
    taken = inspect.signature(index).parameters.keys()
    if given.keys() - taken:
        raise InputError(
            f"data.{min(given.keys() - taken)}: the dataset {dataset} has no such option; set it to null"
        )
    given |= {"note": note} if "note" in taken else {}
    return index(raw, **given)


def with_their_cine(found: Sequence[Case], recipe: Recipe, **select: Any) -> list[Case]:
    """The selected cases, and the CINE frames of their subjects. InputError where a recipe has no use for
    frames.
    """
    cases = select_cases([case for case in found if not case.is_cine], **select)
    subjects = {case.subject for case in cases}
    frames = [case for case in found if case.is_cine and case.subject in subjects]
    if frames and recipe.spatial_dims != 2:
        raise InputError(
            "data.cine: frames are prepared as slices; set data.spatial_dims=2 or data.cine=false"
        )
    if frames and recipe.crop_label_margin is not None:
        raise InputError(
            "data.cine: frames have no class map to crop to; set data.preprocess.crop_label_margin=null or "
            "data.cine=false"
        )
    return cases + frames


def select_cases(
    cases: Sequence[Case],
    *,
    classes: Sequence[str] | None = None,
    split: str | None = None,
    max_images: int | None = None,
    seed: int = 0,
) -> list[Case]:
    """The cases of some labels and of one part of the data's own `split`, and at most `max_images` of these,
    drawn with `seed` and kept in order. A part that is prepared alone is split anew.
    """
    if split is not None:
        cases = part_of(cases, split)
    if classes is not None:
        known = {str(case.attributes["label"]) for case in cases if "label" in case.attributes}
        unknown = [name for name in classes if str(name) not in known]
        if unknown:
            raise InputError(
                f"data.select.classes: no image has the label {unknown[0]}; "
                f"there are {', '.join(sorted(known)) or 'none'}"
            )
        cases = [case for case in cases if str(case.attributes.get("label")) in map(str, classes)]
    if max_images is not None and max_images < 1:
        raise InputError(f"data.select.max_images={max_images}: give 1 or more, or null for all")
    if max_images is None or len(cases) <= max_images:
        return list(cases)
    drawn = np.random.default_rng(seed).permutation(len(cases))[:max_images]
    return [cases[i] for i in sorted(drawn)]


def with_safe_names(cases: Sequence[Case], note: Note) -> list[Case]:
    """The cases with ids and subjects that name one file each inside a folder, on any system."""
    subjects = safe_names(dict.fromkeys(case.subject for case in cases))
    ids = safe_names(dict.fromkeys(case.id for case in cases))
    for what, names in (("subjects", subjects), ("cases", ids)):
        changed = [name for name, safe in names.items() if name != safe]
        if changed:
            note(
                f"{len(changed)} {what} have names that are no safe file names, or differ in case alone, and "
                f"got others ({shorten(changed[0])} -> {shorten(names[changed[0]])}); index.json keeps the "
                "original"
            )
    return [
        case
        if (case.id, case.subject) == (ids[case.id], subjects[case.subject])
        else replace(
            case,
            id=ids[case.id],
            subject=subjects[case.subject],
            original={"original_id": case.id, "original_subject": case.subject},
        )
        for case in cases
    ]


def shorten(name: str, length: int = 60) -> str:
    return name if len(name) <= length else f"{name[: length // 2]}...{name[-length // 2 :]}"


def part_of(cases: Sequence[Case], split: str) -> list[Case]:
    """The cases of one part of the stated split, which is then no split any more; all of data without one."""
    stated = {str(case.attributes["split"]) for case in cases if "split" in case.attributes}
    wanted = subset_of(split)
    kept = [c for c in cases if not stated or subset_of(str(c.attributes.get("split", ""))) == wanted]
    if wanted is None or not kept:
        there = ", ".join(sorted(stated)) or "no split"
        raise InputError(f"data.select.split={split}: no image is in this part; the data state {there}")
    return [
        replace(case, attributes={k: v for k, v in case.attributes.items() if k != "split"}) for case in kept
    ]


def stated_splits(cases: Sequence[Case]) -> dict[str, str] | None:
    """The data's own split of each subject, or None where they state none."""
    stated: dict[str, str] = {}
    for case in cases:
        name = case.attributes.get("split")
        if name is None:
            continue
        part = subset_of(str(name)) or str(name)
        if stated.setdefault(case.subject, part) != part:
            raise InputError(
                f"{case.main_path}: subject {case.subject} is in both {stated[case.subject]} and {part}; "
                "keep it in one split"
            )
    bare = next((case for case in cases if case.subject not in stated), None)
    if stated and bare:
        raise InputError(
            f"{bare.main_path}: subject {bare.subject} has no split while others have; state it for all, or "
            "for none"
        )
    return stated or None


def run_jobs(jobs: Sequence[Job], num_workers: int) -> Iterator[Prepared]:
    """In the order of the jobs, under a progress bar. The first failure cancels the rest."""
    from rich.progress import track

    if num_workers < 1:
        yield from map(run_job, track(jobs, description="Preparing cases"))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(num_workers, len(jobs)), context, initializer=single_threaded) as pool:
        futures: list[Future] = [pool.submit(run_job, job) for job in jobs]
        try:
            for future in track(futures, description="Preparing cases"):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def single_threaded() -> None:
    """One thread a process: the processes are the parallelism."""
    import os

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cv2.setNumThreads(0)


def count_classes(recipe: Recipe, jobs: Sequence[Job], entries: Sequence[dict]) -> int | None:
    """Number of classes with the background, or None without masks. InputError where the numbering has wide
    gaps.
    """
    mapped = [
        (job, entry) for job, entry in zip(jobs, entries, strict=True) if entry["max_class"] is not None
    ]
    if not mapped:
        return None
    if recipe.labels.names is not None:
        return len(recipe.labels.names)
    largest = [entry["max_class"] for _, entry in mapped]
    present = sorted({value for entry in entries for value in entry["classes"]})
    if max(largest) >= 16 and 4 * len(present) < max(largest):
        case = mapped[int(np.argmax(largest))][0].cases[0]
        mapping = {value: i for i, value in enumerate(present)}
        raise InputError(
            f"{case.paths.get('mask', case.main_path)}: class numbers go up to {max(largest)} but only "
            f"{len(present)} occur; number them anew with {mapping_override(mapping)}"
        )
    return max(max(largest) + 1, 2)


def make_index(dataset: str, recipe: Recipe, jobs: Sequence[Job], entries: Sequence[dict]) -> dict:
    """What `index.json` says. Files of CINE frames stand under `cine`, which is there where they are: nothing
    but the training of an autoencoder reads them.
    """
    both = list(zip(jobs, entries, strict=True))
    cine = [{**entry, "cine": True} for job, entry in both if job.is_cine]
    tables = jobs[0].tables
    shapes = {tuple(entry["shape"]) for entry in entries}
    names = recipe.labels.names
    num_classes = count_classes(recipe, jobs, entries)
    return {
        "schema_version": SCHEMA_VERSION,
        "dataset": dataset,
        "spatial_dims": recipe.spatial_dims,
        "image_channels": 1,
        "num_classes": num_classes,
        "label_names": None if names is None or num_classes is None else list(names),
        "num_views": len(tables.views),
        "view_names": tables.views,
        "num_phases": len(tables.phases),
        "phase_names": tables.phases,
        "num_labels": len(tables.labels),
        "label_values": tables.labels,
        "multi_label": any(map(has_findings, jobs)),
        "image_size": list(shapes.pop()) if len(shapes) == 1 else None,
        "has_images": jobs[0].cases[0].has_image,
        "has_edges": recipe.edges is not None,
        "num_edge_levels": 0 if recipe.edges is None else len(recipe.edges.levels),
        "orientation": recipe.orientation if recipe.spatial_dims == 3 else None,
        "preprocess": recipe.as_dict(),
        "preprocess_hash": recipe.hash,
        "cases": [entry for job, entry in both if not job.is_cine],
        **({"cine": cine} if cine else {}),
    }


def verify(root: Path) -> None:
    """The index against the files beside it: each there, whole, and as long as stated. Every file was checked
    inside when it was written or taken over.
    """
    index = load_index(root)
    for case in [*index["cases"], *index.get("cine", ())]:
        path = root / case["file"]
        if not path.is_file() or path.stat().st_size != case["file_size"]:
            raise InputError(f"{path}: missing or changed while preparing; run `medldm prepare` again")
        if index["spatial_dims"] == 2 and any(
            len(values) != case["num_slices"] for values in case["slices"].values()
        ):
            raise InputError(f"{path}: the index does not match its slices; run `medldm prepare` again")
