"""Raw cases -> one HDF5 file for each subject (2D) or case (3D), index.json and splits.json: parallel,
resumable, atomic.

A file is written beside its place, verified and renamed, so that whatever stands under `cases/` is whole; a
second run keeps what was made from the same raw files with the same preprocessing.
"""

import logging
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import h5py

from medldm.data.datasets import published_splits
from medldm.data.hdf5 import check_datasets
from medldm.data.preparation.index import make_index, verify
from medldm.data.preparation.jobs import FileJob, make_jobs, root_attributes
from medldm.data.preparation.recipe import make_recipe
from medldm.data.preparation.selection import (
    find_cases,
    frame_step,
    stated_splits,
    with_safe_names,
    with_their_cine,
)
from medldm.data.preparation.slices import TEXTS, describe_slices, warn_of_planes, write_slices
from medldm.data.preparation.volumes import describe_volume, write_volume
from medldm.data.prepared import UNFINISHED
from medldm.data.raw.grids import warn_of_grids
from medldm.data.raw.inventory import coloured_pictures, constant_images, same_images, take_inventory
from medldm.data.splits import make_splits, write_splits_once
from medldm.errors import InputError
from medldm.files import nothing_empty, read_json, replacing, write_json, writing_hdf5
from medldm.fingerprints import recall
from medldm.locks import one_writer
from medldm.progress import tracked
from medldm.schemas import Index, read_checked

log = logging.getLogger(__name__)


class Prepared(NamedTuple):
    """A file that stands: its entry of the index, and why it took the place of an earlier one, if it did."""

    entry: dict
    renewed_because: str | None


def run_job(job: FileJob) -> Prepared:
    """Write the job's file unless it stands already, and verify it. Before an earlier file is replaced the
    index beside it is marked as unfinished: it no longer says what lies there.
    """
    reason = None
    recall(job.earlier["raw"] if job.earlier else ())
    fingerprint = job.fingerprint()
    if job.path.is_file():
        try:
            entry = describe_file(job.path, job, fingerprint)
            check_content(job, entry)
            return Prepared(entry, None)
        except InputError as error:
            log.debug("%s: made anew (%s)", job.path, error)
            reason = job.reason_to_renew()
    with replacing(job.path) as temporary:
        with writing_hdf5(temporary) as file:
            file.attrs.update(root_attributes(job, fingerprint))
            (write_slices if job.recipe.spatial_dims == 2 else write_volume)(job, file)
        entry = describe_file(temporary, job, fingerprint)
        if reason is not None:
            mark_unfinished(job.path.parents[1], job.command)
    return Prepared(entry, reason)


def check_content(job: FileJob, entry: dict) -> None:
    """InputError where a file holds other arrays than the index that speaks of it says."""
    earlier = job.earlier or {}
    known = earlier.get("content") if earlier.get("fingerprint") == entry["fingerprint"] else None
    if known is not None and known != entry["content"]:
        raise InputError(f"{job.path}: holds other arrays than index.json says; run `medldm prepare` again")


def mark_unfinished(root: Path, command: str) -> None:
    """The index of `root` is refused by everything that reads it until `command` has run to its end."""
    path = root / "index.json"
    index = read_json(path, "prepare again") if path.is_file() else {}
    if index and UNFINISHED not in index:
        write_json(path, index | {UNFINISHED: command})


def describe_file(path: Path, job: FileJob, fingerprint: str) -> dict:
    """The index entry of a prepared file, after checking the file against schema and job. InputError if it
    fails.
    """
    try:
        with h5py.File(path, "r") as file:
            if file.attrs.get("fingerprint") != fingerprint:
                raise InputError(
                    f"{path}: was made from other raw files or with other preprocessing; run prepare again"
                )
            check_datasets(file, path, besides=TEXTS)
            return (describe_slices if job.recipe.spatial_dims == 2 else describe_volume)(file, path, job)
    except OSError as error:
        raise InputError(
            f"{path}: not a complete HDF5 file; delete it and run `medldm prepare` again"
        ) from error


def prepare_dataset(
    *,
    dataset: str,
    raw: str | Path,
    root: str | Path,
    spatial_dims: int,
    image_size: int | Sequence[int | None] | None,
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
    with nothing_empty(root), one_writer(root):
        jobs = make_jobs(
            cases, root, dataset, recipe, modalities, command=command, earlier=earlier_entries(root)
        )
        entries = write_files(jobs, root, num_workers)
        inventory["notes"] += [*same_images(entries), *coloured_pictures(entries), *constant_images(entries)]
        index = make_index(dataset, recipe, jobs, entries)
        index |= {"raw": str(Path(raw).resolve()), "inventory": inventory}
        warn_of_planes(entries)
        if modalities:
            warn_of_grids(entries)
        write_index(root, index, splits, stated)
    return root


def write_index(root: Path, index: dict, splits: Mapping[str, Any], stated: Mapping[str, str] | None) -> None:
    """splits.json, unless it stands, and index.json, which is compared with the files beside it."""
    subjects = [entry["subject"] for entry in (*index["cases"], *index.get("cine", ()))]
    published = published_splits(index["dataset"], subjects)
    drawn = make_splits(subjects, splits, splits["seed"], stated=stated, published=published)
    write_splits_once(root / "splits.json", drawn, subjects)
    write_json(root / "index.json", index)
    verify(root)


def write_files(jobs: Sequence[FileJob], root: Path, num_workers: int) -> list[dict]:
    """Write what does not stand yet, and log what was renewed; returns the entries of the index."""
    with nothing_empty(root / "cases"):
        prepared = list(run_jobs(jobs, num_workers))
    say_what_was_renewed(jobs, prepared)
    return [one.entry for one in prepared]


def earlier_entries(root: Path) -> dict[str, dict]:
    """id -> entry of the index that an earlier preparation left, finished or not; {} where it says too little
    to tell what has changed since.
    """
    path = root / "index.json"
    if not path.is_file():
        return {}
    try:
        index = read_checked(path, Index, "prepare again")
    except InputError:
        log.warning("%s: not a readable index, taken away; every case is checked anew", path)
        path.unlink()
        return {}
    cases = [*index["cases"], *index.get("cine", ())]
    return {case["id"]: case for case in cases if {"raw", "preprocess_hash"} <= case.keys()}


def say_what_was_renewed(jobs: Sequence[FileJob], prepared: Sequence[Prepared]) -> None:
    """Log, in one line for each reason, why cases were prepared again."""
    reasons = Counter(one.renewed_because for one in prepared if one.renewed_because)
    for reason, count in reasons.items():
        first = next(job.id for job, one in zip(jobs, prepared, strict=True) if one.renewed_because == reason)
        log.warning("%d of %d cases made anew (%s, ...): %s", count, len(jobs), first, reason)


def run_jobs(jobs: Sequence[FileJob], num_workers: int) -> Iterator[Prepared]:
    """The results in the order of the jobs, which run under a progress bar. The first failure cancels the
    rest.
    """
    if num_workers < 1:
        yield from map(run_job, tracked(jobs, "preparing cases"))
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(num_workers, len(jobs)), context, initializer=single_threaded_process
    ) as pool:
        futures: list[Future] = [pool.submit(run_job, job) for job in jobs]
        try:
            for future in tracked(futures, "preparing cases"):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def single_threaded_process() -> None:
    """Leave one thread to each process: the processes are the parallelism."""
    import os

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    cv2.setNumThreads(0)
