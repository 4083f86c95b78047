"""How the scores fall as the edges of the condition get rougher: several evaluations, one line a level."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from medldm.errors import InputError
from medldm.evaluation.screen import brief, cell
from medldm.reporting.charts import level_chart
from medldm.reporting.page import element, escape, page, section, table

METRICS = ("ssim", "nmse_var", "psnr", "edge_f1_1px", "edge_f1_2px")
NOTE = (
    "Level: the roughness of the condition's edges, 0 as detected, 1 the worst of data.edge_degrade; "
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


Series = dict[str, dict[float | str, Mapping]]  # model -> level -> scores


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
        levels[level_of(results)] = results["rows"]["generated"]
    names = short_names(list(series))
    ordered = {}
    for model, levels in series.items():
        order = sorted(levels, key=lambda level: (isinstance(level, str), level))
        ordered[names[model]] = {level: levels[level] for level in order}
    return ordered


def short_names(models: Sequence[str]) -> dict[str, str]:
    """What tells paths of checkpoints apart: without the folders that all begin and end with."""
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
    return [name for name in METRICS if any(name in s for levels in series.values() for s in levels.values())]


def lines_of(series: Series) -> list[list[str]]:
    names = found_metrics(series)
    return [
        [
            model,
            level if isinstance(level, str) else brief(level),
            *(cell(scores.get(name)) for name in names),
        ]
        for model, levels in series.items()
        for level, scores in levels.items()
    ]


def to_markdown(evaluations: Sequence[Mapping]) -> str:
    series = by_model(evaluations)
    head = ["checkpoint", "level", *found_metrics(series)]
    rows = [head, ["---"] * len(head), *lines_of(series)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + f"\n\n{NOTE}\n"


def to_html(evaluations: Sequence[Mapping], folders: Sequence[str], subtitle: str) -> str:
    series = by_model(evaluations)
    charts = [level_chart(name, series) for name in found_metrics(series)]
    cards = element("div", "".join(element("div", c, class_="card") for c in charts), class_="charts")
    head = ["checkpoint", "level", *found_metrics(series)]
    body = table(head, [[escape(text) for text in line] for line in lines_of(series)], caption=NOTE)
    made = element("ul", "".join(element("li", element("code", escape(folder))) for folder in folders))
    content = section("Scores by roughness", cards, body, anchor="levels")
    content += section("Evaluations", made, anchor="evaluations")
    return page("Rough edges", subtitle, [("levels", "Scores by roughness")], content)
