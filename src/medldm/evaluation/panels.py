"""Comparison pictures: real, generated, difference and condition of the best, median and worst images."""

from collections.abc import Sequence

import numpy as np

from medldm.evaluation.pairs import Pair


def choose(scores: np.ndarray, num: int, lower_is_better: bool = True) -> dict[str, list[int]]:
    """Numbers of the best, the median and the worst images by score; NaN never is chosen."""
    order = [int(i) for i in np.argsort(scores if lower_is_better else -scores) if not np.isnan(scores[i])]
    start = max(0, (len(order) - num) // 2)
    return {"best": order[:num], "median": order[start : start + num], "worst": order[::-1][:num]}


def flat(image: np.ndarray | None) -> np.ndarray | None:
    """(H, W) picture of a (C, *S) array: first channel, middle slice of a volume."""
    if image is None:
        return None
    picture = image[0]
    return picture[len(picture) // 2] if picture.ndim == 3 else picture


def label_colours():  # noqa: ANN201 - matplotlib is imported lazily
    """Black background, then ten colours; further classes begin again."""
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap

    return ListedColormap(["black", *colormaps["tab10"].colors])


def columns(pair: Pair) -> dict[str, tuple[np.ndarray | None, dict]]:
    """Title -> (picture, how matplotlib shows it)."""
    grey = {"cmap": "gray", "vmin": -1, "vmax": 1}
    difference = pair.generated[0] - pair.real
    labels = None if pair.mask is None else np.where(pair.mask > 0, (pair.mask - 1) % 10 + 1, 0)
    return {
        "real": (flat(pair.real), grey),
        "generated": (flat(pair.generated[0]), grey),
        "reconstruction": (flat(pair.reconstruction), grey),
        "generated - real": (flat(difference), {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}),
        "edges": (flat(pair.edges), {"cmap": "gray", "vmin": 0, "vmax": 1}),
        "map": (flat(labels), {"cmap": label_colours(), "vmin": 0, "vmax": 10}),
    }


def draw_panel(pairs: Sequence[Pair], captions: Sequence[str]):  # noqa: ANN201 - matplotlib is imported lazily
    """A matplotlib figure: one line of pictures a pair, columns that no pair has left out."""
    from matplotlib.figure import Figure

    cells = [columns(pair) for pair in pairs]
    titles = [title for title in cells[0] if any(row[title][0] is not None for row in cells)]
    figure = Figure(figsize=(2.0 * len(titles) + 0.4, 2.0 * len(pairs) + 0.25), dpi=110, layout="constrained")
    axes = figure.subplots(len(pairs), len(titles), squeeze=False)
    for row, line in enumerate(axes):
        for title, axis in zip(titles, line, strict=True):
            picture, style = cells[row][title]
            if picture is not None:
                axis.imshow(picture, interpolation="nearest", **style)
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
            if row == 0:
                axis.set_title(title, fontsize=9)
        line[0].set_ylabel(captions[row], fontsize=7)
    return figure
