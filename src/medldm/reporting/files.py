"""Reads the pictures, curves and numbers of a page from the folders of runs and evaluations."""

import csv
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from medldm.errors import InputError
from medldm.evaluation.browsing import evenly, read_browser
from medldm.files import read_json
from medldm.reporting.charts import Curve
from medldm.reporting.sections import EvaluationFiles, chosen_pictures
from medldm.schemas import Metrics, check_schema

MAX_WIDTH = 1600  # pixels; wider pictures are scaled down
MAX_STRIPS, MAX_FRAMES = 3, 8  # cases whose denoising is shown, and steps of each


def read_columns(path: Path) -> dict[str, Curve]:
    """Every column of a metrics.csv as steps and values, its empty cells left out. InputError where a cell is
    not a number.
    """
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    columns = {}
    for name in lines[0] if lines else ():
        cells = [(line.get("step") or i, line[name]) for i, line in enumerate(lines) if line[name]]
        try:
            values = np.array([[float(step), float(value)] for step, value in cells])
        except ValueError as error:
            raise InputError(f"{path}: column {name} holds what is not a number ({error})") from error
        if name != "step" and len(values):
            values = values[np.isfinite(values).all(1)]
            columns[name] = Curve(values[:, 0], values[:, 1])
    return columns


def read_chosen(folder: Path) -> dict[str, bytes]:
    """The pictures of a run's `samples/` that the page will show, by their names without ending."""
    files = {path.stem: path for path in folder.glob("*.png")}
    chosen = [name for names in chosen_pictures(list(files)).values() for name in names]
    return {name: read_png(files[name]) for name in chosen}


def read_png(path: Path) -> bytes:
    """The file's bytes, or those of a smaller picture where it is wider than the page. InputError where it is
    not a whole PNG file.
    """
    try:
        return fitted(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: {error}; delete it and run the report again") from error


def fitted(png: bytes) -> bytes:
    """A picture no wider than the page. ValueError where it is not a whole PNG."""
    image = cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise ValueError("not a complete PNG file")
    if image.shape[1] <= MAX_WIDTH:
        return png
    scale = MAX_WIDTH / image.shape[1]
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".png", small)[1].tobytes()


def read_evaluation(folder: Path) -> EvaluationFiles:
    """What `medldm evaluate` wrote. InputError where it is not there, or of another version."""
    path = folder / "metrics.json"
    results = read_json(path, f"run `medldm evaluate ... output={folder}` first")
    if results.get("schema_version") != 1:
        raise InputError(f"{path}: not written by this version of `medldm evaluate`; run it again")
    check_schema(results, Metrics, path, "run `medldm evaluate` again")
    panels = {file.stem: read_png(file) for file in sorted((folder / "panels").glob("*.png"))}
    made = Path((results.get("folders") or {}).get("generated") or folder)
    return EvaluationFiles(
        str(folder),
        results,
        panels,
        browser=read_browser(folder),
        strips=read_strips(made / "trajectory"),
        closest={file.stem: read_png(file) for file in sorted((folder / "closest").glob("*.png"))},
    )


def read_strips(folder: Path) -> dict[str, bytes]:
    """Steps of the GIFs that `medldm sample trajectory=...` writes, side by side, for some cases of a folder;
    nothing where there are none.
    """
    files = sorted(path for path in folder.glob("*.gif") if path.name[0] != ".")
    chosen = [files[i] for i in evenly(len(files), MAX_STRIPS)]
    return {file.stem: fitted(filmstrip(file)) for file in chosen}


def filmstrip(path: Path) -> bytes:
    """A PNG of up to eight frames of a GIF, evenly spread, the first and the last among them."""
    from PIL import Image, ImageSequence

    try:
        with Image.open(path) as gif:
            frames = [np.asarray(frame.convert("L")) for frame in ImageSequence.Iterator(gif)]
    except OSError as error:
        raise InputError(f"{path}: not a complete GIF file; delete it and run the report again") from error
    gap = np.full((frames[0].shape[0], 4), 128, np.uint8)
    parts = [part for i in evenly(len(frames), MAX_FRAMES) for part in (frames[i], gap)][:-1]
    return cv2.imencode(".png", np.concatenate(parts, axis=1))[1].tobytes()


def read_comparison(folder: Path) -> dict[str, Any]:
    """What `medldm evaluate compare=[A,B]` wrote. InputError where it is not there or cannot be read."""
    path = folder / "comparison.json"
    results = read_json(path, f"run `medldm evaluate compare=[A,B] output={folder}` first")
    if not {"compared", "metrics", "distribution"} <= results.keys():
        raise InputError(f"{path}: not written by this version of `medldm evaluate`; run it again")
    return results
