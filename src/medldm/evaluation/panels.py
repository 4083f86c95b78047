"""Comparison pictures: real, generated, difference and condition of the best, median and worst images."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from medldm.evaluation.pairs import Pair

if TYPE_CHECKING:  # matplotlib is imported where a figure is drawn
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure


def choose(scores: np.ndarray, num: int, lower_is_better: bool = True) -> dict[str, list[int]]:
    """Numbers of the best, the median and the worst images by score; NaN never is chosen."""
    order = [int(i) for i in np.argsort(scores if lower_is_better else -scores) if not np.isnan(scores[i])]
    start = max(0, (len(order) - num) // 2)
    return {"best": order[:num], "median": order[start : start + num], "worst": order[::-1][:num]}


PLANES = ("axial", "coronal", "sagittal")  # across the axes of an upright volume
AXES = ("IS", "PA", "LR")


def upright(volume: np.ndarray, orientation: str) -> np.ndarray:
    """(D, H, W) in this orientation -> axes towards feet, back and the patient's left."""
    places = [next(i for i, letter in enumerate(orientation) if letter in axis) for axis in AXES]
    volume = volume.transpose(places)
    flipped = [k for k, i in enumerate(places) if orientation[i] != AXES[k][0]]
    return np.flip(volume, flipped)


def flat(image: np.ndarray | None, plane: int | None = None, orientation: str = "SPL") -> np.ndarray | None:
    """(H, W) picture of a (C, *S) array: first channel, of a volume the middle slice across a plane."""
    if image is None or plane is None:
        return None if image is None else image[0]
    volume = upright(image[0], orientation)
    return volume.take(volume.shape[plane] // 2, axis=plane)


def label_colours() -> "ListedColormap":
    """Black background, then ten colours; further classes begin again."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(["black", *colormaps["tab10"].colors])


def columns(
    pair: Pair, plane: int | None = None, orientation: str = "SPL"
) -> dict[str, tuple[np.ndarray | None, dict]]:
    """Title -> (picture, how matplotlib shows it)."""
    grey = {"cmap": "gray", "vmin": -1, "vmax": 1}
    difference = pair.generated[0] - pair.real
    labels = None if pair.mask is None else np.where(pair.mask > 0, (pair.mask.astype(int) - 1) % 10 + 1, 0)
    arrays = {
        "source": (pair.source, grey),
        "real": (pair.real, grey),
        "generated": (pair.generated[0], grey),
        "reconstruction": (pair.reconstruction, grey),
        "generated - real": (difference, {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}),
        "edges": (pair.edges, {"cmap": "gray", "vmin": 0, "vmax": 1}),
        "map": (labels, {"cmap": label_colours(), "vmin": 0, "vmax": 10}),
    }
    shape = {"aspect": aspect(pair, plane, orientation)}
    return {
        title: (flat(array, plane, orientation), style | shape) for title, (array, style) in arrays.items()
    }


def aspect(pair: Pair, plane: int | None, orientation: str) -> float:
    """Height of a voxel in the picture over its width."""
    spacing = pair.attributes.get("spacing")
    if plane is None or spacing is None or np.size(spacing) != 3:
        return 1.0
    places = [next(i for i, letter in enumerate(orientation) if letter in axis) for axis in AXES]
    sizes = [float(np.ravel(spacing)[places[k]]) for k in range(3) if k != plane]
    return sizes[0] / sizes[1]


def in_lines(text: str, width: int = 26) -> str:
    """Long names over several lines, so that they fit beside one picture, broken at their separators."""
    lines = []
    for line in text.split("\n"):
        while len(line) > width:
            place = 1 + max(line.rfind(mark, width // 2, width) for mark in "_- ")
            lines.append(line[: place or width])
            line = line[place or width :]
        lines.append(line)
    return "\n".join(lines)


def draw_panel(pairs: Sequence[Pair], captions: Sequence[str], orientation: str = "SPL") -> "Figure":
    """A matplotlib figure with one line of pictures for each pair, or three, one for each plane, where it
    holds volumes; columns that no pair has are left out.
    """
    from matplotlib.figure import Figure

    lines = []
    for pair, caption in zip(pairs, captions, strict=True):
        planes = range(3) if pair.real.ndim == 4 else (None,)
        for plane in planes:
            name = caption if plane in (None, 0) else ""
            label = name if plane is None else "\n".join(filter(None, (name, PLANES[plane])))
            lines.append((label, columns(pair, plane, orientation)))
    titles = [title for title in lines[0][1] if any(cells[title][0] is not None for _, cells in lines)]
    figure = Figure(figsize=(2.0 * len(titles) + 0.4, 2.0 * len(lines) + 0.25), dpi=110, layout="constrained")
    axes = figure.subplots(len(lines), len(titles), squeeze=False)
    for row, (label, cells) in enumerate(lines):
        for title, axis in zip(titles, axes[row], strict=True):
            picture, style = cells[title]
            if picture is not None:
                axis.imshow(picture, interpolation="nearest", **style)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(title, fontsize=9)
        axes[row][0].set_ylabel(in_lines(label), fontsize=7)
    return figure
