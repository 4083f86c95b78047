"""medldm report: one self-contained HTML page about a run (or a chain of runs) and its evaluation.

Tables with intervals, real and generated images side by side, loss curves, reconstruction and sample grids
over the training, provenance. Everything is inside the one file: it can be mailed, and it needs no network.

keys
  run=DIR              a run folder; several stages: run=[DIR1,DIR2]
  evaluation=DIR       what `medldm evaluate` wrote; by default the evaluation/ of one of the runs
  output=report.html   where the page goes; by default beside the numbers
  table=medlsdm        instead of the page a table of several evaluations, output=table.md and table.html;
                       edge_levels: scores over sample's edge_level, one evaluation a level and model

examples
  medldm report run=[runs/vqvae,runs/ldm] evaluation=runs/evaluation
  medldm report table=medlsdm evaluation=[runs/a/evaluation,runs/b/evaluation] output=table
"""

import csv
import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from medldm.commands import run_command
from medldm.errors import InputError

log = logging.getLogger(__name__)
MAX_WIDTH = 1600  # px; wider pictures are scaled down


def task(cfg) -> None:  # noqa: ANN001 - a Hydra config
    from medldm.files import replacing

    if cfg.table is not None:
        return write_table(cfg)
    folders = as_paths(cfg.run)
    if not folders:
        raise InputError("run: not given; name the run folder as run=DIR")
    runs = [read_run(folder) for folder in folders]
    evaluation_dir = find_evaluation(cfg.evaluation, folders)
    evaluation = read_evaluation(evaluation_dir) if evaluation_dir else None
    if evaluation is not None:
        add_changes(evaluation, folders)
    output = Path(cfg.output) if cfg.output else (evaluation_dir or folders[-1]) / "report.html"
    with replacing(output) as temporary:
        temporary.write_text(compose(runs, evaluation), encoding="utf-8")
    print(output)


def add_changes(evaluation, runs: Sequence[Path]) -> None:  # noqa: ANN001
    """What changed since the evaluation becomes a note of the page, and is said here."""
    from medldm.evaluation.origins import changes_since

    lines = list(changes_since(evaluation.results, [str(run) for run in runs]))
    evaluation.results["warnings"] = [*evaluation.results.get("warnings", ()), *lines]
    for line in lines:
        log.warning("%s", line)


def compose(runs: Sequence, evaluation) -> str:  # noqa: ANN001
    """The whole page."""
    from medldm.reporting import sections
    from medldm.reporting.page import folded, page, section

    blocks, links = [], []
    if evaluation:
        blocks += [sections.headline(evaluation.results)]
        if evaluation.panels:
            blocks.append(
                sections.panels_section(evaluation.panels, evaluation.results.get("panels_by", "nmse_var"))
            )
            links.append(("panels", "Real and generated"))
        blocks.append(sections.evaluation_section(evaluation))
        links.append(("numbers", "Numbers"))
    for i, run in enumerate(runs):
        blocks.append(sections.run_section(run, i))
        links.append((f"run{i}", f"Training: {run.config.get('experiment_name') or run.path}"))
    if evaluation:
        blocks.append(sections.definitions_section(evaluation.results))
        facts = {key: evaluation.results.get(key) for key in PROVENANCE}
        text = json.dumps(facts, indent=1)
        blocks.append(
            section("Provenance", folded("folders, seeds, software, checkpoints", text), anchor="provenance")
        )
        links += [("definitions", "What the numbers mean"), ("provenance", "Provenance")]
    names = [str(run.config.get("experiment_name") or Path(run.path).name) for run in runs]
    subtitle = f"medldm report, {time.strftime('%Y-%m-%d %H:%M')}"
    return page(" + ".join(dict.fromkeys(names)), subtitle, links, "".join(blocks))


PROVENANCE = ("folders", "mean_image", "metrics", "seed", "software", "provenance")


def as_paths(value) -> list[Path]:  # noqa: ANN001 - None, a string, or a list of them
    return [] if value is None else [Path(value)] if isinstance(value, str) else [Path(v) for v in value]


def write_table(cfg) -> None:  # noqa: ANN001 - a Hydra config
    """<output>.md and <output>.html: a line an evaluation."""
    from medldm.files import replacing
    from medldm.reporting import edge_levels, results_table

    tables = {"medlsdm": results_table, "edge_levels": edge_levels}
    if cfg.table not in tables:
        raise InputError(f"table={cfg.table}: choose {' or '.join(tables)}")
    folders = as_paths(cfg.evaluation) or [run / "evaluation" for run in as_paths(cfg.run)]
    if not folders:
        raise InputError("table: name the evaluations as evaluation=[DIR1,DIR2], or their runs as run=[...]")
    evaluations = [read_evaluation(folder).results for folder in folders]
    output = Path(cfg.output or "table").with_suffix("")
    subtitle = f"medldm report, {time.strftime('%Y-%m-%d %H:%M')}"
    texts = {
        ".md": tables[cfg.table].to_markdown(evaluations),
        ".html": tables[cfg.table].to_html(evaluations, [str(folder) for folder in folders], subtitle),
    }
    for suffix, text in texts.items():
        with replacing(output.with_suffix(suffix)) as temporary:
            temporary.write_text(text, encoding="utf-8")
        print(output.with_suffix(suffix))


def find_evaluation(stated: str | None, runs: Sequence[Path]) -> Path | None:
    """The folder given, else the evaluation/ of the latest run that has one."""
    if stated:
        return as_paths(stated)[0]
    found = [run / "evaluation" for run in runs if (run / "evaluation" / "metrics.json").is_file()]
    return found[-1] if found else None


def read_run(folder: Path):  # noqa: ANN201
    """All that the page shows of one run folder. InputError where it is none."""
    from omegaconf import OmegaConf

    from medldm.reporting.sections import RunFiles

    config_path, metrics_path = folder / "config.yaml", folder / "metrics.csv"
    if not folder.is_dir():
        raise InputError(f"run={folder}: no such folder; give the folder that `medldm train` printed")
    if not config_path.is_file() and not metrics_path.is_file():
        raise InputError(f"run={folder}: holds neither config.yaml nor metrics.csv; give a run folder")
    text = config_path.read_text() if config_path.is_file() else ""
    config = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if text else {}
    checkpoints = sorted((folder / "checkpoints").glob("*.ckpt"))
    return RunFiles(
        path=str(folder),
        config=config,
        config_text=text,
        columns=read_columns(metrics_path) if metrics_path.is_file() else {},
        pictures=read_chosen(folder / "samples"),
        checkpoints={path.name: path.stat().st_size for path in checkpoints},
    )


def read_columns(path: Path) -> dict:
    """Every column of metrics.csv as steps and values, its empty cells left out."""
    import numpy as np

    from medldm.reporting.charts import Curve

    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    columns = {}
    for name in lines[0] if lines else ():
        cells = [(line.get("step") or i, line[name]) for i, line in enumerate(lines) if line[name]]
        try:
            values = np.array([[float(step), float(value)] for step, value in cells])
        except ValueError as error:
            raise InputError(f"{path}: column {name} holds something that is no number ({error})") from error
        if name != "step" and len(values):
            values = values[np.isfinite(values).all(1)]
            columns[name] = Curve(values[:, 0], values[:, 1])
    return columns


def read_chosen(folder: Path) -> dict[str, bytes]:
    """The pictures that the page will show, from `samples/`."""
    from medldm.reporting.sections import chosen_pictures

    files = {path.stem: path for path in folder.glob("*.png")}
    chosen = [name for names in chosen_pictures(list(files)).values() for name in names]
    return {name: read_png(files[name]) for name in chosen}


def read_png(path: Path) -> bytes:
    """The file's bytes, or those of a smaller picture where it is wider than the page."""
    import cv2
    import numpy as np

    data = path.read_bytes()
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise InputError(f"{path}: not a complete PNG file; delete it and run the report again")
    if image.shape[1] <= MAX_WIDTH:
        return data
    scale = MAX_WIDTH / image.shape[1]
    small = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    return cv2.imencode(".png", small)[1].tobytes()


def read_evaluation(folder: Path):  # noqa: ANN201
    from medldm.reporting.sections import EvaluationFiles

    path = folder / "metrics.json"
    if not path.is_file():
        raise InputError(f"{path}: not found; run `medldm evaluate ... output={folder}` first")
    try:
        results: Mapping = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path}: not valid JSON ({error}); run `medldm evaluate` again") from error
    if results.get("schema_version") != 1:
        raise InputError(f"{path}: not written by this version of `medldm evaluate`; run it again")
    panels = {file.stem: read_png(file) for file in sorted((folder / "panels").glob("*.png"))}
    return EvaluationFiles(str(folder), results, panels)


def main() -> None:
    run_command(task, "report")


if __name__ == "__main__":
    main()
