"""Command lines with bad values: every key of a config with every kind of bad value, in random order."""

import copy
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning import Callback

from medldm.commands import (
    CONFIG_DIR,
    encode,
    evaluate,
    prepare,
    report,
    sample,
    train,
    translate,
    user_message,
)
from medldm.errors import InputError
from medldm.overrides import check_paths, known_keys
from medldm.values import check_values

TASKS = {
    "prepare": prepare.task, "train": train.task, "encode": encode.task, "sample": sample.task,
    "evaluate": evaluate.task, "report": report.task, "translate": translate.task,
}  # fmt: skip
BAD_WORDS = (
    "-1", "0", "3", "1e20", "99999999999999999999", "1e-20", "0.5", "nan", "inf", "true", "null", "x", "'3'",
    "''", "[]", "[1,2,3]", "[-1]", "[[1]]", "{}", "{a:1}", "???",
)  # fmt: skip
KEPT = ("data.root", "data.raw", "run_dir", "output", "paths", "hydra")  # where a trial writes, and to whom


@dataclass(frozen=True)
class Places:
    """Valid inputs of every command; None where a trial has none."""

    raw: Path | None
    data: Path
    stage: Path
    model: Path
    samples: Path | None = None
    evaluation: Path | None = None
    volumes: Path | None = None
    translator: Path | None = None
    source: Path | None = None

    def lines(self, out: Path) -> dict[str, tuple[str, list[str]]]:
        """Name -> a command and its words; what it writes lies in `out`."""
        data = [f"data.root={self.data}", "data.num_workers=0"]
        train_here = [
            f"run_dir={out}",
            "debug=tiny",
            "data.batch_size=2",
            "trainer.enable_progress_bar=false",
            "trainer.max_steps=50",  # beyond those of a checkpoint that is resumed
        ]
        ldm = "experiment=cardiac2d/ldm"
        first = f"model.first_stage.checkpoint={self.stage}"
        found = {
            "train vqvae": ("train", ["experiment=cardiac2d/vqvae", *data, *train_here]),
            "train ldm": ("train", [ldm, first, *data, *train_here]),
            "train pixels": ("train", [ldm, "model/first_stage=pixel", *data, *train_here]),
            "train segmenter": ("train", ["model=segmentation", *data, *train_here]),
            "encode": ("encode", [f"checkpoint={self.stage}", *data, "audit=1"]),
            "sample": ("sample", [
                f"checkpoint={self.model}", f"output={out}", *data, "split=all", "limit=1", "max_slices=1",
                "sampler.num_steps=1", "allow_training_subjects=true",
            ]),
            "evaluate": ("evaluate", [
                f"generated={self.samples or self.data}", f"reference={self.data}", f"output={out}",
                "metrics.image=[rmse]", "metrics.features=[]", "metrics.lpips=null", "panel_rows=1",
            ]),
        }  # fmt: skip
        if self.raw:
            words = [f"data.raw={self.raw}", f"data.root={out}", "data.num_workers=0", "data.image_size=32"]
            found["prepare"] = ("prepare", words)
        if self.evaluation:
            run = self.stage.parents[1]
            words = [f"run={run}", f"evaluation={self.evaluation}", f"output={out / 'report.html'}"]
            found["report"] = ("report", words)
        if self.translator:
            volumes = [f"data.root={self.volumes}", "data.num_workers=0", *train_here]
            found["train volumes"] = ("train", ["experiment=aldm/brats_vqgan", *volumes])
            found["translate"] = ("translate", [
                f"checkpoint={self.translator}", f"source={self.source}", "source_modality=t1",
                f"output={out}", "sampler.num_steps=1",
            ])  # fmt: skip
        return found


@cache
def composed(command: str, words: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return compose(command, overrides=list(words))


@cache
def keys_of(command: str, words: tuple[str, ...]) -> list[str]:
    """The keys that can be changed without a choice of other config files."""
    found = known_keys(composed(command, words))
    return [
        key
        for key in found
        if not key.startswith(KEPT)
        and "_target_" not in key
        and not (CONFIG_DIR / key.replace(".", "/")).is_dir()
    ]


@cache
def cells(places: Places, out: Path, seed: int) -> list[tuple[str, str]]:
    """(name of a command line, override) of every key with every bad value, in an order by the seed."""
    lines = {name: (command, tuple(words)) for name, (command, words) in places.lines(out).items()}
    found = [
        (name, f"{key}={word}")
        for name, line in lines.items()
        for key in keys_of(*line)
        for word in BAD_WORDS
    ]
    random.Random(seed).shuffle(found)
    return found


def with_overrides(command: str, words: list[str], odd: list[str]) -> DictConfig:
    """What Hydra makes of the words and then the odd ones, composed once for all."""
    cfg = copy.deepcopy(composed(command, tuple(words)))
    ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides(odd), cfg)
    return cfg


class AtFirstStep(Exception):  # noqa: N818 - not an error: the way out
    pass


class Leave(Callback):
    """Ends a training after its first step."""

    def on_train_batch_end(self, *_: Any) -> None:
        raise AtFirstStep


def fit_one_step(trainer: Any, module: Any, datamodule: Any, run: Any) -> None:
    trainer.callbacks.append(Leave())
    try:
        trainer.fit(module, datamodule, ckpt_path=str(run.resume) if run.resume else None)
    except AtFirstStep:
        return


def run_line(command: str, words: list[str], odd: list[str], out: Path) -> None:
    """The command with the odd words as a process of its own would end: InputError where it ends in one line.

    AssertionError where it then leaves something in `out`.
    """
    train.fit = fit_one_step
    shutil.rmtree(out, ignore_errors=True)
    try:
        cfg = with_overrides(command, words, odd)
        check_paths(OmegaConf.to_container(cfg), odd)
        check_values(OmegaConf.to_container(cfg))
        TASKS[command](cfg)
    except (Exception, SystemExit) as error:
        line = user_message(error, command)
        if line is None:
            error.args = (f"{command} {' '.join(odd)}: {error}",)
            raise
        left = [str(path.relative_to(out)) for path in out.rglob("*")] if out.exists() else None
        if left is not None:
            raise AssertionError(f"{command} {' '.join(odd)}: left {left[:4]} after: {line}") from error
        raise InputError(line) from error


def try_records(
    places: Places, folder: Path, rng: random.Random, change: Callable[[Any], Any]
) -> Callable[[], object]:
    """A file that a command wrote, with entries changed, given to a command that reads it."""
    out = folder / "out"
    lines = places.lines(out)
    reading = [(places.data, "index.json", name) for name in ("train vqvae", "sample", "encode", "evaluate")]
    reading += [(places.data, "splits.json", name) for name in ("train vqvae", "sample")]
    reading += [(path, "latents.json", "train ldm") for path in places.data.glob("latents/*")]
    if places.samples:
        reading += [(places.samples, "provenance.json", "evaluate")]
    if places.evaluation:
        reading += [(places.evaluation, "metrics.json", "report")]
    origin, file, name = rng.choice(reading)
    command, words = lines[name]
    copied = folder / f"{origin.name}_{file}"
    root = places.data if places.data in (origin, *origin.parents) else origin
    if not copied.exists():
        shutil.copytree(root, copied)
    target = copied / origin.relative_to(root) / file
    content = json.loads((origin / file).read_text())
    target.write_text(json.dumps(change(content)))
    words = [word.replace(f"={root}", f"={copied}") if word.endswith(str(root)) else word for word in words]
    odd = ["data.latents=auto"] if file == "latents.json" else []
    return lambda: run_line(command, words, odd, out)
