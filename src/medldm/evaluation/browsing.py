"""Writes and reads the stacks of slices that the report's slice browser shows, as small 8-bit pictures.

A volume is a stack with three planes, a set of 2D images one with a single plane. Every array of a stack is a
PNG of all its slices as tiles, row by row, which a page cuts into planes.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F

from medldm.errors import InputError
from medldm.evaluation.pairs import Pair
from medldm.evaluation.panels import AXES, PLANES, upright
from medldm.files import replacing, write_json

BROWSER_FOLDER = "browser"
MAX_BROWSED_SIDE = {2: 256, 3: 96}  # pixels or voxels along an axis; longer ones are averaged
NUM_IMAGES = 10  # so many 2D images are shown in the place of each volume
BROWSER_VERSION = 1


def evenly(num_all: int, num: int) -> list[int]:
    """`num` of so many positions, evenly spread, the first and the last among them."""
    return sorted({int(i) for i in np.linspace(0, num_all - 1, min(num, num_all)).round()})


def averaged(array: np.ndarray, limit: int, *, is_map: bool) -> np.ndarray:
    """(*S) with no axis longer than `limit`: the means of blocks, or of a class map the nearest voxels."""
    size = [min(side, limit) for side in array.shape]
    if list(array.shape) == size:
        return array
    x = torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))[None, None]
    mode = "nearest-exact" if is_map else "area"
    return F.interpolate(x, size, mode=mode)[0, 0].numpy()


def to_bytes(array: np.ndarray, kind: str) -> np.ndarray:
    """uint8: images from [-1, 1], edges from {0, 1}; classes as they are, those above 255 as 255."""
    scaled = {"grey": (array + 1) * 127.5, "edges": array * 255.0, "map": array}[kind]
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8)


def tiled(stack: np.ndarray) -> np.ndarray:
    """(D, H, W) -> one picture of its slices, as many columns as rows or one more, the rest black."""
    depth, height, width = stack.shape
    columns = int(np.ceil(depth**0.5))
    rows = -(-depth // columns)
    padded = np.zeros((rows * columns, height, width), stack.dtype)
    padded[:depth] = stack
    return padded.reshape(rows, columns, height, width).swapaxes(1, 2).reshape(rows * height, -1)


def layers_of_pair(pair: Pair) -> dict[str, tuple[np.ndarray | None, str]]:
    """Name -> (C, *S) array and its kind, in the order of the page."""
    return {
        "source": (pair.source, "grey"),
        "real": (pair.real, "grey"),
        "map": (pair.mask, "map"),
        "edges": (pair.edges, "edges"),
        "generated": (pair.generated[0], "grey"),
        "reconstruction": (pair.reconstruction, "grey"),
    }


def upright_spacing(pair: Pair, orientation: str) -> list[float]:
    """Voxel sizes along the axes of an upright volume; 1 where they are not known."""
    spacing = pair.attributes.get("spacing")
    if spacing is None or np.size(spacing) != 3:
        return [1.0, 1.0, 1.0]
    places = [next(i for i, letter in enumerate(orientation) if letter in axis) for axis in AXES]
    return [float(np.ravel(spacing)[place]) for place in places]


def volume_stack(pair: Pair, orientation: str) -> tuple[dict, dict[str, np.ndarray]]:
    """What a page must know of a volume, with its pictures by layer."""
    pair, layers, pictures = pair.loaded(), [], {}
    for name, (array, kind) in layers_of_pair(pair).items():
        if array is not None:
            stack = averaged(upright(array[0], orientation), MAX_BROWSED_SIDE[3], is_map=kind == "map")
            pictures[name] = tiled(to_bytes(stack, kind))
            layers.append({"name": name, "kind": kind})
    full = list(upright(pair.real[0], orientation).shape)
    extent = [side * size for side, size in zip(full, upright_spacing(pair, orientation), strict=True)]
    shape = [min(side, MAX_BROWSED_SIDE[3]) for side in full]
    facts = {"name": pair.id, "ids": [pair.id], "shape": shape, "original": full, "extent": extent}
    return facts | {"planes": list(PLANES), "labels": None, "layers": layers}, pictures


def image_stack(pairs: Sequence[Pair], captions: Sequence[str]) -> tuple[dict, dict[str, np.ndarray]]:
    """As `volume_stack`, of 2D images of one shape as slices. A layer that an image lacks is black there."""
    pairs = [pair.loaded() for pair in pairs]
    full = list(pairs[0].real.shape[1:])
    shape = [len(pairs), *(min(side, MAX_BROWSED_SIDE[2]) for side in full)]
    layers, pictures = [], {}
    for name, (_, kind) in layers_of_pair(pairs[0]).items():
        arrays = [layers_of_pair(pair)[name][0] for pair in pairs]
        if all(array is None for array in arrays):
            continue
        stack = np.zeros(shape, np.uint8)
        for i, array in enumerate(arrays):
            if array is not None:
                stack[i] = to_bytes(averaged(array[0], MAX_BROWSED_SIDE[2], is_map=kind == "map"), kind)
        pictures[name] = tiled(stack)
        layers.append({"name": name, "kind": kind})
    facts = {"name": f"{len(pairs)} images", "ids": [pair.id for pair in pairs], "shape": shape}
    facts |= {"original": [len(pairs), *full], "extent": [float(max(full)), *map(float, full)]}
    return facts | {"planes": ["image"], "labels": list(captions), "layers": layers}, pictures


def write_browser(
    output: Path, pairs: Sequence[Pair], scores: Sequence[float], metric: str, num: int, orientation: str
) -> None:
    """<output>/browser/: `num` volumes, or ten times as many images, evenly spread over their names, so that
    two evaluations of the same images show the same ones. Nothing for 0.
    """
    folder = output / BROWSER_FOLDER
    for path in folder.glob("*.png"):
        path.unlink()  # of an earlier evaluation
    (folder / "stacks.json").unlink(missing_ok=True)
    if num < 1:
        return
    order = sorted(range(len(pairs)), key=lambda i: pairs[i].id)
    captions = [f"{pair.id}: {metric} {score:.3g}" for pair, score in zip(pairs, scores, strict=True)]
    stacks = []
    if len(pairs[0].real.shape) == 4:
        for i in evenly(len(order), num):
            stacks.append(volume_stack(pairs[order[i]], orientation))
            stacks[-1][0]["name"] = captions[order[i]]
    else:
        shape = Counter(pair.real.shape for pair in pairs).most_common(1)[0][0]
        order = [i for i in order if pairs[i].real.shape == shape]
        chosen = [order[i] for i in evenly(len(order), num * NUM_IMAGES)]
        stacks.append(image_stack([pairs[i] for i in chosen], [captions[i] for i in chosen]))
    for number, (facts, pictures) in enumerate(stacks):
        for layer in facts["layers"]:
            layer["file"] = f"{number}_{layer['name']}.png"
            with replacing(folder / layer["file"]) as temporary:
                temporary.write_bytes(cv2.imencode(".png", pictures[layer["name"]])[1].tobytes())
    write_json(folder / "stacks.json", {"schema_version": BROWSER_VERSION, "stacks": [s for s, _ in stacks]})


def read_browser(folder: Path) -> list[Mapping]:
    """The stacks of an evaluation with the bytes of their pictures as `png`; none where none was written.
    InputError where a file is not there or not what `medldm evaluate` writes.
    """
    path = folder / BROWSER_FOLDER / "stacks.json"
    if not path.is_file():
        return []
    try:
        found = json.loads(path.read_text())
        if found["schema_version"] != BROWSER_VERSION:
            raise ValueError(f"schema_version {found['schema_version']}")
        for stack in found["stacks"]:
            for layer in stack["layers"]:
                layer["png"] = (path.parent / Path(layer.pop("file")).name).read_bytes()
    except (json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); run `medldm evaluate` again") from error
    except OSError as error:
        raise InputError(f"{error.filename}: cannot be read; run `medldm evaluate` again") from error
    return found["stacks"]
