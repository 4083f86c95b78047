"""Training in tests: the real `medldm train` task, in this process or in a forked one that can be killed."""

import csv
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from medldm.commands import mistakes_in_one_line, train
from medldm.devices import GPU, choose_settings
from medldm.shrinking import shrink
from tests.helpers import compose_config

VQVAE = "experiment=cardiac2d/vqvae"
LDM = "experiment=cardiac2d/ldm"
# Batches of 4 of 22 slices: epochs of five updates.
LONGER = ("trainer.limit_train_batches=1.0", "data.batch_size=4", "trainer.max_steps=8")
PLAIN_SGD = (
    "model.optimizer._target_=torch.optim.SGD",
    "~model.optimizer.betas",
    "~model.optimizer.fused",
    "model.optimizer.lr=0.05",
)
RESTARTING_CODES = "model.autoencoder.quantizer.restart_threshold=0.98"


def fast_bf16_convolutions(monkeypatch: Any) -> None:
    """Convolutions under autocast as a tensor core computes them: operands rounded to bf16, summed in
    float32.

    A CPU without bf16 takes minutes for what this takes in a second; types and layouts are those of a GPU.
    """

    def rounded(convolve: Callable) -> Callable:
        def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *args, **kwargs):
            if not torch.is_autocast_enabled("cpu"):
                return convolve(x, weight, bias, *args, **kwargs)
            with torch.autocast("cpu", enabled=False):
                operands = (v if v is None else v.bfloat16().float() for v in (x, weight, bias))
                return convolve(*operands, *args, **kwargs).bfloat16()

        return run

    for dims in (2, 3):
        for name in (f"conv{dims}d", f"conv_transpose{dims}d"):
            monkeypatch.setattr(torch.nn.functional, name, rounded(getattr(torch.nn.functional, name)))


def gpu_settings(*overrides: str) -> list[str]:
    """What `debug=tiny` leaves out: precision, layout, clipping and accumulation as on a GPU."""
    cfg = compose_config("train", *overrides, "data.root=-")
    settings = choose_settings(cfg.trainer.precision, cfg.channels_last, hardware=GPU)
    return [
        f"trainer.precision={settings.precision}",
        f"channels_last={str(settings.channels_last).lower()}",
        f"trainer.accumulate_grad_batches={cfg.trainer.accumulate_grad_batches}",
        f"trainer.gradient_clip_val={cfg.trainer.gradient_clip_val or 1.0}",
    ]


def train_config(root: Path, run_dir: Path, *overrides: str) -> DictConfig:
    return compose_config(
        "train",
        "debug=tiny",
        f"data.root={root}",
        f"run_dir={run_dir}",
        "trainer.enable_progress_bar=false",
        *overrides,
    )


def run_training(root: Path, run_dir: Path, *overrides: str) -> Path:
    """Train in this process; returns last.ckpt. Signal handlers and log files do not outlive it."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    }
    log_handlers = list(logging.getLogger().handlers)
    try:
        train.task(train_config(root, run_dir, *overrides))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        logging.getLogger().handlers[:] = log_handlers
    return run_dir / "checkpoints" / "last.ckpt"


def in_child(task: Callable[[], Any], stderr: Path | None = None) -> int:
    """Run in a forked process; its exit status, negative for the signal that ended it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        status = 1
        signal.alarm(300)  # a child that hangs fails its test rather than the run
        try:
            if stderr is not None:
                os.dup2(os.open(stderr, os.O_CREAT | os.O_WRONLY), 2)
                sys.stderr = os.fdopen(2, "w", buffering=1)
            with mistakes_in_one_line("train"):
                task()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train_in_child(
    root: Path,
    run_dir: Path,
    *overrides: str,
    at_batch: int | None = None,
    act: Callable | None = None,
    **streams,
) -> int:
    """Train in a forked process where `act(module)` happens just before batch number `at_batch` (from 0)."""

    def task() -> None:
        from medldm.callbacks import RandomState

        def hook(self, trainer, module, batch, batch_idx) -> None:
            if trainer.fit_loop.total_batch_idx == at_batch:
                act(module)

        if at_batch is not None:
            RandomState.on_train_batch_start = hook
        run_training(root, run_dir, *overrides)

    return in_child(task, **streams)


def kill_self(module: Any, signum: int = signal.SIGKILL) -> None:
    os.kill(os.getpid(), signum)


def load(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def first_difference(a: Any, b: Any, path: str = "") -> str | None:
    """Where two nested checkpoints differ in a single bit, or None."""
    if isinstance(a, Mapping):
        if a.keys() != b.keys():
            return f"{path}: keys {sorted(map(str, a.keys() ^ b.keys()))}"
        found = (first_difference(a[key], b[key], f"{path}/{key}") for key in a)
        return next((where for where in found if where), None)
    if isinstance(a, torch.Tensor):
        return None if a.dtype == b.dtype and torch.equal(a, b) else f"{path}: tensors"
    if isinstance(a, Sequence) and not isinstance(a, str):
        if len(a) != len(b):
            return f"{path}: {len(a)} and {len(b)} entries"
        found = (first_difference(x, y, f"{path}[{i}]") for i, (x, y) in enumerate(zip(a, b, strict=True)))
        return next((where for where in found if where), None)
    return None if a == b else f"{path}: {a} and {b}"


def read_metrics(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


FACTS = {
    "spatial_dims": 2,
    "image_channels": 1,
    "num_classes": 4,
    "num_views": 2,
    "num_phases": 2,
    "num_labels": 0,
    "image_size": [16, 16],
}
PIXELS = ("model/first_stage=pixel", "model.network.channels=[16,16]", "model.network.up_channels=[16,16]")


def build(*overrides: str, seed: int = 0, facts: Mapping[str, Any] | None = None) -> Any:
    """The narrow module of an experiment, with fresh weights and without data."""
    from omegaconf import OmegaConf

    from medldm.build import build_module

    cfg = compose_config("train", "debug=tiny", *overrides)
    torch.manual_seed(seed)
    return build_module(shrink(OmegaConf.to_container(cfg.model, resolve=True)), facts or FACTS)


def make_batches(count: int, size: int, pixels: int = 16) -> list[dict[str, Any]]:
    """Fixed random batches of the cardiac layout."""
    generator = torch.Generator().manual_seed(0)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=generator)

    return [
        {
            "image": torch.rand(size, 1, pixels, pixels, generator=generator) * 2 - 1,
            "mask": draw(4, size, 1, pixels, pixels),
            "edges": draw(2, size, 1, pixels, pixels).float(),
            "view": draw(2, size),
            "phase": draw(2, size),
            "slice_position": torch.rand(size, generator=generator),
        }
        for _ in range(count)
    ]


def fit(
    module: Any,
    batches: list,
    *callbacks: Any,
    validation: list | None = None,
    max_epochs: int = 1,
    **options: Any,
) -> Any:
    """`max_epochs` over the batches, with nothing written; returns the trainer."""
    from pytorch_lightning import Trainer

    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=max_epochs, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        callbacks=list(callbacks), **options,
    )  # fmt: skip
    handler = signal.getsignal(signal.SIGTERM)
    try:
        trainer.fit(module, as_loader(batches), as_loader(validation) if validation else None)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return trainer


def as_loader(batches: list) -> Any:
    return torch.utils.data.DataLoader(batches, batch_size=None)
