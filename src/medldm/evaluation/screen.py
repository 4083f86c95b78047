"""The results as rich tables: what one reads in a terminal. The same formatting serves the HTML page."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

from rich.box import SIMPLE
from rich.table import Table

MARKS = {"nearest_train_rmse": "as real"}  # where neither end is the better one


def number(value: float | str | None) -> str:
    """Four significant digits; 'inf' stays, nothing becomes a dash."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"


def brief(value: float | str | None) -> str:
    """Three significant digits, for tables with many columns."""
    return value if isinstance(value, str) else "-" if value is None else f"{value:#.3g}".rstrip(".")


def cell(score: Mapping | None, *, interval: bool = True) -> str:
    """'0.612 [0.580, 0.640]', with the interval where there is one and it is wanted."""
    if score is None:
        return "-"
    ends = score.get("ci95") if interval else None
    text = brief(score.get("mean"))
    return f"{text} [{brief(ends[0])}, {brief(ends[1])}]" if ends else text


def metric_names(rows: Mapping[str, Mapping]) -> list[str]:
    """Metrics in the order of the table: paired ones, then edges."""
    names = dict.fromkeys(name for scores in rows.values() for name in scores)
    return sorted(
        (name for name in names if name != "diversity_rmse"), key=lambda name: name.startswith("edge")
    )


def main_table(results: Mapping) -> Table:
    """A line a metric: the generated images with their interval, then every other row's mean."""
    n, rows = results["n"], results["rows"]
    table = Table(
        title=f"{n['images']} images of {n['subjects']} subjects, 95% interval over subjects", box=SIMPLE
    )
    table.add_column("metric", no_wrap=True)
    for row in rows:
        table.add_column(row.replace("_", " "), justify="right", no_wrap=row == "generated")
    for name in metric_names(rows):
        mark = "higher" if name in results["higher_is_better"] else MARKS.get(name, "lower")
        cells = (cell(scores.get(name), interval=row == "generated") for row, scores in rows.items())
        table.add_row(f"{name} ({mark})", *cells)
    return table


def distribution_table(results: Mapping) -> Table:
    """A line a distance between sets, a column a set; n beside the number."""
    rows = results["distribution"]
    table = Table(title="distance between sets of images (n)", box=SIMPLE)
    table.add_column("metric", no_wrap=True)
    for row in rows:
        table.add_column(row.replace("_", " "), justify="right")
    for name in dict.fromkeys(name for scores in rows.values() for name in scores):
        scores = [row.get(name) for row in rows.values()]
        table.add_row(name, *(f"{brief(s['value'])} ({s['n']})" if s else "-" for s in scores))
    return table


class Lines(NamedTuple):
    """A table as plain text, for the terminal and the page alike."""

    title: str
    head: list[str]
    rows: list[list[str]]


def deviation_cell(score: Mapping | None) -> str:
    """'27.1 +- 0.8': mean and standard deviation over subjects."""
    if score is None or score.get("mean") is None:
        return "-"
    spread = score.get("std")
    return brief(score["mean"]) + (f" +- {brief(spread)}" if spread is not None else "")


def translation_lines(results: Mapping) -> Iterator[Lines]:
    """Source by target, a table a metric of the whole box; then every pair and row with all metrics."""
    pairs = results["groups"].get("pair", {})
    names = metric_names({"generated": results["rows"]["generated"]})
    if not pairs:
        return
    ends = [pair.split(" to ") for pair in pairs]
    sources, targets = (list(dict.fromkeys(end[k] for end in ends)) for k in (0, 1))
    for name in (name for name in names if name in ("psnr", "nmse_energy", "ssim_gaussian")):
        scores = {tuple(pair.split(" to ")): rows["generated"].get(name) for pair, rows in pairs.items()}
        rows = [[s, *(deviation_cell(scores.get((s, t))) for t in targets)] for s in sources]
        yield Lines(f"{name}, generated: source (line) to target (column)", ["", *targets], rows)
    rows = [
        [pair, row.replace("_", " "), str(max(score["n"] for score in scores.values()))]
        + [deviation_cell(scores.get(name)) for name in names]
        for pair, table in pairs.items()
        for row, scores in table.items()
        if any(score["n"] for score in scores.values())
    ]
    yield Lines("mean +- standard deviation over subjects", ["pair", "row", "n", *names], rows)


def text_table(lines: Lines) -> Table:
    table = Table(title=lines.title, box=SIMPLE)
    for i, name in enumerate(lines.head):
        table.add_column(name, justify="right" if i else "left", no_wrap=i < 2)
    for row in lines.rows:
        table.add_row(*row)
    return table


def dice_lines(results: Mapping) -> Iterator[Lines]:
    """What a segmenter reads in generated images over what it reads in real ones, class by class."""
    ratios = results.get("dice_ratio") or {}
    if not ratios:
        return
    rows = [
        [name, *(cell(results["rows"][row].get(name)) for row in ("real", "generated")), cell(ratio)]
        + [str(ratio["n"])]
        for name, ratio in ratios.items()
    ]
    yield Lines("Dice of the segmenter", ["class", "real", "generated", "ratio", "n"], rows)


def diversity_lines(results: Mapping) -> Iterator[Lines]:
    """MS-SSIM between images of one set: near the real one's where a generator is as diverse."""
    found = results.get("diversity") or {}
    rows = [[row, deviation_cell(s), str(s["n_pairs"])] for row, s in found.get("ms_ssim", {}).items()]
    if rows:
        title = f"MS-SSIM between images of one set, {found['num_scales']} scales (higher: more alike)"
        yield Lines(title, ["set", "mean +- deviation over pairs", "pairs"], rows)


def group_tables(results: Mapping) -> Iterator[Table]:
    """One table a group: the generated images by view, phase, label and slice third."""
    names = metric_names({"generated": results["rows"]["generated"]})
    groups = results["groups"]
    for group, tables in groups.items():
        if group == "pair" or (group == "label" and "pair" in groups):
            continue  # translation_lines says it
        table = Table(title=f"generated, by {group.replace('_', ' ')}", box=SIMPLE)
        table.add_column("metric", no_wrap=True)
        for label, rows in tables.items():
            table.add_column(f"{label} (n = {rows['generated'][names[0]]['n']})", justify="right")
        for name in names:
            table.add_row(name, *(cell(rows["generated"].get(name)) for rows in tables.values()))
        yield table


def notes(results: Mapping) -> Iterator[str]:
    """What must be read with the numbers: missing weights, small n, where the condition came from."""
    whys: dict[str, list[str]] = {}
    for name, facts in results["networks"].items():
        if "missing" in facts:
            whys.setdefault(facts["missing"], []).append(name)
    yield from (f"{' and '.join(names)} left out: {why}" for why, names in whys.items())
    yield from results["warnings"]
    if memorization := results["memorization"]:
        share, near = memorization["memorized_share"], memorization["quantile"]
        yield (
            f"{share:.1%} of the generated images lie as near to a training image as the nearest {near:.0%} "
            "of the real ones"
        )
    if results["condition"]["edges_from_test_image"] is not None:
        yield f"condition: {results['condition']['note']}"
