"""medldm report: one self-contained HTML page about a run (or a chain of runs) and its evaluation.

It holds tables with intervals, a browser through the slices of real and generated images, loss curves, grids
of reconstructions and samples over the training, the steps of denoising where the samples have a trajectory,
the training images nearest to generated ones, commands and digests. Everything is inside the one file: it can
be mailed, and it needs no network. Images are 8-bit copies, volumes of at most 96 voxels along an axis.

keys
  run=DIR              a run folder; several stages: run=[DIR1,DIR2]
  evaluation=DIR       what `medldm evaluate` wrote; by default the evaluation/ of one of the runs
  comparison=DIR       instead: what `medldm evaluate compare=[A,B] output=DIR` wrote, as a page of its own
  utility=DIR          what `medldm utility` wrote: learning curves, beside run=... or as a page of their own
  output=report.html   where the page goes; by default beside the numbers
  table=medlsdm        writes a table of several evaluations instead of the page, as output=table.md and
                       table.html; edge_levels: scores over sample's edge_level, from one evaluation for each
                       level and model

examples
  medldm report run=[runs/vqvae,runs/ldm] evaluation=runs/evaluation
  medldm report table=medlsdm evaluation=[runs/a/evaluation,runs/b/evaluation] output=table
"""

import logging
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from medldm.commands import run_command
from medldm.errors import InputError
from medldm.evaluation.origins import changes_since
from medldm.files import replacing
from medldm.overrides import typed_command
from medldm.reporting import edge_levels, results_table
from medldm.reporting.files import read_chosen, read_columns, read_comparison, read_evaluation
from medldm.reporting.learning_curves import read_utility
from medldm.reporting.run_page import compose, compose_comparison, compose_utility, written_now
from medldm.reporting.sections import EvaluationFiles, RunFiles
from medldm.runs import COMMANDS_FILE
from medldm.training.configs import read_config

log = logging.getLogger(__name__)
TABLE_KINDS = {"medlsdm": results_table, "edge_levels": edge_levels}


def task(cfg: DictConfig) -> None:
    if cfg.table is not None:
        return write_table(cfg)
    if cfg.comparison is not None:
        return write_comparison(Path(cfg.comparison), cfg.output)
    folders = as_paths(cfg.run)
    utility = read_utility(Path(cfg.utility)) if cfg.utility else None
    if utility is not None and not folders:
        path = Path(cfg.output) if cfg.output else Path(cfg.utility) / "report.html"
        return write_page(path, compose_utility(utility, typed_command()))
    if not folders:
        raise InputError("run: not given; name the run folder as run=DIR")
    runs = [read_run(folder) for folder in folders]
    evaluation_dir = find_evaluation(cfg.evaluation, folders)
    evaluation = read_evaluation(evaluation_dir) if evaluation_dir else None
    if evaluation is not None:
        add_changes(evaluation, folders)
    output = Path(cfg.output) if cfg.output else (evaluation_dir or folders[-1]) / "report.html"
    write_page(output, compose(runs, evaluation, typed_command(), utility))


def write_page(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(path)


def write_comparison(folder: Path, output: str | None) -> None:
    """The page of two evaluations that were compared."""
    comparison = read_comparison(folder)
    evaluations = [read_evaluation(Path(path)) for path in comparison["compared"]]
    path = Path(output) if output else folder / "report.html"
    write_page(path, compose_comparison(comparison, evaluations, typed_command()))


def write_table(cfg: DictConfig) -> None:
    """Write <output>.md and <output>.html, with one line for each evaluation."""
    if cfg.table not in TABLE_KINDS:
        raise InputError(f"table={cfg.table}: choose {' or '.join(TABLE_KINDS)}")
    table = TABLE_KINDS[cfg.table]
    folders = as_paths(cfg.evaluation) or [run / "evaluation" for run in as_paths(cfg.run)]
    if not folders:
        raise InputError("table: name the evaluations as evaluation=[DIR1,DIR2], or their runs as run=[...]")
    evaluations = [read_evaluation(folder).results for folder in folders]
    output = Path(cfg.output or "table").with_suffix("")
    names = [str(folder) for folder in folders]
    texts = {".md": table.to_markdown(evaluations), ".html": table.to_html(evaluations, names, written_now())}
    for suffix, text in texts.items():
        write_page(output.with_suffix(suffix), text)


def add_changes(evaluation: EvaluationFiles, runs: Sequence[Path]) -> None:
    """What has changed since the evaluation becomes a note of the page and a line of the log."""
    lines = list(changes_since(evaluation.results, [str(run) for run in runs]))
    evaluation.results["warnings"] = [*evaluation.results.get("warnings", ()), *lines]
    for line in lines:
        log.warning("%s", line)


def as_paths(value: str | Sequence[str] | None) -> list[Path]:
    return [] if value is None else [Path(value)] if isinstance(value, str) else [Path(v) for v in value]


def find_evaluation(stated: str | None, runs: Sequence[Path]) -> Path | None:
    """The folder given, else the evaluation/ of the latest run that has one."""
    if stated:
        return as_paths(stated)[0]
    found = [run / "evaluation" for run in runs if (run / "evaluation" / "metrics.json").is_file()]
    return found[-1] if found else None


def read_run(folder: Path) -> RunFiles:
    """All that the page shows of one run folder. InputError where it is none."""
    config_path, metrics_path, commands = (
        folder / name for name in ("config.yaml", "metrics.csv", COMMANDS_FILE)
    )
    if not folder.is_dir():
        raise InputError(f"run={folder}: no such folder; give the folder that `medldm train` printed")
    if not config_path.is_file() and not metrics_path.is_file():
        raise InputError(f"run={folder}: holds neither config.yaml nor metrics.csv; give a run folder")
    text = config_path.read_text(errors="replace") if config_path.is_file() else ""
    config = read_config(text, config_path)
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"))
    return RunFiles(
        path=str(folder),
        config=config,
        config_text=text,
        columns=read_columns(metrics_path) if metrics_path.is_file() else {},
        pictures=read_chosen(folder / "samples"),
        checkpoints={path.name: path.stat().st_size for path in checkpoints},
        commands=commands.read_text().splitlines() if commands.is_file() else (),
    )


def main() -> None:
    run_command(task, "report")


if __name__ == "__main__":
    main()
