"""medldm demo: phantom -> prepare -> both stages -> sample -> evaluate -> report, on a CPU, in minutes.

  medldm demo
  medldm demo output=demo num_subjects=40 seed=0

Runs all commands of a real study on synthetic cardiac subjects in the M&Ms-2 layout; the numbers that it
ends with are of held-out subjects. Run it again to continue where it stopped; other settings need another
output. The last lines are the paths of metrics.json and of the page of pictures.
"""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from medldm.commands import run_command, run_here
from medldm.outputs import claim

# What decides the content of an output folder, which is made with one value of each.
SETTINGS = ("num_subjects", "image_size", "seed", "vqvae", "ldm", "sample")


class Step(NamedTuple):
    """One command of the study."""

    what: str  # happens, for the reader
    command: str
    overrides: list[str]


class Places:
    """Where each step writes, below the output folder."""

    def __init__(self, folder: Path) -> None:
        self.raw, self.data = folder / "raw", folder / "data"
        self.vqvae, self.ldm = folder / "runs" / "vqvae", folder / "runs" / "ldm"
        self.samples, self.reconstruction = folder / "samples", folder / "reconstruction"
        self.evaluation, self.page = folder / "evaluation", folder / "report.html"


def data_steps(cfg: DictConfig, at: Places) -> Iterator[Step]:
    yield Step(
        "drawing synthetic cardiac subjects in the M&Ms-2 layout",
        "phantom",
        [
            "dataset=mnms2", f"root={at.raw}", f"num_subjects={cfg.num_subjects}",
            f"image_size={cfg.image_size}", f"seed={cfg.seed}",
        ],
    )  # fmt: skip
    yield Step(
        "preparing: resize, normalise, detect edges",
        "prepare",
        ["data=mnms2", f"data.raw={at.raw}", f"data.root={at.data}", f"data.image_size={cfg.image_size}"],
    )


def training_steps(cfg: DictConfig, at: Places) -> Iterator[Step]:
    """The commands that train both stages."""
    root, seed = f"data.root={at.data}", f"seed={cfg.seed}"
    first = f"{at.vqvae}/checkpoints/best.ckpt"
    yield Step(
        "stage one: a VQ-VAE learns to compress the images",
        "train",
        [
            "experiment=cardiac2d/demo_vqvae", "experiment_name=cardiac2d/demo_vqvae", root,
            f"run_dir={at.vqvae}", "resume=auto", seed, *cfg.vqvae,
        ],
    )  # fmt: skip
    yield Step("caching the latents of every slice", "encode", [f"checkpoint={first}", root])
    yield Step(
        "stage two: a conditional U-Net learns to denoise latents, given edges and map",
        "train",
        [
            "experiment=cardiac2d/demo_ldm", "experiment_name=cardiac2d/demo_ldm", root,
            f"model.first_stage.checkpoint={first}", "data.latents=auto",
            f"run_dir={at.ldm}", "resume=auto", seed, *cfg.ldm,
        ],
    )  # fmt: skip


def sampling_steps(cfg: DictConfig, at: Places) -> Iterator[Step]:
    for what, run, output, overrides in (
        ("sampling for the conditions of held-out subjects", at.ldm, at.samples, cfg.sample),
        ("reconstructing the same slices: the ceiling", at.vqvae, at.reconstruction, ()),
    ):
        checkpoint, root = f"checkpoint={run}/checkpoints/best.ckpt", f"data.root={at.data}"
        given = [checkpoint, root, f"output={output}", "data.batch_size=32", f"seed={cfg.seed}"]
        yield Step(what, "sample", [*given, *overrides])


def judging_steps(cfg: DictConfig, at: Places) -> Iterator[Step]:
    yield Step(
        "measuring against the real slices",
        "evaluate",
        [
            f"generated={at.samples}", f"reference={at.data}", f"reconstruction={at.reconstruction}",
            f"train={at.data}", f"output={at.evaluation}", "metrics.features=[random_conv]",
            "metrics.lpips=null", f"seed={cfg.seed}",
        ],
    )  # fmt: skip
    runs = f"run=[{at.vqvae},{at.ldm}]"
    yield Step("making the page", "report", [runs, f"evaluation={at.evaluation}", f"output={at.page}"])


def task(cfg: DictConfig) -> None:
    console, start = Console(), time.monotonic()
    folder = Path(cfg.output).resolve()
    claim(folder, {key: OmegaConf.to_container(cfg)[key] for key in SETTINGS})
    at = Places(folder)
    parts = (data_steps, training_steps, sampling_steps, judging_steps)
    steps = [step for part in parts for step in part(cfg, at)]
    for number, step in enumerate(steps, 1):
        passed = time.monotonic() - start
        console.rule(f"[bold]{number}/{len(steps)}[/] {step.what} [dim]{passed:.0f} s[/]")
        run_here(step.command, step.overrides)
    console.rule(f"done in {time.monotonic() - start:.0f} s")
    print(at.evaluation / "metrics.json")
    print(at.page)


def main() -> None:
    run_command(task, "demo")


if __name__ == "__main__":
    main()
