"""Formats results as tables for the terminal. The HTML page uses the same formatting."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from medldm.metrics.catalogue import OF_CLASSES, better

STAR = "* on other images than `generated`: see the table of the same images"


class Lines(NamedTuple):
    """A table as plain text, for the terminal and the page alike."""

    title: str
    head: list[str]
    rows: list[list[str]]


def number(value: float | str | None) -> str:
    """Four significant digits; 'inf' stays, nothing becomes a dash."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else f"{value:.4g}"


def brief(value: float | str | None) -> str:
    """Three significant digits, for tables with many columns."""
    return value if isinstance(value, str) else "-" if value is None else f"{value:#.3g}".rstrip(".")


def cell(score: Mapping | None, *, interval: bool = True, row_n: int | None = None) -> str:
    """'0.612 [0.580, 0.640]', with the interval where there is one and it is wanted; with '(n = 12)' where
    the metric has a value on other than the `row_n` images of its row.
    """
    if score is None:
        return "-"
    ends = score.get("ci95") if interval else None
    text = brief(score.get("mean"))
    text = f"{text} [{brief(ends[0])}, {brief(ends[1])}]" if ends else text
    return text + ("" if row_n is None or score["n"] == row_n else f" (n = {score['n']})")


def row_facts(results: Mapping, row: str) -> Mapping:
    """n, num_subjects and same_as_generated of a row; of an older metrics.json no more than the n of its
    metrics.
    """
    known = results.get("cases", {}).get("rows", {}).get(row)
    if known is not None:
        return known
    scores = results["rows"][row].values()
    n, subjects = (max((score[key] for score in scores), default=0) for key in ("n", "num_subjects"))
    return {"n": n, "num_subjects": subjects, "same_as_generated": n == results["n"]["images"]}


def row_sizes(results: Mapping, row: str) -> str:
    """'65 (4)': images and subjects, with a star where they are others than those of `generated`."""
    facts = row_facts(results, row)
    return f"{facts['n']} ({facts['num_subjects']})" + ("" if facts["same_as_generated"] else " *")


def metric_names(rows: Mapping[str, Mapping]) -> list[str]:
    """Metrics in the order of the table: paired ones, then edges."""
    names = dict.fromkeys(name for scores in rows.values() for name in scores)
    return sorted(
        (name for name in names if name != "diversity_rmse"), key=lambda name: name.startswith("edge")
    )


def main_table(results: Mapping) -> Table:
    """One line for each metric: the generated images with their interval, then the mean of every
    other row.
    """
    n, rows = results["n"], results["rows"]
    others = any(not row_facts(results, row)["same_as_generated"] for row in rows)
    table = Table(
        title=f"{n['images']} images of {n['subjects']} subjects, 95% interval over subjects",
        caption=STAR if others else None,
        box=SIMPLE,
    )
    table.add_column("metric", no_wrap=True)
    for row in rows:
        table.add_column(row.replace("_", " "), justify="right", no_wrap=row == "generated")
    table.add_row("images (subjects)", *(row_sizes(results, row) for row in rows))
    for name in metric_names(rows):
        cells = (
            cell(scores.get(name), interval=row == "generated", row_n=row_facts(results, row)["n"])
            for row, scores in rows.items()
        )
        table.add_row(f"{name} ({better(name)})", *cells)
    return table


def distribution_table(results: Mapping) -> Table:
    """One line for each distance between sets and one column for each set, with n beside the number."""
    rows = results["distribution"]
    table = Table(title="distance between sets of images (n)", box=SIMPLE)
    table.add_column("metric", no_wrap=True)
    for row in rows:
        table.add_column(row.replace("_", " "), justify="right")
    for name in dict.fromkeys(name for scores in rows.values() for name in scores):
        scores = [row.get(name) for row in rows.values()]
        cells = (f"{brief(s['value'])} ({set_sizes(s)}{tested(s)})" if s else "-" for s in scores)
        table.add_row(f"{name} ({better(name)})", *cells)
    return table


def set_sizes(score: Mapping) -> str:
    """'65', or '34 against 31' where the sets differ in number."""
    n, other = score["n"], score["n_reference"]
    return str(n) if n == other else f"{n} against {other}"


def tested(score: Mapping) -> str:
    """', p = 0.001' where a permutation test was made."""
    return f", p = {score['p_value']:.2g}" if "p_value" in score else ""


def by_n_lines(results: Mapping) -> Iterator[Lines]:
    """The values of Frechet distances for fewer images, which show their bias, beside those of real
    images.
    """
    rows = []
    for row in ("generated", "generated_halves", "real_halves"):
        for name, score in results["distribution"].get(row, {}).items():
            if score.get("by_n"):
                parts = [f"{brief(value)} ({n})" for n, value in score["by_n"].items()]
                rows.append([name, row.replace("_", " "), *parts, f"{brief(score['value'])} ({score['n']})"])
    widest = max((len(row) for row in rows), default=0)
    rows = [[*row[:2], *["-"] * (widest - len(row)), *row[2:]] for row in rows]
    if rows:
        head = ["metric", "row", *["of fewer images (n)"] * (widest - 3), "of all (n)"]
        yield Lines("Frechet distances fall as n grows: compare at equal n only", head, sorted(rows))


def same_images_lines(results: Mapping) -> Iterator[Lines]:
    """A row that is on some of the images only, and the generated ones on the same images."""
    for row, beside in results.get("generated_beside", {}).items():
        scores, facts = results["rows"][row], row_facts(results, row)
        names = [name for name in metric_names({row: scores}) if name in beside]
        lines = [
            [name, cell(scores[name], row_n=facts["n"]), cell(beside[name], row_n=facts["n"])]
            for name in names
        ]
        title = (
            f"the {facts['n']} images ({facts['num_subjects']} subjects) that {row.replace('_', ' ')} is on"
        )
        yield Lines(title, ["metric", row.replace("_", " "), "generated"], lines)


def deviation_cell(score: Mapping | None) -> str:
    """'27.1 +- 0.8': mean and standard deviation over images."""
    if score is None or score.get("mean") is None:
        return "-"
    spread = score.get("std")
    return brief(score["mean"]) + (f" +- {brief(spread)}" if spread is not None else "")


def others_than(score: Mapping | None, n: int) -> str:
    """' (n = 2)' where a metric has a value on other than `n` images."""
    return "" if score is None or score["n"] == n else f" (n = {score['n']})"


def counted_cell(score: Mapping | None) -> str:
    return deviation_cell(score) + ("" if score is None or score.get("mean") is None else f" ({score['n']})")


def translation_lines(results: Mapping) -> Iterator[Lines]:
    """Tables of sources by targets, one for each metric of the whole box; then every pair and row with all
    metrics.
    """
    pairs = results["groups"].get("pair", {})
    names = metric_names({"generated": results["rows"]["generated"]})
    if not pairs:
        return
    ends = [pair.split(" to ") for pair in pairs]
    sources, targets = (list(dict.fromkeys(end[k] for end in ends)) for k in (0, 1))
    for name in (name for name in names if name in ("psnr", "nmse_energy", "ssim_gaussian")):
        scores = {tuple(pair.split(" to ")): rows["generated"].get(name) for pair, rows in pairs.items()}
        rows = [[s, *(counted_cell(scores.get((s, t))) for t in targets)] for s in sources]
        yield Lines(f"{name} (n), generated: source (line) to target (column)", ["", *targets], rows)
    rows = []
    for pair, table in pairs.items():
        for row, scores in table.items():
            n = max(score["n"] for score in scores.values())
            if n:
                cells = [
                    deviation_cell(scores.get(name)) + others_than(scores.get(name), n) for name in names
                ]
                rows.append([pair, row.replace("_", " "), str(n), *cells])
    yield Lines("mean +- standard deviation over volumes", ["pair", "row", "n", *names], rows)


def text_table(lines: Lines) -> Table:
    table = Table(title=lines.title, box=SIMPLE)
    for i, name in enumerate(lines.head):
        table.add_column(name, justify="right" if i else "left", no_wrap=i < 2)
    for row in lines.rows:
        table.add_row(*row)
    return table


def print_tables(tables: Iterable[Table | Lines], notes: Iterable[str]) -> None:
    """Print tables, and one line for each note, as wide as the terminal or as a log file can bear."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    for table in tables:
        console.print(text_table(table) if isinstance(table, Lines) else table)
    for line in notes:
        console.print(f"note: {line}", markup=False, highlight=False, soft_wrap=True)


def dice_lines(results: Mapping) -> Iterator[Lines]:
    """What a segmenter reads in generated images over what it reads in real ones, class by class."""
    ratios = results.get("dice_ratio") or {}
    if not ratios:
        return
    rows = [
        [name, *(dice_mean(results, ratio, row, name) for row in ("real", "generated")), cell(ratio)]
        + [f"{ratio['n']} ({ratio['num_subjects']})"]
        for name, ratio in ratios.items()
    ]
    title = "Dice of the segmenter, on images where both real and generated have the class"
    yield Lines(title, ["class", "real", "generated", "ratio", "n (subjects)"], rows)


def obeys_lines(results: Mapping) -> Iterator[Lines]:
    """Does the image show what was asked for? Between the ceiling that real images reach and the floor of
    images that were made for another map.
    """
    rows = results["rows"]
    families = tuple(f"{name}_" for name in (*OF_CLASSES, "edge_f1"))
    names = [name for name in rows["generated"] if name.startswith(families)]
    columns = ("real", "generated", "shuffled")
    lines = [
        [f"{name} ({better(name)})"]
        + [cell(rows.get(row, {}).get(name), row_n=row_facts(results, "generated")["n"]) for row in columns]
        for name in names
    ]
    if any(name.startswith("dice_") for name in names):
        head = ["measure", "real: ceiling", "generated", "made for another subject: floor"]
        yield Lines("Does it obey? What is found in the image against what was asked for", head, lines)


def dice_mean(results: Mapping, ratio: Mapping, row: str, name: str) -> str:
    """The mean that the ratio divides; an older metrics.json has the row's alone."""
    return brief(ratio[row]) if row in ratio else cell(results["rows"][row].get(name))


def diversity_lines(results: Mapping) -> Iterator[Lines]:
    """MS-SSIM between images of one set: near the real one's where a generator is as diverse."""
    found = results.get("diversity") or {}
    rows = [
        [row, deviation_cell(s), str(s["n_pairs"]), str(s.get("num_subjects", "-"))]
        for row, s in found.get("ms_ssim", {}).items()
    ]
    if rows:
        title = f"MS-SSIM between images of one set, {found['num_scales']} scales (higher: more alike)"
        yield Lines(title, ["set", "mean +- deviation over pairs", "pairs", "subjects"], rows)


LINES = (by_n_lines, same_images_lines, obeys_lines, dice_lines, diversity_lines, translation_lines)


def group_size(scores: Mapping[str, Mapping]) -> tuple[int, int]:
    """Images and subjects of a group: those with a value and those without."""
    n = max(score["n"] + score["num_excluded"] for score in scores.values())
    return n, max(score["num_subjects"] for score in scores.values())


def group_tables(results: Mapping) -> Iterator[Table]:
    """One table for each group: the generated images by view, phase, label and third of the stack."""
    names = metric_names({"generated": results["rows"]["generated"]})
    groups = results["groups"]
    for group, tables in groups.items():
        if group == "pair" or (group == "label" and "pair" in groups):
            continue  # translation_lines says it
        table = Table(title=f"generated, by {group.replace('_', ' ')}", box=SIMPLE)
        table.add_column("metric", no_wrap=True)
        for label, rows in tables.items():
            n, subjects = group_size(rows["generated"])
            table.add_column(f"{label} (n = {n} of {subjects} subjects)", justify="right")
        for name in names:
            found = [rows["generated"] for rows in tables.values()]
            table.add_row(name, *(cell(scores.get(name), row_n=group_size(scores)[0]) for scores in found))
        yield table


def condition_lines(results: Mapping) -> list[str]:
    """What the images were made from; an older metrics.json tells of edges alone."""
    condition = results["condition"]
    return condition.get("lines", [condition["note"]] * (condition["edges_from_test_image"] is not None))


def notes_of(results: Mapping) -> Iterator[str]:
    """What must be read with the numbers: missing weights, small n, where the condition came from."""
    whys: dict[str, list[str]] = {}
    for name, facts in results["networks"].items():
        if "missing" in facts:
            whys.setdefault(facts["missing"], []).append(name)
    for why, (*names, last) in whys.items():
        yield f"{', '.join(names)}{' and ' if names else ''}{last} left out: {why}"
    yield from results["warnings"]
    if missing := results.get("diversity", {}).get("missing"):
        yield missing
    yield from memorization_lines(results["memorization"])
    yield from (f"condition: {line}" for line in condition_lines(results))


FEATURE_AUDITS = {
    "perceptual_audit": ("LPIPS", "this finds mirrored copies, and few that are noisy or re-windowed"),
    "inception_audit": ("Inception", "this looks for copies as they are, not for mirrored or shifted ones"),
}


def memorization_lines(memorization: Mapping) -> Iterator[str]:
    """Whether generated images repeat training images; nothing where no training images were given."""
    if memorization:
        share, near = memorization["memorized_share"], memorization["quantile"]
        yield (
            f"{share:.1%} of the generated images lie as near to a training image as the nearest {near:.0%} "
            f"of the real ones (n = {memorization['n']} and {memorization['n_real']})"
        )
    if audit := memorization.get("audit") if memorization else None:
        names = ", ".join(f"{pair['id']} {pair['correlation']:.3f}" for pair in memorization["closest"])
        yield (
            f"{audit['num_copies']} of {audit['num_images']} generated images correlate with a training one "
            f"(as it is, mirrored or shifted) more than all {audit['num_real']} real ones do, above "
            f"{audit['threshold']:.3f}; by chance an image does so at a rate of "
            f"{audit['false_positive_rate']:.2g}; the closest are {names}"
        )
    for key, (network, finds) in FEATURE_AUDITS.items():
        if audit := memorization.get(key) if memorization else None:
            yield (
                f"in the features of {network} {audit['num_copies']} of {audit['num_images']} generated "
                f"images lie nearer to a training one than all {audit['num_real']} real ones do, below "
                f"{audit['threshold']:.3g}; {finds}"
            )
