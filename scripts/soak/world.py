"""Tiny phantom data and models, made once, and the commands that are run on them."""

import gzip
import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from commandlines import Places
from hydra import compose, initialize_config_dir

from medldm.commands import (
    CONFIG_DIR,
    encode,
    evaluate,
    mistakes_in_one_line,
    phantom,
    prepare,
    sample,
    train,
    translate,
)

TASKS = {
    "phantom": phantom.task, "prepare": prepare.task, "train": train.task, "encode": encode.task,
    "sample": sample.task, "evaluate": evaluate.task, "translate": translate.task,
}  # fmt: skip
TIMES = (
    "_ns",
    "created",
    "time",
    "seconds",
    "finished",
    "started",
    "date",
    "host",
    "wall",
    "path",
    "command",
)


@dataclass(frozen=True)
class Command:
    """How a trial's folder leads to a command line, and where in it the result lies."""

    task: str
    overrides: Callable[["World", Path], list[str]]  # of the trial's folder
    result: str  # within the trial's folder
    again: tuple[str, ...] = ()  # what a restart adds
    copies: str | None = None  # part of the world to write into, copied for each trial


STAGE = ("experiment=cardiac2d/vqvae", "debug=tiny", "trainer.max_steps=6", "data.batch_size=4")
LDM = ("experiment=cardiac2d/ldm", "debug=tiny", "trainer.max_steps=6", "data.batch_size=4")
VOLUMES = ("debug=tiny", "trainer.max_steps=2", "data.batch_size=2")
QUIET = ("trainer.enable_progress_bar=false", "trainer.limit_train_batches=1.0")

COMMANDS = {
    "prepare": Command(
        "prepare",
        lambda w, t: [
            f"data.raw={w.raw}",
            f"data.root={t / 'data'}",
            "data.num_workers=0",
            "data.image_size=64",
        ],
        "data",
    ),
    "train": Command(
        "train",
        lambda w, t: [*STAGE, *QUIET, f"data.root={w.data}", f"run_dir={t / 'run'}"],
        "run",
        ("resume=auto",),
    ),
    "train_ldm": Command(
        "train",
        lambda w, t: [
            *LDM,
            *QUIET,
            f"data.root={w.data}",
            f"run_dir={t / 'run'}",
            f"model.first_stage.checkpoint={w.stage}",
        ],
        "run",
        ("resume=auto",),
    ),
    "encode": Command(
        "encode",
        lambda w, t: [f"checkpoint={w.stage}", f"data.root={t / 'data'}", "data.num_workers=0"],
        "data",
        copies="data",
    ),
    "sample": Command(
        "sample",
        lambda w, t: [
            f"checkpoint={w.model}",
            f"data.root={w.data}",
            f"output={t / 'samples'}",
            "split=all",
            "max_slices=2",
            "sampler.num_steps=4",
            "data.batch_size=1",  # a restart makes other batches, which round differently
            "data.num_workers=0",
            "allow_training_subjects=true",
        ],
        "samples",
    ),
    "evaluate": Command(
        "evaluate",
        lambda w, t: [
            f"generated={w.samples}",
            f"reference={w.data}",
            f"output={t / 'metrics'}",
            "panel_rows=1",
        ],
        "metrics",
    ),
    "translate": Command(
        "translate",
        lambda w, t: [
            f"checkpoint={w.translator}",
            f"source={w.source}",
            "source_modality=t1",
            f"output={t / 'volumes'}",
            "sampler.num_steps=4",
        ],
        "volumes",
    ),
}


class World:
    """Raw and prepared data, a first stage, a model on it and its samples; a translator of volumes. No trial
    changes them.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.raw, self.data, self.samples = root / "raw", root / "data", root / "samples"
        self.stage, self.model = (root / n / "checkpoints" / "last.ckpt" for n in ("stage", "model"))
        self.translator = root / "volumes_ldm" / "checkpoints" / "last.ckpt"
        if not self.samples.is_dir():
            root.mkdir(parents=True, exist_ok=True)
            self.make()
        if not self.translator.is_file():
            self.make_volumes()

    @property
    def source(self) -> Path:
        """The raw T1 of one subject."""
        return sorted((self.root / "volumes_raw").rglob("*_t1.nii.gz"))[0]

    def places(self) -> Places:
        """Valid inputs of every command, an evaluation and latents among them, for fuzzing."""
        data, metrics = self.root / "fuzzed" / "data", self.root / "metrics"
        if not metrics.is_dir():
            self.run("evaluate", *COMMANDS["evaluate"].overrides(self, self.root))
        if not data.is_dir():
            copy_world(self.data, data)
            self.run("encode", f"checkpoint={self.stage}", f"data.root={data}", "data.num_workers=0")
        others = (self.samples, metrics, self.root / "volumes", self.translator, self.source)
        return Places(self.raw, data, self.stage, self.model, *others)

    def make(self) -> None:
        sizes = ("num_subjects=4", "image_size=64", "num_slices=[4,5]")
        self.run("phantom", f"root={self.raw}", *sizes)
        self.run("prepare", *COMMANDS["prepare"].overrides(self, self.root))
        self.run("train", *STAGE, *QUIET, f"data.root={self.data}", f"run_dir={self.root / 'stage'}")
        stage = f"model.first_stage.checkpoint={self.stage}"
        self.run("train", *LDM, *QUIET, f"data.root={self.data}", f"run_dir={self.root / 'model'}", stage)
        self.run("sample", *COMMANDS["sample"].overrides(self, self.root))

    def make_volumes(self) -> None:
        """A translator of volumes: autoencoder, MS-SPADE and diffusion on the BraTS phantom."""
        raw, data = self.root / "volumes_raw", self.root / "volumes"
        self.run("phantom", "dataset=brats", "num_subjects=6", "size=[40,44,36]", f"root={raw}")
        options = ("data=brats", "data.image_size=[32,32,32]", "data.num_workers=0")
        self.run("prepare", *options, f"data.raw={raw}", f"data.root={data}")
        stage = ()
        for name in ("vqgan", "msspade", "ldm"):
            folder = self.root / f"volumes_{name}"
            place = (f"data.root={data}", f"run_dir={folder}")
            self.run("train", f"experiment=aldm/brats_{name}", *VOLUMES, *QUIET, *place, *stage)
            stage = (f"model.first_stage.checkpoint={folder / 'checkpoints' / 'last.ckpt'}",)

    def run(self, task: str, *overrides: str) -> None:
        log = self.root / f"{task}.txt"
        if (status := wait_for(start(task, list(overrides), log))) != 0:
            raise SystemExit(f"the world could not be made: {task} ended with {status}\n{log.read_text()}")


def start(task: str, overrides: list[str], log: Path) -> int:
    """The command in a forked process and session of its own; the process id.

    Forking spares each trial the seconds in which torch is imported. This process itself computes nothing
    with torch, as a pool of threads does not survive a fork.
    """
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        signal.alarm(300)
        out = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.stdout = os.fdopen(1, "w", buffering=1)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        torch.set_num_threads(1)
        with mistakes_in_one_line(task):
            with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
                cfg = compose(task, overrides=overrides)
            TASKS[task](cfg)
        status = 0
    except SystemExit as stop:
        status = int(stop.code or 0)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for(child: int) -> int:
    """The exit status, negative for the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, str]:
    """What a result says, without the times and paths at which it was made: file and part -> digest."""
    found: dict[str, str] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = str(path.relative_to(folder))
        if path.suffix == ".h5":
            found |= {f"{name}:{key}": value for key, value in arrays_of(path).items()}
        elif path.suffix == ".ckpt":
            found[name] = digest_of(trained(torch.load(path, map_location="cpu", weights_only=True)))
        elif path.suffix == ".json":
            found[name] = digest_of(without_times(json.loads(path.read_text())))
        elif path.name.endswith(".nii.gz"):  # gzip notes the time
            found[name] = digest_of(gzip.decompress(path.read_bytes()))
        elif path.suffix in (".csv", ".png", ".gif"):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    return found


def arrays_of(path: Path) -> dict[str, str]:
    found = {}
    with h5py.File(path) as file:
        file.visititems(
            lambda name, item: (
                found.__setitem__(name, digest_of(item[()])) if isinstance(item, h5py.Dataset) else None
            )
        )
    return found


def trained(checkpoint: dict[str, Any]) -> dict[str, Any]:
    parts = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
    return {key: checkpoint.get(key) for key in parts}


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: without_times(v) for k, v in value.items() if not any(t in k for t in TIMES)}
    if isinstance(value, list):
        return [without_times(item) for item in value]
    return "a path" if isinstance(value, str) and "/" in value else value


def digest_of(value: Any) -> str:
    total = hashlib.sha256()

    def add(part: Any) -> None:
        if isinstance(part, dict):
            for key in part:
                total.update(str(key).encode())
                add(part[key])
        elif isinstance(part, list | tuple):
            for item in part:
                add(item)
        elif isinstance(part, torch.Tensor):
            total.update(part.contiguous().numpy().tobytes())
        elif isinstance(part, np.ndarray):
            total.update(str(part.tolist()).encode() if part.dtype == object else part.tobytes())
        else:
            total.update(str(part).encode())

    add(value)
    return total.hexdigest()[:16]


def copy_world(part: Path, target: Path) -> None:
    if not target.exists():
        shutil.copytree(part, target)
