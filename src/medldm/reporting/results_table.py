"""Several evaluations as one table with the columns in which Med-LSDM was published."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from medldm.evaluation.screen import brief, cell
from medldm.reporting.page import element, joined_markup, page, paragraph, section, table

# column -> (where in metrics.json, names that may fill it: the first there is)
COLUMNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "FID": ("distribution", ("fid_slices", "fid")),
    "3D-FID": ("distribution", ("fid_3d",)),
    "LPIPS": ("rows", ("lpips_slices", "lpips")),
    "SSIM": ("rows", ("ssim_gaussian", "ssim")),
    "RMSE": ("rows", ("rmse",)),
    "PSNR": ("rows", ("psnr",)),
}
HEAD = ["Dataset", "Decoder", "#channels", "n", *COLUMNS]
UNITS_NOTE = (
    "FID: Inception on axial slices. 3D-FID: MedicalNet ResNet-50 on whole volumes. LPIPS: mean over axial "
    "slices. SSIM: Gaussian window 11 in 3D, sigma 1.5, range 1. RMSE on [0, 1] (twice that on [-1, 1]). "
    "PSNR in dB, range 1 on [0, 1]. Means over volumes, 95% intervals over subjects; FID and 3D-FID with n."
)


class Line(NamedTuple):
    """One line of the table of results."""

    cells: list[str]
    missing: dict[str, str]  # column -> why there is no number


def describe_model(results: Mapping) -> list[str]:
    """Dataset, decoder and condition channels of one evaluation, from the samples' provenance."""
    made = results.get("provenance", {}).get("generated", {})
    channels = made.get("condition_channels")
    named = [results.get("dataset"), made.get("decoder"), "-" if channels is None else channels]
    return ["?" if value is None else str(value) for value in named]


def find_score(results: Mapping, column: str) -> tuple[str | None, str]:
    """(cell, why there is none) of one column."""
    place, names = COLUMNS[column]
    scores = results[place].get("generated", {})
    for name in names:
        if name in scores:
            score = scores[name]
            return (f"{brief(score['value'])} ({score['n']})" if place == "distribution" else cell(score)), ""
    networks = results["networks"]
    reasons = [networks[name]["missing"] for name in names if "missing" in networks.get(name, {})]
    if reasons:
        return None, reasons[0]
    few = place == "distribution" and any(name in networks for name in names)
    return None, "fewer than two images" if few else "not measured; metrics=synthesis_3d measures it"


def table_lines(evaluations: Sequence[Mapping]) -> list[Line]:
    lines = []
    for results in evaluations:
        found = {column: find_score(results, column) for column in COLUMNS}
        cells = [*describe_model(results), str(results["n"]["images"])]
        cells += ["missing" if text is None else text for text, _ in found.values()]
        lines.append(Line(cells, {column: why for column, (_, why) in found.items() if why}))
    return lines


def notes(evaluations: Sequence[Mapping], lines: Sequence[Line]) -> list[str]:
    """Units, then every reason for a missing number once, then warnings (small n)."""
    whys: dict[str, list[str]] = {}
    for line in lines:
        for column, why in line.missing.items():
            whys.setdefault(why, []).append(column)
    missing = [f"{', '.join(dict.fromkeys(columns))} missing: {why}" for why, columns in whys.items()]
    warnings = dict.fromkeys(text for results in evaluations for text in results["warnings"])
    return [UNITS_NOTE, *missing, *warnings]


def to_markdown(evaluations: Sequence[Mapping]) -> str:
    lines = table_lines(evaluations)
    rows = [HEAD, ["---"] * len(HEAD), *(line.cells for line in lines)]
    body = "\n".join(f"| {' | '.join(text.replace('|', '/') for text in row)} |" for row in rows)
    return body + "\n\n" + "\n".join(f"- {note}" for note in notes(evaluations, lines)) + "\n"


def to_html(evaluations: Sequence[Mapping], folders: Sequence[str], subtitle: str) -> str:
    lines = table_lines(evaluations)
    body = table(HEAD, [line.cells for line in lines], caption="A line an evaluation")
    first, *others = notes(evaluations, lines)
    warned = joined_markup(element("div", note, class_="note") for note in others)
    made = element("ul", joined_markup(element("li", element("code", folder)) for folder in folders))
    content = section("Results", body, paragraph(first, class_="dim"), warned, anchor="results")
    content += section("Evaluations, in the order of the lines", made, anchor="evaluations")
    return page("Med-LSDM results", subtitle, [("results", "Results")], content)
