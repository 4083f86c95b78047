"""What `medldm utility` found, as a chart and a section of the page: Dice over the share of the subjects."""

import io
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from medldm.errors import InputError
from medldm.evaluation.utility import MEAN, utility_lines
from medldm.files import read_json, replacing
from medldm.reporting.charts import INK, as_float, new_figure, style, to_svg
from medldm.reporting.page import chart, element, paragraph, section, table

if TYPE_CHECKING:  # matplotlib is imported where a figure is drawn
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHOICE_COLOURS = {"real": "#2f74d0", "synthetic": "#e0792b", "both": "#2a9d6e"}
CHOICE_LABELS = {"real": "real only", "synthetic": "synthetic only", "both": "real and synthetic"}
CHOICE_MARKS = {"real": "o", "synthetic": "s", "both": "^"}
CHOICE_SPREAD = (
    0.02  # of the axis, between points of one fraction, so that their intervals do not cover each other
)
PNG_DOTS = 150  # per inch of the PNG


def read_utility(folder: Path) -> dict[str, Any]:
    """What `medldm utility` wrote into a folder. InputError where it is not there or cannot be read."""
    path = folder / "utility.json"
    found = read_json(path, f"run `medldm utility ... output={folder}` first")
    if not {"n", "points"} <= found.keys():
        raise InputError(f"{path}: not written by this version of `medldm utility`; run it again")
    return found


def curves_of(results: Mapping[str, Any], name: str) -> dict[str, list[tuple[float, float, float, float]]]:
    """By what was trained on: (fraction, mean, low, high) of a score; NaN where there is none."""
    curves = defaultdict(list)
    for point in sorted(results["points"], key=lambda point: point["fraction"]):
        score = point["scores"][name]
        low, high = (as_float(end) for end in score.get("ci95") or (None, None))
        curves[point["train_on"]].append((point["fraction"], as_float(score["mean"]), low, high))
    return {choice: curves[choice] for choice in CHOICE_LABELS if choice in curves}


def learning_figure(results: Mapping[str, Any], name: str = MEAN) -> "Figure":
    """A line for each choice of training data, over the share of the training subjects; bars are the
    intervals over test subjects.
    """
    figure = new_figure(5.6, 3.4, f"utility-{name}")
    axis = figure.subplots()
    style(axis)
    for number, (choice, points) in enumerate(curves_of(results, name).items()):
        draw_curve(axis, choice, points, shift=1 + CHOICE_SPREAD * (number - 1))
    fractions = sorted({point["fraction"] for point in results["points"]})
    axis.set_xscale("log")
    axis.set_xticks(fractions, [f"{fraction:g}" for fraction in fractions])
    axis.set_xticks([], minor=True)
    axis.set_xlabel("share of the training subjects (logarithmic)", fontsize=8, color=INK)
    n = results["n"]
    what = "mean Dice" if name == MEAN else f"Dice of {name.removeprefix('dice_')}"
    title = f"{what} on {n['images']} real images of {n['subjects']} held-out subjects"
    axis.set_title(title, loc="left", fontsize=10, color=INK, fontweight="bold")
    axis.legend(frameon=False, labelcolor=INK, fontsize=8)
    return figure


def draw_curve(
    axis: "Axes", choice: str, points: list[tuple[float, float, float, float]], shift: float
) -> None:
    places = [fraction * shift for fraction, *_ in points]
    means = [mean for _, mean, *_ in points]
    axis.plot(
        places, means, color=CHOICE_COLOURS[choice], marker=CHOICE_MARKS[choice], markersize=5, linewidth=1.7,
        label=CHOICE_LABELS[choice],
    )  # fmt: skip
    for place, (*_, low, high) in zip(places, points, strict=True):
        if math.isfinite(low) and math.isfinite(high):
            axis.plot([place, place], [low, high], color=CHOICE_COLOURS[choice], linewidth=3, alpha=0.35)


def write_learning_curves(path: Path, results: Mapping[str, Any]) -> None:
    """The chart as a PNG on white."""
    figure, buffer = learning_figure(results), io.BytesIO()
    figure.savefig(buffer, format="png", dpi=PNG_DOTS, facecolor="white")
    with replacing(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def utility_section(results: Mapping[str, Any]) -> Markup:
    """The chart, the table that it is drawn from, and what must be read with them."""
    lines = next(utility_lines(results))
    text = (
        "Segmenters were trained on real images, on synthetic ones of the same subjects and maps, and on "
        "both; each was tested on the real images of held-out subjects. Bars are intervals over these."
    )
    svg = to_svg(learning_figure(results))
    warned = [element("div", line, class_="note") for line in results.get("warnings", ())]
    told = chart(svg, f"Learning curves: {lines.title}")
    numbers = table(lines.head, lines.rows, caption=lines.title)
    return section("Use as training data", paragraph(text), told, numbers, *warned, anchor="utility")
