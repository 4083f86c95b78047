"""Writes a model for others to use: its weights as safetensors, its config, and a model card."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from medldm.checkpoints import read_hashed
from medldm.errors import InputError
from medldm.files import replacing
from medldm.held_out import stages_of
from medldm.schemas import Metrics, read_checked
from medldm.tensors import SAFETENSORS, write_tensors

MODEL = f"model{SAFETENSORS}"
UNSTATED = "Not stated. Ask whoever trained it before you use it for anything."
USE = (
    "Research: making images to train and test other methods with, and looking into how such models behave. "
    "It is no medical device: what it makes must not inform the care of anyone. Its images resemble those of "
    "its training, in their faults and in whom they leave out, and may repeat some of them."
)


def share_checkpoint(
    checkpoint: str | Path, output: Path, *, licence: str | None = None, evaluation: str | Path | None = None
) -> list[Path]:
    """Writes model.safetensors, config.yaml and README.md, the model card, into `output`, and returns their
    paths.

    `evaluation` is a folder of `medldm evaluate` whose numbers the card shows.
    """
    content, sha256 = read_hashed(checkpoint)
    results = None
    if evaluation is not None:
        path = Path(evaluation) / "metrics.json"
        results = read_checked(path, Metrics, f"run `medldm evaluate ... output={evaluation}` first")
    description = content["medldm"]
    texts = {
        "config.yaml": yaml.safe_dump(plain_lists(description["model"]), sort_keys=False),
        "README.md": model_card(description, sha256, results, licence, content),
    }
    write_tensors(output / MODEL, content)
    for name, text in texts.items():
        with replacing(output / name) as aside:
            aside.write_text(text, encoding="utf-8")
    return [output / MODEL, *(output / name for name in texts)]


def plain_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: plain_lists(part) for key, part in value.items()}
    return [plain_lists(part) for part in value] if isinstance(value, list | tuple) else value


def model_card(
    description: Mapping[str, Any],
    sha256: str,
    results: Mapping[str, Any] | None,
    licence: str | None,
    content: Mapping[str, Any],
) -> str:
    """The model card in Markdown. It says what the checkpoint and the evaluation state, and where they state
    nothing.
    """
    facts = description["facts"]
    count = sum(value.numel() for value in content.get("state_dict", {}).values())
    lines = [
        f"# {description['stage'].capitalize()} model of {facts.get('spatial_dims')}D images",
        "",
        f"Made by `medldm export format=safetensors` from a checkpoint with sha256 `{sha256}`, PyTorch "
        f"{torch.__version__}. {count:,} numbers in its weights"
        + (", and a moving average of them." if "ema" in content else "."),
        "",
        "```python",
        f'model = medldm.load("{MODEL}")',
        "```",
        "",
        "## Data and split",
        "",
        *data_lines(description),
        "",
        "## Metrics",
        "",
        *metric_lines(results),
        "",
        "## Licence",
        "",
        licence or UNSTATED,
        "",
        "## Intended use",
        "",
        USE,
    ]
    return "\n".join(lines) + "\n"


def data_lines(description: Mapping[str, Any]) -> list[str]:
    """A line for each stage, which says on whom it was trained."""
    lines = []
    for stage, record in stages_of(description):
        if record is None:
            lines.append(f"- {stage}: an older medldm trained it and did not record its data.")
            continue
        counts = {part: len(record["subjects"].get(part, ())) for part in ("train", "val", "test")}
        sizes = ", ".join(f"{count} {part}" for part, count in counts.items())
        lines.append(f"- {stage}: dataset {record['dataset']}, split `{record['split']}`, subjects: {sizes}.")
    return [
        *lines,
        "",
        "The file names the subjects and digests of their images, so that `medldm sample` and "
        "`medldm evaluate` can refuse those that it was trained on.",
    ]


def metric_lines(results: Mapping[str, Any] | None) -> list[str]:
    """A table of the means of the generated images with their intervals."""
    if results is None:
        return ["Not stated: export with `evaluation=DIR` to show those of `medldm evaluate`."]
    rows = []
    for name, score in results["rows"].get("generated", {}).items():
        if score["mean"] is None:
            continue
        ends = " to ".join(f"{end:.4g}" for end in score.get("ci95") or ())
        rows.append(f"| {name} | {score['mean']:.4g} | {ends} | {score['n']} | {score['num_subjects']} |")
    if not rows:
        raise InputError("evaluation: its metrics.json has no row of generated images; run it again")
    return [
        f"Of generated images, beside `{results.get('dataset')}`; {results.get('aggregation')}.",
        "",
        "| metric | mean | 95% interval | images | subjects |",
        "|---|---|---|---|---|",
        *rows,
    ]
