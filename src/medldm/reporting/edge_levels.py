"""How the scores fall as the edges of the condition get rougher: several evaluations, with one line for each
level.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from medldm.errors import InputError
from medldm.evaluation.screen import brief, cell, row_facts
from medldm.reporting.charts import level_chart
from medldm.reporting.page import chart, element, joined_markup, page, section, table

LEVEL_HEAD = ("checkpoint", "level", "images (subjects)")
LEVEL_METRICS = ("ssim", "nmse_var", "psnr", "edge_f1_1px", "edge_f1_2px")
LEVEL_NOTE = (
    "EdgeLevel: the roughness of the condition's edges, 0 as detected, 1 the worst of data.edge_degrade; "
    "contours: those of the class map alone. Edge F1 compares the edges found in the sample with the edges "
    "that it was given. Means over images, 95% intervals over subjects."
)


def made_by(results: Mapping) -> Mapping:
    made = results.get("provenance", {}).get("generated", {})
    if not {"checkpoint", "edge_level"} <= made.keys():
        raise InputError(
            f"evaluation: the images of {results['folders']['generated']} have no provenance.json of `medldm "
            "sample`, so their edge_level is not known"
        )
    return made


def level_of(results: Mapping) -> float | str:
    level = made_by(results)["edge_level"]
    return 0.0 if level is None else level if isinstance(level, str) else float(level)


def model_of(results: Mapping) -> str:
    """The checkpoint, and what it was not told."""
    made = made_by(results)
    dropped = "".join(f" without {name}" for name in made.get("dropped") or ())
    return f"{made['checkpoint']}{dropped}"


class EdgeLevel(NamedTuple):
    """The scores of a model at one roughness, on how many images of how many subjects."""

    scores: Mapping
    num_images: int
    num_subjects: int


Series = dict[str, dict[float | str, EdgeLevel]]  # model -> level


def by_model(evaluations: Sequence[Mapping]) -> Series:
    """Levels in order, contours last. InputError where one level of a model stands twice, or a model was
    sampled in several ways.
    """
    series: Series = {}
    samplers: dict[str, object] = {}
    for results in evaluations:
        sampler = made_by(results).get("sampler")
        if samplers.setdefault(model_of(results), sampler) != sampler:
            raise InputError(f"evaluation: {model_of(results)} was sampled with several samplers; take one")
        levels = series.setdefault(model_of(results), {})
        if level_of(results) in levels:
            raise InputError(
                f"evaluation: two of them are of {model_of(results)} at edge_level={level_of(results)}; "
                "name each once"
            )
        facts = row_facts(results, "generated")
        scores = results["rows"]["generated"]
        levels[level_of(results)] = EdgeLevel(scores, facts["n"], facts["num_subjects"])
    names = short_names(list(series))
    ordered = {}
    for model, levels in series.items():
        order = sorted(levels, key=lambda level: (isinstance(level, str), level))
        ordered[names[model]] = {level: levels[level] for level in order}
    return ordered


def short_names(models: Sequence[str]) -> dict[str, str]:
    """The part of each path of a checkpoint that tells it apart: without the folders with which all of them
    begin and end.
    """
    parts = {model: list(Path(model).parts) for model in models}
    for end in (-1, 0):
        while (
            len(models) > 1
            and min(map(len, parts.values())) > 1
            and len({p[end] for p in parts.values()}) == 1
        ):
            for part in parts.values():
                part.pop(end)
    return {model: str(Path(*part)) for model, part in parts.items()}


def found_metrics(series: Series) -> list[str]:
    known = [level.scores for levels in series.values() for level in levels.values()]
    return [name for name in LEVEL_METRICS if any(name in scores for scores in known)]


def lines_of(series: Series) -> list[list[str]]:
    names = found_metrics(series)
    return [
        [
            model,
            level if isinstance(level, str) else brief(level),
            f"{found.num_images} ({found.num_subjects})",
            *(cell(found.scores.get(name), row_n=found.num_images) for name in names),
        ]
        for model, levels in series.items()
        for level, found in levels.items()
    ]


def to_markdown(evaluations: Sequence[Mapping]) -> str:
    series = by_model(evaluations)
    head = [*LEVEL_HEAD, *found_metrics(series)]
    rows = [head, ["---"] * len(head), *lines_of(series)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{LEVEL_NOTE}\n"


def to_html(evaluations: Sequence[Mapping], folders: Sequence[str], subtitle: str) -> str:
    series = by_model(evaluations)
    scores = {m: {at: found.scores for at, found in levels.items()} for m, levels in series.items()}
    names = found_metrics(series)
    charts = joined_markup(chart(level_chart(name, scores), f"{name} over the roughness") for name in names)
    cards = element("div", charts, class_="charts")
    head = [*LEVEL_HEAD, *names]
    body = table(head, lines_of(series), caption=LEVEL_NOTE)
    made = element("ul", joined_markup(element("li", element("code", folder)) for folder in folders))
    content = section("Scores by roughness", cards, body, anchor="levels")
    content += section("Evaluations", made, anchor="evaluations")
    return page("Rough edges", subtitle, [("levels", "Scores by roughness")], content)
