"""Charts as SVG text whose ink follows the page, so that they are legible on light and dark alike."""

import io
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from markupsafe import Markup

from medldm.metrics.catalogue import better

if TYPE_CHECKING:  # matplotlib is imported where a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # drawn in this colour, then replaced by the page's own
COLOURS = {"train": "#3f7fd9", "val": "#e0792b", "": "#3f7fd9"}
ROW_COLOURS = {"generated": "#2f74d0", "reconstruction": "#2a9d6e"}
BASELINE_COLOUR = "#98a2af"
BESIDE = 1.25  # where a level without a number stands on an axis from 0 to 1
SERIES_COLOURS = ("#2f74d0", "#e0792b", "#2a9d6e", "#7a5cc4", "#98a2af")


class Curve(NamedTuple):
    """Logged values by the update at which they were logged."""

    steps: np.ndarray
    values: np.ndarray


def to_svg(figure: "Figure") -> Markup:
    """Inline SVG without fixed size, document header or dates."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    for size in ("width", "height"):
        svg = re.sub(rf'(<svg[^>]*?) {size}="[^"]*"', r"\1", svg)
    return Markup(svg)


def new_figure(width: float, height: float, salt: str) -> "Figure":
    """An empty figure, in inches; `salt` makes the names inside its SVG the same in every run."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": salt, "font.size": 9})
    matplotlib.rcParams["font.family"] = ["DejaVu Sans"]
    return Figure(figsize=(width, height), layout="constrained")


def style(axis: "Axes") -> None:
    """Give an axis the look that all charts share."""
    axis.tick_params(colors=INK, labelsize=8, length=0)
    axis.grid(True, color="#8895a7", alpha=0.25, linewidth=0.6)
    axis.set_axisbelow(True)
    for spine in axis.spines.values():
        spine.set_visible(False)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Running mean over up to `window` values, shorter at the ends."""
    half = window // 2
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def wants_log(name: str, curves: Mapping[str, Curve]) -> bool:
    """Losses whose values are all positive and span more than a factor of 30."""
    if "loss" not in name:
        return False
    values = np.concatenate([curve.values for curve in curves.values()])
    return bool(values.min() > 0 and values.max() / values.min() > 30)


def curve_chart(name: str, curves: Mapping[str, Curve]) -> Markup:
    """One quantity over the steps, its training and validation curves in one picture."""
    figure = new_figure(4.2, 2.5, f"curve-{name}")
    axis = figure.subplots()
    style(axis)
    for part, curve in curves.items():
        colour = COLOURS.get(part, "#7a5cc4")
        if len(curve.values) > 60:
            axis.plot(*curve, color=colour, alpha=0.25, linewidth=0.7)
            curve = Curve(curve.steps, smooth(curve.values, len(curve.values) // 20))
        marker = "o" if len(curve.values) < 12 else None
        axis.plot(*curve, color=colour, linewidth=1.7, marker=marker, markersize=3.5, label=part or name)
    if wants_log(name, curves):
        axis.set_yscale("log")
    axis.set_title(name, loc="left", fontsize=10, color=INK, fontweight="bold")
    axis.set_xlabel("step", fontsize=8, color=INK)
    if len(curves) > 1:
        axis.legend(frameon=False, labelcolor=INK, fontsize=8)
    return to_svg(figure)


def level_chart(name: str, series: Mapping[str, Mapping]) -> Markup:
    """One metric over the roughness of the edges, with one line for each model; a level that is no number
    (contours) stands to the right of the others.
    """
    figure = new_figure(4.2, 2.7, f"level-{name}")
    axis = figure.subplots()
    style(axis)
    for i, (model, levels) in enumerate(series.items()):
        colour = SERIES_COLOURS[i % len(SERIES_COLOURS)]
        means = {level: as_float(scores[name]["mean"]) for level, scores in levels.items() if name in scores}
        along = [level for level in means if not isinstance(level, str)]
        axis.plot(along, [means[level] for level in along], color=colour, linewidth=1.7, label=model)
        for level, mean in means.items():
            place = BESIDE if isinstance(level, str) else level
            axis.plot(place, mean, "o", color=colour, markersize=4)
            if levels[level][name].get("ci95"):
                ends = [as_float(end) for end in levels[level][name]["ci95"]]
                axis.plot([place, place], ends, color=colour, linewidth=3, alpha=0.35)
    words = {level for levels in series.values() for level in levels if isinstance(level, str)}
    axis.set_xticks([0, 0.25, 0.5, 0.75, 1, *[BESIDE] * len(words)], ["0", "", "0.5", "", "1", *words])
    axis.set_title(name, loc="left", fontsize=10, color=INK, fontweight="bold")
    axis.set_xlabel("roughness of the edges", fontsize=8, color=INK)
    if len(series) > 1:
        axis.legend(frameon=False, labelcolor=INK, fontsize=7)
    return to_svg(figure)


def as_float(value: object) -> float:
    """A number of metrics.json, where infinities are text and nothing is null."""
    return math.nan if value is None else float(value)


def score_chart(rows: Mapping[str, Mapping], names: Sequence[str]) -> Markup:
    """One small panel for each metric, with one line for each row: the mean as a dot, its
    interval as a bar.
    """
    from matplotlib.ticker import MaxNLocator

    order = [row for row in rows if any(name in rows[row] for name in names)][::-1]
    figure = new_figure(2.75 * len(names) + 1.2, 0.34 * len(order) + 1.0, "scores")
    axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        style(axis)
        axis.grid(False, axis="y")
        axis.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
        for y, row in enumerate(order):
            draw_score(axis, y, row, rows[row].get(name))
        direction = f"{better(name)} is better"
        axis.set_title(f"{name}\n", loc="left", fontsize=10, color=INK, fontweight="bold")
        axis.text(0, 1.03, direction, transform=axis.transAxes, fontsize=8, color=INK, alpha=0.65)
        axis.set_yticks(range(len(order)), [row.replace("_", " ") for row in order])
        axis.set_ylim(-0.6, len(order) - 0.4)
    return to_svg(figure)


def draw_score(axis: "Axes", y: int, row: str, score: Mapping | None) -> None:
    """Draw the score of a row at height `y`, its interval and its mean; nothing where it has no
    finite mean.
    """
    mean = as_float((score or {}).get("mean"))
    if not math.isfinite(mean):
        return
    colour = ROW_COLOURS.get(row.split("_")[0], BASELINE_COLOUR)
    if score.get("ci95"):
        axis.plot([as_float(end) for end in score["ci95"]], [y, y], color=colour, linewidth=3, alpha=0.45)
    axis.plot([mean], [y], "o", color=colour, markersize=6.5)
