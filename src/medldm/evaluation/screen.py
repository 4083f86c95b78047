"""The results as rich tables: what one reads in a terminal. The same formatting serves the HTML page."""

from collections.abc import Iterator, Mapping

from rich.table import Table


def number(value: float | str | None) -> str:
    """Four significant digits; 'inf' stays, nothing becomes a dash."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"


def cell(score: Mapping | None) -> str:
    """'0.612 [0.58, 0.64]', with the interval where there is one."""
    if score is None:
        return "-"
    interval = score.get("ci95")
    text = number(score.get("mean"))
    return f"{text} [{number(interval[0])}, {number(interval[1])}]" if interval else text


def metric_names(rows: Mapping[str, Mapping]) -> list[str]:
    return list(
        dict.fromkeys(name for scores in rows.values() for name in scores if name != "diversity_rmse")
    )


def main_table(results: Mapping) -> Table:
    n = results["n"]
    table = Table(
        title=f"n = {n['images']} images of {n['subjects']} subjects; mean [95% interval over subjects]"
    )
    table.add_column("row", no_wrap=True)
    names = metric_names(results["rows"])
    for name in names:
        table.add_column(name, justify="right")
    for row, scores in results["rows"].items():
        table.add_row(row, *(cell(scores.get(name)) for name in names))
    return table


def distribution_table(results: Mapping) -> Table:
    """Set against set; a metric without its network says which file is missing."""
    table = Table(title="sets of images")
    for title in ("metric", "row", "value", "n", "n real"):
        table.add_column(title, justify="right" if title in ("value", "n", "n real") else "left")
    for name, facts in results["networks"].items():
        if "missing" in facts:
            table.add_row(name, "missing", facts["missing"], "", "")
            continue
        for row, scores in results["distribution"].items():
            if name in scores:
                score = scores[name]
                table.add_row(name, row, number(score["value"]), str(score["n"]), str(score["n_reference"]))
    return table


def group_tables(results: Mapping) -> Iterator[Table]:
    """One table a group: the generated images by view, phase and slice third."""
    names = metric_names({"generated": results["rows"]["generated"]})
    for group, tables in results["groups"].items():
        table = Table(title=f"generated, by {group}")
        for title in (group, "n", *names):
            table.add_column(title, justify="left" if title == group else "right")
        for label, rows in tables.items():
            scores = rows["generated"]
            table.add_row(label, str(scores[names[0]]["n"]), *(cell(scores.get(name)) for name in names))
        yield table
