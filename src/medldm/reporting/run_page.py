"""The page about a chain of runs and its evaluation, put together from its sections."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

from medldm.reporting import sections
from medldm.reporting.page import folded, page, section
from medldm.reporting.sections import EvaluationFiles, RunFiles

PROVENANCE = ("folders", "mean_image", "metrics", "seed", "software", "provenance")  # of metrics.json


def compose(runs: Sequence[RunFiles], evaluation: EvaluationFiles | None) -> str:
    """The whole page as HTML."""
    blocks, links = [], []
    if evaluation:
        blocks += [sections.headline(evaluation.results)]
        if evaluation.panels:
            chosen_by = evaluation.results.get("panels_by", "nmse_var")
            blocks.append(sections.panels_section(evaluation.panels, chosen_by))
            links.append(("panels", "Real and generated"))
        blocks.append(sections.evaluation_section(evaluation))
        links.append(("numbers", "Numbers"))
    for i, run in enumerate(runs):
        blocks.append(sections.run_section(run, i))
        links.append((f"run{i}", f"Training: {run.config.get('experiment_name') or run.path}"))
    if evaluation:
        blocks.append(sections.definitions_section(evaluation.results))
        facts = {key: evaluation.results.get(key) for key in PROVENANCE}
        text = folded("folders, seeds, software, checkpoints", json.dumps(facts, indent=1))
        blocks.append(section("Provenance", text, anchor="provenance"))
        links += [("definitions", "What the numbers mean"), ("provenance", "Provenance")]
    names = [str(run.config.get("experiment_name") or Path(run.path).name) for run in runs]
    return page(" + ".join(dict.fromkeys(names)), written_now(), links, "".join(blocks))


def written_now() -> str:
    """The line under a page's title."""
    return f"medldm report, {time.strftime('%Y-%m-%d %H:%M')}"
