"""Raw cases -> one HDF5 file a subject (2D) or a case (3D), index.json and splits.json: parallel, resumable,
atomic.

A file is written beside its place, verified and renamed, so that whatever stands under `cases/` is whole; a
second run keeps what was made from the same raw files with the same preprocessing.
"""

import hashlib
import importlib
import json
import logging
import multiprocessing
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np

import medldm
from medldm.data.case import Case, split_path
from medldm.data.edges import EdgeRecipe
from medldm.data.readers import Image, load_index, read_image, read_mask
from medldm.data.splits import make_splits, write_splits_once
from medldm.data.transforms import (
    INVERSIONS,
    Intensity,
    Labels,
    Resize,
    finite,
    looks_inverted,
    to_unit,
)
from medldm.errors import InputError
from medldm.files import replacing, write_json

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
DTYPES = ("float16", "float32")
COMPRESSION: dict[str, dict] = {
    "none": {},
    "lzf": {"compression": "lzf", "shuffle": True},
    "gzip": {"compression": "gzip", "compression_opts": 4, "shuffle": True},
}
PER_SLICE = ("view", "phase", "slice_index", "num_slices", "label")


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a prepared file holds, apart from the raw files."""

    spatial_dims: int
    image_size: tuple[int, ...] | None
    resize: Resize
    intensity: Intensity
    labels: Labels
    edges: EdgeRecipe | None
    dtype: str
    compression: str
    slice_axis: int
    orientation: str
    spacing: tuple[float, ...] | None
    crop_foreground: bool
    divisible_by: int
    invert: str = "declared"

    def as_dict(self) -> dict:
        return json.loads(json.dumps(asdict(self)))

    @property
    def hash(self) -> str:
        """Of the parameters and of the versions of the libraries that do the work."""
        libraries = (
            ("numpy", "cv2", "scipy") if self.spatial_dims == 2 else ("numpy", "nibabel", "monai", "torch")
        )
        versions = {name: importlib.import_module(name).__version__ for name in libraries}
        return digest({"schema": SCHEMA_VERSION, "recipe": self.as_dict(), "libraries": versions})


def digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def make_recipe(
    spatial_dims: int, image_size: int | Sequence[int] | None, preprocess: Mapping[str, Any]
) -> Recipe:
    """From plain config values. InputError names the key that makes no sense. 2D without a size means 256."""
    if spatial_dims not in (2, 3):
        raise InputError(f"data.spatial_dims={spatial_dims}: choose 2 or 3")
    if image_size is None and spatial_dims == 2:
        image_size = 256
    size = (image_size,) * spatial_dims if isinstance(image_size, int) else image_size and tuple(image_size)
    if size is not None and (len(size) != spatial_dims or min(size) < 8):
        raise InputError(
            f"data.image_size={image_size}: give one number, or {spatial_dims} of them, of at least 8"
        )
    options = {"invert": "declared", **preprocess}
    for key, choices in (
        ("dtype", DTYPES),
        ("compression", tuple(COMPRESSION)),
        ("slice_axis", (0, 1, 2)),
        ("invert", INVERSIONS),
    ):
        if options[key] not in choices:
            raise InputError(
                f"data.preprocess.{key}={options[key]}: choose from {', '.join(map(str, choices))}"
            )
    intensity, labels = dict(options.pop("intensity")), dict(options.pop("labels") or {})
    for key in ("percentiles", "window"):
        if intensity.get(key) is not None:
            intensity[key] = tuple(intensity[key])
    edges, spacing = options.pop("edges"), options.pop("spacing")
    if edges is not None and edges.get("thresholds") is not None:
        edges = {**edges, "thresholds": tuple(edges["thresholds"])}
    mapping = labels.get("mapping")
    return Recipe(
        spatial_dims=spatial_dims,
        image_size=size,
        resize=Resize(**options.pop("resize")),
        intensity=Intensity(**intensity),
        labels=Labels(
            tuple(labels["names"]) if labels.get("names") else None,
            {int(k): int(v) for k, v in mapping.items()} if mapping else None,
        ),
        edges=EdgeRecipe(**edges) if edges is not None and spatial_dims == 2 else None,
        spacing=tuple(spacing) if isinstance(spacing, Iterable) else spacing and (float(spacing),) * 3,
        **options,
    )


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


def make_tables(cases: Sequence[Case]) -> Tables:
    def values(name: str) -> set[str]:
        return {str(case.attributes[name]) for case in cases if name in case.attributes}

    return Tables(
        known_order(values("view"), ["SA", "LA"]),
        known_order(values("phase"), ["ED", "ES"]),
        known_order(values("label"), []),
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
                if not path.is_file():
                    raise InputError(f"{path}: no such file; restore it, or remove its case from the dataset")
                state = path.stat()
                files.append({"path": str(path), "size": state.st_size, "mtime_ns": state.st_mtime_ns})
        return files

    def fingerprint(self) -> str:
        """Changes when the preprocessing, a raw file or what is known of a case changes."""
        known = [(case.id, case.attributes) for case in self.cases]
        return digest([self.recipe.hash, self.raw_files(), known, asdict(self.tables), self.dataset])


def make_jobs(cases: Sequence[Case], root: Path, dataset: str, recipe: Recipe) -> list[Job]:
    tables = make_tables(cases)
    groups: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        groups[(case.subject, case.subject) if recipe.spatial_dims == 2 else (case.id, case.subject)].append(
            case
        )
    return [
        Job(name, subject, tuple(members), root / "cases" / f"{name}.h5", dataset, recipe, tables)
        for (name, subject), members in sorted(groups.items())
    ]


# ---- 2D ----


def as_slices(image: Image, axis: int, path: str) -> tuple[np.ndarray, tuple[float, float]]:
    """(N, H, W), and mm per pixel (H, W). A NIfTI plane (X, Y) becomes rows Y and columns X."""
    if image.affine is None:
        return image.array[None], image.spacing or (1.0, 1.0)
    array, spacing = image.array, [s or 1.0 for s in image.spacing]
    while array.ndim > 3 and array.shape[-1] == 1:
        array, spacing = array[..., 0], spacing[:-1]
    if array.ndim not in (2, 3):
        raise InputError(f"{path}: has {array.ndim} axes {array.shape}; give one volume a file")
    if array.ndim == 2:
        array, spacing = array[..., None], [*spacing, 1.0]
    planes = np.moveaxis(array, axis, 2).transpose(2, 1, 0)
    in_plane = [s for i, s in enumerate(spacing) if i != axis]
    return planes, (in_plane[1], in_plane[0])


def read_pair(case: Case) -> tuple[Image, Image | None]:
    """Image and mask of a case on one grid; InputError where their shapes differ."""
    image = read_image(case.paths["image"])
    if "mask" not in case.paths:
        return image, None
    mask = read_mask(case.paths["mask"])
    if mask.array.shape != image.array.shape:
        raise InputError(
            f"{case.paths['mask']}: mask of shape {mask.array.shape} for an image of shape "
            f"{image.array.shape}; "
            "resample one onto the other's grid"
        )
    if mask.affine is not None and image.affine is not None:
        apart = np.abs(mask.affine - image.affine)[:3, 3].max()
        if apart > max(image.spacing[:3]):
            log.warning(
                "%s: lies %.1f mm away from its image, whose grid is taken", case.paths["mask"], apart
            )
    return image, mask


def is_inverted(case: Case, volume: np.ndarray, rule: str) -> bool:
    """Whether a picture shows air bright (MONOCHROME1): `declared` by its manifest, or seen by `auto`."""
    stated = str(case.attributes.get("photometric", "")).upper()
    if rule == "none":
        return False
    if stated or rule == "declared":
        return stated == "MONOCHROME1"
    inverted = looks_inverted(volume[len(volume) // 2])
    if inverted:
        log.warning("%s: looks inverted, turned; declare it, or set preprocess.invert", case.paths["image"])
    return inverted


def prepare_slices(case: Case, recipe: Recipe, tables: Tables) -> dict[str, np.ndarray]:
    """All slices of one acquisition as the datasets of schema v1."""
    raw, raw_mask = read_pair(case)
    volume, spacing = as_slices(raw, recipe.slice_axis, case.paths["image"])
    volume = finite(volume, case.paths["image"])
    size, count = recipe.image_size, len(volume)
    view = str(case.attributes.get("view", ""))
    low, high = recipe.intensity.volume_range(volume)
    if is_inverted(case, volume, recipe.invert):
        volume = (low + high) - volume
    images, ranges = [], []
    for plane in volume:
        resized = recipe.resize.image(plane, spacing, size, fill=low)
        if recipe.intensity.mode == "slice_minmax":
            low, high = float(resized.min()), float(resized.max())
        images.append(to_unit(resized, low, high))
        ranges.append((low, high))
    out: dict[str, np.ndarray] = {"images": np.stack(images)}
    if raw_mask is not None:
        planes, _ = as_slices(raw_mask, recipe.slice_axis, case.paths["mask"])
        classes = recipe.labels(planes, case.paths["mask"]).astype(np.uint8)
        out["semantic_maps"] = np.stack([recipe.resize.label(plane, spacing, size) for plane in classes])
    if recipe.edges is not None:
        detect = recipe.edges.for_view(view)
        maps = out.get("semantic_maps", [None] * count)
        out["edges"] = np.stack([detect(image, mask) for image, mask in zip(images, maps, strict=True)])
    out["view"] = np.full(count, number(view, tables.views), np.uint8)
    out["phase"] = np.full(count, number(case.attributes.get("phase", ""), tables.phases), np.uint8)
    out["label"] = np.full(count, number(case.attributes.get("label", ""), tables.labels), np.int16)
    out["slice_index"] = np.arange(count, dtype=np.int16)
    out["num_slices"] = np.full(count, count, np.int16)
    out["spacing"] = np.tile(
        np.float32(recipe.resize.spacing_after(volume.shape[1:], spacing, size)), (count, 1)
    )
    out["orig_shape"] = np.tile(np.int32(volume.shape[1:]), (count, 1))
    out["intensity_range"] = np.float32(ranges)
    return out


def number(value: Any, names: Sequence[str]) -> int:
    return names.index(str(value)) if str(value) in names else 0


def write_slices(job: Job, file: h5py.File) -> None:
    parts = [prepare_slices(case, job.recipe, job.tables) for case in job.cases]
    arrays = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    arrays["images"] = arrays["images"].astype(job.recipe.dtype)
    for key, array in arrays.items():
        layout = (
            {"chunks": (1, *array.shape[1:]), **COMPRESSION[job.recipe.compression]}
            if array.ndim == 3
            else {}
        )
        file.create_dataset(key, data=array, **layout)
    sources = [
        Path(case.paths["image"]).name
        for case, part in zip(job.cases, parts, strict=True)
        for _ in part["view"]
    ]
    file.create_dataset("source", data=sources, dtype=h5py.string_dtype())


# ---- 3D ----


def write_volume(job: Job, file: h5py.File) -> None:
    from medldm.data.volumes import prepare_volume  # MONAI and torch: 2D workers do without

    (case,), recipe = job.cases, job.recipe
    raw, raw_mask = read_pair(case)
    shape = raw.array.shape[:3] if raw.array.shape[3:] == (1,) * (raw.array.ndim - 3) else raw.array.shape
    if raw.affine is None or len(shape) != 3:
        raise InputError(f"{case.paths['image']}: is no 3D volume; give NIfTI files with three axes")
    mask = None if raw_mask is None else recipe.labels(raw_mask.array.reshape(shape), case.paths["mask"])
    volume = prepare_volume(
        finite(raw.array.reshape(shape), case.paths["image"]),
        mask,
        raw.affine,
        orientation=recipe.orientation,
        spacing=recipe.spacing,
        crop_foreground=recipe.crop_foreground,
        image_size=recipe.image_size,
        divisible_by=recipe.divisible_by,
        intensity=recipe.intensity,
    )
    layout = COMPRESSION[recipe.compression]
    file.create_dataset("image", data=volume.image.astype(recipe.dtype), **layout)
    if volume.mask is not None:
        file.create_dataset("mask", data=volume.mask, **layout)
    file.attrs.update(
        affine=volume.affine,
        spacing=volume.spacing,
        original_affine=raw.affine,
        original_shape=shape,
        intensity_range=volume.intensity_range,
        box_start=volume.box[0],
        box_end=volume.box[1],
        view=number(case.attributes.get("view", ""), job.tables.views),
        phase=number(case.attributes.get("phase", ""), job.tables.phases),
        label=number(case.attributes.get("label", ""), job.tables.labels),
        source=Path(case.paths["image"]).name,
    )


# ---- one job ----


def run_job(job: Job) -> dict:
    """Write the job's file unless it stands already, verify it, and return its entry of the index."""
    fingerprint = job.fingerprint()
    if job.path.is_file():
        try:
            return describe(job.path, job, fingerprint)
        except InputError:
            log.debug("%s: stale or damaged, made anew", job.path)
    with replacing(job.path) as temporary:
        with h5py.File(temporary, "w") as file:
            file.attrs.update(root_attributes(job, fingerprint))
            (write_slices if job.recipe.spatial_dims == 2 else write_volume)(job, file)
        describe(temporary, job, fingerprint)
    return describe(job.path, job, fingerprint)


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


def entry_of(job: Job, path: Path) -> dict:
    return {
        "id": job.id,
        "subject": job.subject,
        "file": f"cases/{job.path.name}",
        "file_size": path.stat().st_size,
        "attributes": common_attributes(job.cases),
        "raw": job.raw_files(),
    }


def check_range(path: Path, image: np.ndarray) -> None:
    if not (np.isfinite(image).all() and np.abs(image).max() <= 1):
        raise InputError(f"{path}: image values leave [-1, 1]; delete it and run `medldm prepare` again")


def check_classes(path: Path, mask: np.ndarray, job: Job) -> int:
    """The largest class; InputError where it has no name."""
    largest, names = int(mask.max()), job.recipe.labels.names
    if names is not None and largest >= len(names):
        raise InputError(
            f"{path}: holds class {largest}, known are 0..{len(names) - 1}; map it in data.preprocess.labels"
        )
    return largest


def describe_slices(file: h5py.File, path: Path, job: Job) -> dict:
    arrays = {key: file[key][()] for key in file if key != "source"}
    lengths = {key: len(array) for key, array in arrays.items()}
    needed = {
        "images",
        "slice_index",
        "num_slices",
        "view",
        "phase",
        "label",
        "spacing",
        "orig_shape",
        "intensity_range",
    }
    needed |= {"semantic_maps"} if "mask" in job.cases[0].paths else set()
    needed |= {"edges"} if job.recipe.edges is not None else set()
    if not needed <= lengths.keys() or len(set(lengths.values())) != 1:
        raise InputError(
            f"{path}: datasets are missing or of unequal length {lengths}; delete it and prepare again"
        )
    check_range(path, arrays["images"])
    if "edges" in arrays and arrays["edges"].max() > 1:
        raise InputError(f"{path}: edges are not 0 and 1; delete it and prepare again")
    shapes = {arrays[key].shape for key in ("images", "semantic_maps", "edges") if key in arrays}
    if shapes != {(lengths["images"], *job.recipe.image_size)}:
        raise InputError(
            f"{path}: images, maps and edges have shapes {sorted(shapes)}; delete it and prepare again"
        )
    entry = entry_of(job, path)
    entry["num_slices"] = lengths["images"]
    entry["shape"] = list(job.recipe.image_size)
    entry["spacing"] = [float(s) for s in arrays["spacing"][0]]
    entry["slices"] = {key: arrays[key].tolist() for key in PER_SLICE}
    entry["slices"]["source"] = file["source"].asstr()[()].tolist()
    entry["max_class"] = (
        check_classes(path, arrays["semantic_maps"], job) if "semantic_maps" in arrays else None
    )
    entry["classes"] = np.unique(arrays["semantic_maps"]).tolist() if "semantic_maps" in arrays else []
    return entry


def describe_volume(file: h5py.File, path: Path, job: Job) -> dict:
    image = file["image"][()]
    check_range(path, image)
    mask = file["mask"][()] if "mask" in file else None
    if ("mask" in job.cases[0].paths) != (mask is not None) or (
        mask is not None and mask.shape != image.shape
    ):
        raise InputError(f"{path}: image and mask do not match; delete it and prepare again")
    entry = entry_of(job, path)
    for key in (
        "affine",
        "spacing",
        "original_affine",
        "original_shape",
        "intensity_range",
        "box_start",
        "box_end",
    ):
        entry[key] = np.asarray(file.attrs[key]).tolist()
    for key in ("view", "phase", "label", "source"):
        entry[key] = file.attrs[key] if key == "source" else int(file.attrs[key])
    entry["shape"] = list(image.shape[1:])
    entry["max_class"] = None if mask is None else check_classes(path, mask, job)
    entry["classes"] = [] if mask is None else np.unique(mask).tolist()
    return entry


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
) -> Path:
    """Prepare every case under `raw` into `root`; returns `root`. `splits` holds seed, val and test
    (fractions).

    InputError names the first bad file; finished cases are kept and the next run goes on from them.
    """
    root = Path(root)
    recipe = make_recipe(spatial_dims, image_size, preprocess)
    cases = select_cases(find_index(dataset)(raw), seed=splits["seed"], **(select or {}))
    stated = stated_splits(cases)
    jobs = make_jobs(cases, root, dataset, recipe)
    entries = list(run_jobs(jobs, num_workers))
    subjects = [job.subject for job in jobs]
    drawn = make_splits(subjects, dataset=dataset, fractions=splits, seed=splits["seed"], stated=stated)
    index = make_index(dataset, recipe, jobs, entries)
    write_splits_once(root / "splits.json", drawn, subjects)
    write_json(root / "index.json", index)
    verify(root)
    return root


def find_index(dataset: str):  # noqa: ANN201 - a function index(root) -> list[Case]
    """`index` of medldm.data.datasets.<dataset>."""
    names = sorted(p.stem for p in (Path(__file__).parent / "datasets").glob("*.py") if p.stem != "__init__")
    if dataset not in names:
        raise InputError(f"data.dataset={dataset}: no such dataset; choose from {', '.join(names)}")
    return importlib.import_module(f"medldm.data.datasets.{dataset}").index


def select_cases(
    cases: Sequence[Case],
    *,
    classes: Sequence[str] | None = None,
    max_images: int | None = None,
    seed: int = 0,
) -> list[Case]:
    """The cases of some labels, and at most `max_images` of these, drawn with `seed` and kept in order."""
    if classes is not None:
        known = {str(case.attributes.get("label")) for case in cases}
        unknown = [name for name in classes if str(name) not in known]
        if unknown:
            raise InputError(
                f"data.select.classes: no image has the label {unknown[0]}; "
                f"there are {', '.join(sorted(known))}"
            )
        cases = [case for case in cases if str(case.attributes.get("label")) in map(str, classes)]
    if max_images is not None and max_images < 1:
        raise InputError(f"data.select.max_images={max_images}: give 1 or more, or null for all")
    if max_images is None or len(cases) <= max_images:
        return list(cases)
    drawn = np.random.default_rng(seed).permutation(len(cases))[:max_images]
    return [cases[i] for i in sorted(drawn)]


def stated_splits(cases: Sequence[Case]) -> dict[str, str] | None:
    """The manifest's split of each subject, or None where it states none."""
    stated: dict[str, str] = {}
    for case in cases:
        name = case.attributes.get("split")
        if name is not None and stated.setdefault(case.subject, str(name)) != name:
            raise InputError(
                f"manifest.csv: subject {case.subject} is in both {stated[case.subject]} and {name}; keep "
                "it in one split"
            )
    missing = {case.subject for case in cases} - stated.keys()
    if stated and missing:
        raise InputError(
            f"manifest.csv: subject {sorted(missing)[0]} has no split; fill the column for all, or drop it"
        )
    return stated or None


def run_jobs(jobs: Sequence[Job], num_workers: int) -> Iterator[dict]:
    """Entries in the order of the jobs, under a progress bar. The first failure cancels the rest."""
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
    if recipe.labels.names is not None and entries[0]["max_class"] is not None:
        return len(recipe.labels.names)
    largest = [entry["max_class"] for entry in entries if entry["max_class"] is not None]
    if not largest:
        return None
    present = sorted({value for entry in entries for value in entry["classes"]})
    if max(largest) >= 16 and 4 * len(present) < max(largest):
        job = jobs[int(np.argmax(largest))]
        mapping = ", ".join(f"{value}: {i}" for i, value in enumerate(present[:4]))
        raise InputError(
            f"{job.cases[0].paths['mask']}: class numbers go up to {max(largest)} but only {len(present)} "
            "occur; "
            f"number them anew with data.preprocess.labels.mapping='{{{mapping}}}'"
        )
    return max(max(largest) + 1, 2)


def make_index(dataset: str, recipe: Recipe, jobs: Sequence[Job], entries: Sequence[dict]) -> dict:
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
        "image_size": list(shapes.pop()) if len(shapes) == 1 else None,
        "has_edges": recipe.edges is not None,
        "preprocess": recipe.as_dict(),
        "preprocess_hash": recipe.hash,
        "cases": list(entries),
    }


def verify(root: Path) -> None:
    """The index against the files beside it: each there, whole, and as long as stated. Every file was checked
    inside when it was written or taken over.
    """
    index = load_index(root)
    for case in index["cases"]:
        path = root / case["file"]
        if not path.is_file() or path.stat().st_size != case["file_size"]:
            raise InputError(f"{path}: missing or changed while preparing; run `medldm prepare` again")
        if index["spatial_dims"] == 2 and any(
            len(values) != case["num_slices"] for values in case["slices"].values()
        ):
            raise InputError(f"{path}: the index does not match its slices; run `medldm prepare` again")
