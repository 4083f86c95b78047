"""Composes pages about a chain of runs and its evaluation, and about two evaluations."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from medldm.evaluation.compare import comparison_lines
from medldm.reporting import sections
from medldm.reporting.browser import browser_section, merged
from medldm.reporting.learning_curves import utility_section
from medldm.reporting.page import element, folded, joined_markup, page, paragraph, section, table
from medldm.reporting.sections import EvaluationFiles, RunFiles

PROVENANCE = ("folders", "mean_image", "metrics", "seed", "software", "provenance")  # of metrics.json
COMPARED = (("A", "real"), ("B", "real"), ("A", "B"))
Block = tuple[str, str, Markup]  # anchor, title, content


def compose(
    runs: Sequence[RunFiles],
    evaluation: EvaluationFiles | None,
    command: str | None,
    utility: Mapping | None = None,
) -> str:
    """The whole page of runs as HTML; `utility` is the content of utility.json."""
    blocks = [*(evaluation_blocks(evaluation) if evaluation else ())]
    if utility:
        blocks.append(("utility", "Use as training data", utility_section(utility)))
    for i, run in enumerate(runs):
        title = f"Training: {sections.name_of_run(run)}"
        blocks.append((f"run{i}", title, sections.run_section(run, i)))
    if evaluation:
        meaning = sections.definitions_section(evaluation.results)
        blocks.append(("definitions", "What the numbers mean", meaning))
    blocks.append(("commands", "Commands", commands_section(runs, evaluation, command)))
    if evaluation:
        blocks.append(("provenance", "Provenance", provenance_section(evaluation.results)))
    names = [sections.name_of_run(run) for run in runs]
    top = sections.headline(evaluation.results) if evaluation else Markup("")
    return assemble(" + ".join(dict.fromkeys(names)), top, blocks)


def evaluation_blocks(evaluation: EvaluationFiles) -> Iterable[Block]:
    """The sections about the evaluated images, with their titles."""
    if evaluation.browser:
        yield "slices", "Slices", browser_section(evaluation.browser)
    if evaluation.panels:
        chosen_by = evaluation.results.get("panels_by", "nmse_var")
        yield "panels", "Real and generated", sections.panels_section(evaluation.panels, chosen_by)
    yield "numbers", "Numbers", sections.evaluation_section(evaluation)
    if evaluation.results.get("memorization"):
        yield "copies", "Copies of training images", sections.copies_section(evaluation)
    if evaluation.strips:
        yield "denoising", "Denoising", sections.strips_section(evaluation.strips)


def compose_comparison(
    comparison: Mapping, evaluations: Sequence[EvaluationFiles], command: str | None
) -> str:
    """The page of two evaluations of the same images as HTML."""
    tables = [table(lines.head, lines.rows, caption=lines.title) for lines in comparison_lines(comparison)]
    notes = [element("div", note, class_="note") for note in comparison["warnings"]]
    blocks: list[Block] = [("numbers", "Numbers", section("Numbers", *tables, *notes, anchor="numbers"))]
    stacks = merged(*(evaluation.browser for evaluation in evaluations))
    if stacks:
        blocks.append(("slices", "Slices", browser_section(stacks, COMPARED)))
    for letter, evaluation in zip("AB", evaluations, strict=True):
        anchor, title = f"evaluation{letter}", f"{letter}: {evaluation.path}"
        parts = [sections.headline(evaluation.results), sections.scores_table(evaluation.results)]
        blocks.append((anchor, title, section(title, *parts, anchor=anchor)))
    commands = [("report", command)]
    commands += [(e.path, line) for e in evaluations for _, line in evaluation_commands(e)]
    blocks.append(("commands", "Commands", commands_block(commands)))
    return assemble("A and B compared", Markup(""), blocks)


def compose_utility(utility: Mapping, command: str | None) -> str:
    """The page of learning curves alone as HTML."""
    commands = commands_block([("utility", utility.get("command")), ("report", command)])
    blocks = [
        ("utility", "Use as training data", utility_section(utility)),
        ("commands", "Commands", commands),
    ]
    return assemble("Learning curves", Markup(""), blocks)


def assemble(title: str, top: str, blocks: Iterable[Block]) -> str:
    found = list(blocks)
    links = [(anchor, text) for anchor, text, _ in found]
    return page(title, written_now(), links, joined_markup([top, *(content for *_, content in found)]))


def evaluation_commands(evaluation: EvaluationFiles) -> Iterable[tuple[str, str | None]]:
    made = (evaluation.results.get("provenance") or {}).get("generated") or {}
    yield "sample", made.get("command")
    yield "evaluate", evaluation.results.get("command")


def commands_section(
    runs: Sequence[RunFiles], evaluation: EvaluationFiles | None, command: str | None
) -> Markup:
    lines: list[tuple[str, str | None]] = [
        (f"{Path(run.path).name}, {line[:19]}", line[20:]) for run in runs for line in run.commands
    ]
    lines += evaluation_commands(evaluation) if evaluation else ()
    return commands_block([*lines, ("report", command)])


def commands_block(commands: Iterable[tuple[str, str | None]]) -> Markup:
    """The commands that were typed, as a shell would read them again. Unknown ones are left out."""
    rows = [[what, element("code", text, class_="text")] for what, text in commands if text]
    if not rows:
        nothing = "None of these steps was started from a command line."
        return section("Commands", paragraph(nothing, class_="dim"), anchor="commands")
    return section("Commands", table(["step", "command"], rows), anchor="commands")


def hashes(results: Mapping) -> Iterable[tuple[str, str]]:
    """(what, digest) of everything that decides the numbers, as far as it is known."""
    made = (results.get("provenance") or {}).get("generated") or {}
    inputs = results.get("inputs") or {}
    facts = {
        "checkpoint of the samples, sha256": made.get("checkpoint_sha256"),
        "generated images": inputs.get("generated"),
        "reference images": inputs.get("reference"),
        "preparation": inputs.get("preprocess_hash"),
        "names of the images": (results.get("cases") or {}).get("fingerprint"),
    }
    networks = {f"network of {name}, sha256": f.get("sha256") for name, f in results["networks"].items()}
    yield from ((what, str(text)) for what, text in (facts | networks).items() if text)


def provenance_section(results: Mapping) -> Markup:
    digests = [[what, element("code", text)] for what, text in hashes(results)]
    facts = {key: results.get(key) for key in PROVENANCE}
    text = folded("folders, seeds, software, checkpoints", json.dumps(facts, indent=1))
    content = table(["what", "digest"], digests) if digests else ""
    return section("Provenance", content, text, anchor="provenance")


def written_now() -> str:
    """The line under a page's title."""
    return f"medldm report, {time.strftime('%Y-%m-%d %H:%M')}"
