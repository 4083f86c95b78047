"""What the report says, section by section, from the files of runs and evaluations."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from medldm.evaluation.screen import (
    LINES,
    STAR,
    brief,
    condition_lines,
    group_size,
    memorization_lines,
    metric_names,
    number,
    row_facts,
    row_sizes,
    tested,
)
from medldm.metrics.catalogue import better
from medldm.reporting.charts import Curve, curve_chart, score_chart
from medldm.reporting.page import (
    chart,
    element,
    facts_list,
    folded,
    joined_markup,
    paragraph,
    picture,
    section,
    table,
    tiles,
)

# the first there is of each family
HEADLINES = (
    ("ssim", "ssim_gaussian"),
    ("nmse_var", "nmse_energy"),
    ("psnr",),
    ("edge_f1_2px",),
    ("dice_mean",),
)
HEADLINE_NAMES = {
    "ssim": "SSIM",
    "ssim_gaussian": "SSIM, Gaussian window",
    "nmse_energy": "NMSE (energy)",
    "dice_mean": "Dice of the segmenter",
    "nmse_var": "NMSE (var)",
    "psnr": "PSNR, dB",
    "edge_f1_2px": "edge F1, 2 px",
}
BASELINES = ("reconstruction", "spade", "regression", "identity", "mean_image", "random_real", "shuffled")
FID_NAMES = {"fid": "FID", "fid_3d": "3D-FID"}
MAX_STEPS_SHOWN = 7
UP, DOWN = "\u2191", "\u2193"


class RunFiles(NamedTuple):
    """What was read of one run folder."""

    path: str
    config: Mapping
    config_text: str
    columns: Mapping[str, Curve]  # of metrics.csv
    pictures: Mapping[str, bytes]  # file name -> PNG
    checkpoints: Mapping[str, int]  # file name -> bytes
    commands: Sequence[str] = ()  # lines of commands.txt


class EvaluationFiles(NamedTuple):
    """What a page shows of one evaluation."""

    path: str
    results: Mapping
    panels: Mapping[str, bytes]
    browser: Sequence[Mapping] = ()  # stacks of `evaluation.browsing.read_browser`
    strips: Mapping[str, bytes] = {}  # case -> steps of its denoising side by side
    closest: Mapping[str, bytes] = {}  # pictures of generated images beside their nearest training images


def score_cell(score: Mapping | None, row_n: int | None = None) -> str:
    """Mean with its interval below it, and n where it is not the `row_n` images of the row."""
    if score is None:
        return "-"
    interval = score.get("ci95")
    spread = f"{brief(interval[0])} to {brief(interval[1])}" if interval else ""
    parts = [spread, "" if row_n is None or score["n"] == row_n else f"n = {score['n']}"]
    below = ", ".join(filter(None, parts))
    return joined_markup([brief(score.get("mean")), element("small", below, class_="ci")])


def row_label(row: str) -> str:
    return row.replace("_", " ")


def headline_names(scores: Mapping) -> list[str]:
    found = (next((name for name in family if name in scores), None) for family in HEADLINES)
    return [name for name in found if name is not None]


def headline(results: Mapping) -> str:
    scores = results["rows"]["generated"]
    facts = [(HEADLINE_NAMES[name], number(scores[name]["mean"])) for name in headline_names(scores)]
    for name in ("fid", "fid_3d", "frechet_random_conv"):
        score = results["distribution"].get("generated", {}).get(name)
        if score:
            facts.append((f"{FID_NAMES.get(name, name)}, n = {score['n']}", number(score["value"])))
            break
    n = results["n"]
    whose = f"{n['subjects']} subject" + ("" if n["subjects"] == 1 else "s")
    return tiles([*facts, (f"images of {whose}", str(n["images"]))])


def scores_table(results: Mapping) -> str:
    """The table of means of every row, as HTML."""
    rows = results["rows"]
    names = metric_names(rows)
    n = results["n"]
    facts = (
        f"{n['images']} images of {n['subjects']} subjects",
        results["aggregation"],
        results["data_range"],
    )
    facts += (STAR,) if any(not row_facts(results, row)["same_as_generated"] for row in rows) else ()
    lines = [
        [
            row_label(row),
            row_sizes(results, row),
            *(score_cell(scores.get(name), row_facts(results, row)["n"]) for name in names),
        ]
        for row, scores in rows.items()
    ]
    arrows = [f"{name} {arrow(name)}" for name in names]
    head = ["", "images (subjects)", *arrows]
    return table(head, lines, caption=". ".join(facts) + ".", marked=["generated"])


def arrow(name: str) -> str:
    """Where the better end lies; some metrics have none."""
    return {"higher": UP, "lower": DOWN}.get(better(name), better(name))


def set_cell(score: Mapping | None) -> str:
    """A distance, its spread over subsets where there is one, and both n."""
    if score is None:
        return "-"
    spread = score.get("std_over_subsets")
    value = number(score["value"]) + (f" \u00b1 {brief(spread)}" if spread is not None else "")
    sizes = f"n = {score['n']} against {score['n_reference']}{tested(score)}"
    return joined_markup([value, element("small", sizes, class_="ci")])


def sets_table(results: Mapping) -> str:
    """Distribution metrics; a missing network says which file to put where."""
    distribution, networks = results["distribution"], results["networks"]
    names = [name for name in networks if any(name in scores for scores in distribution.values())]
    lines = [
        [row_label(row), *(set_cell(scores.get(name)) for name in names)]
        for row, scores in distribution.items()
    ]
    missing = {name: facts["missing"] for name, facts in networks.items() if "missing" in facts}
    notes = (element("div", f"{name}: {why}", class_="note") for name, why in missing.items())
    head = ["", *(f"{name} {arrow(name)}" for name in names)]
    body = table(head, lines, caption="Distances between sets of images", marked=["generated"])
    return body + joined_markup(notes)


def difference_table(results: Mapping) -> str:
    """Generated minus each baseline, paired by image."""
    names = [name for name in metric_names(results["rows"]) if name in results["rows"]["generated"]]
    rows = {row: scores for row, scores in results["differences"].items() if row in BASELINES}
    lines = [
        [
            row_label(row),
            row_sizes(results, row),
            *(score_cell(scores.get(name), row_facts(results, row)["n"]) for name in names),
        ]
        for row, scores in rows.items()
    ]
    caption = (
        "Generated minus the other row, image by image, on the images that the other row is on: an interval "
        "without zero is a real difference."
    )
    return table(["generated minus", "images (subjects)", *names], lines, caption=caption)


def group_table(group: str, tables: Mapping, results: Mapping) -> str:
    names = metric_names({"generated": results["rows"]["generated"]})
    lines = []
    for label, rows in tables.items():
        scores = rows["generated"]
        n, subjects = group_size(scores)
        cells = (score_cell(scores.get(name), n) for name in names)
        lines.append([label, f"{n} ({subjects})", *cells])
    return table([group.replace("_", " "), "images (subjects)", *names], lines)


def evaluation_section(evaluation: EvaluationFiles) -> str:
    """The section about the numbers of an evaluation, as HTML."""
    results = evaluation.results
    names = headline_names(results["rows"]["generated"])
    rows = {row: scores for row, scores in results["rows"].items() if row != "real"}
    drawn = chart(score_chart(rows, names), "Scores by row with intervals") if names else ""
    notes = list(results["warnings"])
    notes += [why] if (why := (results.get("diversity") or {}).get("missing")) else []
    notes = [f"Condition: {line}." for line in condition_lines(results)] + notes
    groups = [
        element("h3", f"By {group.replace('_', ' ')}") + group_table(group, tables, results)
        for group, tables in results["groups"].items()
        if group != "pair" and not (group == "label" and "pair" in results["groups"])
    ]
    parts = [
        table(lines.head, lines.rows, caption=lines.title) for tables in LINES for lines in tables(results)
    ]
    has_sets = results["distribution"] or any("missing" in facts for facts in results["networks"].values())
    has_baselines = any(row in BASELINES for row in results["differences"])
    return section(
        "Numbers",
        drawn,
        *parts,
        scores_table(results),
        *(element("div", note, class_="note") for note in notes),
        element("h3", "Against the baselines") + difference_table(results) if has_baselines else "",
        element("h3", "Sets of images") + sets_table(results) if has_sets else "",
        *groups,
        anchor="numbers",
    )


def panels_section(panels: Mapping[str, bytes], by: str) -> str:
    order = [name for name in ("best", "median", "worst") if name in panels]
    order += sorted(set(panels) - set(order))
    figures = joined_markup(picture(panels[name], f"{name} by {by}") for name in order)
    return section("Real and generated", element("div", figures, class_="stack"), anchor="panels")


def copies_section(evaluation: EvaluationFiles) -> Markup:
    """Whether the model repeats training images, and the closest pairs."""
    said = [paragraph(line) for line in memorization_lines(evaluation.results["memorization"])]
    pairs = evaluation.results["memorization"].get("closest", ())
    captions = {
        str(i): f"{pair['id']} (left) and training image {pair['train_id']}: correlation "
        f"{pair['correlation']:.3f}"
        for i, pair in enumerate(pairs)
        if "train_id" in pair
    }
    figures = joined_markup(
        picture(png, captions[name]) for name, png in evaluation.closest.items() if name in captions
    )
    return section(
        "Copies of training images", *said, element("div", figures, class_="pictures"), anchor="copies"
    )


def strips_section(strips: Mapping[str, bytes]) -> Markup:
    """Steps from noise to image of some cases."""
    figures = joined_markup(
        picture(png, f"{name}: from the first to the last step") for name, png in strips.items()
    )
    return section("Denoising", element("div", figures, class_="stack"), anchor="denoising")


def definitions_section(results: Mapping) -> str:
    rows = [[row_label(row), text] for row, text in results["row_definitions"].items()]
    metrics = [[name, text] for name, text in results["definitions"].items()]
    networks = [
        [name, f"{facts.get('network', '')}; sha256 {facts['sha256'][:16]}"]
        for name, facts in results["networks"].items()
        if "sha256" in facts
    ]
    lines = [[name, element("div", text, class_="text")] for name, text in rows + metrics + networks]
    return section(
        "What the numbers mean", table(["row or metric", "what it is"], lines), anchor="definitions"
    )


def curve_groups(columns: Mapping[str, Curve]) -> dict[str, dict[str, Curve]]:
    """`train/loss` and `val/loss` -> {"loss": {"train": ..., "val": ...}}."""
    groups: dict[str, dict[str, Curve]] = {}
    for column, curve in sorted(columns.items()):
        part, _, name = column.rpartition("/")
        if name in ("epoch", "step") or not len(curve.values):
            continue
        groups.setdefault(re.sub(r"_(step|epoch)$", "", name), {})[part] = curve
    return dict(sorted(groups.items(), key=lambda item: ("loss" not in item[0], item[0])))


def evenly_chosen(names: Sequence[str], num: int) -> list[str]:
    """`num` of the names, evenly, the first and the last among them."""
    index = np.linspace(0, len(names) - 1, num).round().astype(int)
    return [names[i] for i in sorted(set(index.tolist()))]


def chosen_pictures(names: Sequence[str]) -> dict[str, list[str]]:
    """Pictures by kind (the name less its numbers), spread over the training."""
    kinds: dict[str, list[str]] = {}
    for name in sorted(names, key=lambda name: [int(digits) for digits in re.findall(r"\d+", name)]):
        kinds.setdefault(re.sub(r"\d+", "", name).strip("_-. "), []).append(name)
    return {kind: evenly_chosen(found, MAX_STEPS_SHOWN) for kind, found in kinds.items()}


def caption_of(name: str) -> str:
    digits = re.findall(r"\d+", name)
    return f"step {int(digits[-1]):,}" if digits else name


def pictures_block(pictures: Mapping[str, bytes]) -> str:
    """The newest picture large, the way there small."""
    blocks = []
    for found in chosen_pictures(list(pictures)).values():
        newest = picture(pictures[found[-1]], f"newest: {caption_of(found[-1])}")
        earlier = joined_markup(picture(pictures[name], caption_of(name)) for name in found[:-1])
        blocks.append(element("div", newest, class_="stack") + element("div", earlier, class_="pictures"))
    return joined_markup(blocks)


def pick(config: Mapping, key: str) -> object:
    """`trainer.max_steps` of a nested config, None where it is not there."""
    value: object = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


RUN_FACTS = {
    "experiment": "experiment_name",
    "data": "data.root",
    "image size": "data.image_size",
    "batch size": "data.batch_size",
    "learning rate": "model.optimizer.lr",
    "max steps": "trainer.max_steps",
    "max epochs": "trainer.max_epochs",
    "precision": "trainer.precision",
    "seed": "seed",
}


def name_of_run(run: RunFiles) -> str:
    """Its experiment, or its folder's name where it has none."""
    stated = pick(run.config, "experiment_name")
    return Path(run.path).name if stated in (None, "default") else str(stated)


def run_section(run: RunFiles, number_of_run: int) -> str:
    """The section about one run: its facts, curves, pictures and config, as HTML."""
    facts = [("folder", run.path)]
    facts += [
        (name, pick(run.config, key)) for name, key in RUN_FACTS.items() if pick(run.config, key) is not None
    ]
    steps = [int(curve.steps.max()) for curve in run.columns.values() if len(curve.steps)]
    facts += [("last logged step", f"{max(steps):,}")] if steps else []
    facts += [(name, f"{size / 2**20:,.1f} MiB") for name, size in run.checkpoints.items()]
    charts = joined_markup(
        chart(curve_chart(name, curves), f"{name} over the steps")
        for name, curves in curve_groups(run.columns).items()
    )
    return section(
        f"Training: {name_of_run(run)}",
        facts_list(facts),
        element("div", charts, class_="charts") if charts else paragraph("No metrics.csv yet.", class_="dim"),
        element("h3", "Pictures over the training") if run.pictures else "",
        pictures_block(run.pictures),
        folded("whole config", run.config_text) if run.config_text else "",
        anchor=f"run{number_of_run}",
    )
