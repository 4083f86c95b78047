"""medldm demo: phantom -> prepare -> both stages -> sample -> evaluate -> report, on a CPU, in minutes.

  medldm demo
  medldm demo output=demo num_subjects=40 seed=0

Everything a real study does, on synthetic cardiac subjects in the M&Ms-2 layout; the numbers are of held-out
subjects.
Run it again to continue where it stopped; other settings need another output. Ends with the paths of the
page of pictures and of metrics.json.
"""

import logging
import os
import signal
from pathlib import Path
from typing import Any

from medldm.commands import CONFIG_DIR, run_command

log = logging.getLogger(__name__)
SETTINGS = ("num_subjects", "image_size", "seed", "vqvae", "ldm", "sample")  # of a folder, which is made once


def run(command: str, *overrides: str) -> None:
    """One command in this process: `import torch` is paid for once."""
    from importlib import import_module

    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        cfg = compose(command, overrides=list(overrides))
    os.environ.pop("MEDLDM_RUN_DIR", None)  # what a training leaves for the ranks it starts
    import_module(f"medldm.commands.{command}").task(cfg)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def stages(cfg: Any, folder: Path) -> list[tuple[str, str, list[str]]]:
    """(what happens, command, overrides) in order."""
    raw, data = folder / "raw", folder / "data"
    vqvae, ldm = folder / "runs" / "vqvae", folder / "runs" / "ldm"
    samples, reconstruction = folder / "samples", folder / "reconstruction"
    root, seed = f"data.root={data}", f"seed={cfg.seed}"
    first, second = f"{vqvae}/checkpoints/best.ckpt", f"{ldm}/checkpoints/best.ckpt"
    return [
        (
            "drawing synthetic cardiac subjects in the M&Ms-2 layout",
            "phantom",
            [
                "dataset=mnms2", f"root={raw}", f"num_subjects={cfg.num_subjects}",
                f"image_size={cfg.image_size}", seed,
            ],
        ),
        (
            "preparing: resize, normalise, detect edges",
            "prepare",
            ["data=mnms2", f"data.raw={raw}", root, f"data.image_size={cfg.image_size}"],
        ),
        (
            "stage one: a VQ-VAE learns to compress the images",
            "train",
            [
                "experiment=cardiac2d/demo_vqvae", "experiment_name=cardiac2d/demo_vqvae", root,
                f"run_dir={vqvae}", "resume=auto", seed, *cfg.vqvae,
            ],
        ),
        ("caching the latents of every slice", "encode", [f"checkpoint={first}", root]),
        (
            "stage two: a conditional U-Net learns to denoise latents, given edges and map",
            "train",
            [
                "experiment=cardiac2d/demo_ldm", "experiment_name=cardiac2d/demo_ldm", root,
                f"model.first_stage.checkpoint={first}",
                "data.latents=auto", f"run_dir={ldm}", "resume=auto", seed, *cfg.ldm,
            ],
        ),
        (
            "sampling for the conditions of held-out subjects",
            "sample",
            [f"checkpoint={second}", root, f"output={samples}", "data.batch_size=32", seed, *cfg.sample],
        ),
        (
            "reconstructing the same slices: the ceiling",
            "sample",
            [f"checkpoint={first}", root, f"output={reconstruction}", "data.batch_size=32", seed],
        ),
        (
            "measuring against the real slices",
            "evaluate",
            [
                f"generated={samples}", f"reference={data}", f"reconstruction={reconstruction}",
                f"train={data}", f"output={folder / 'evaluation'}", "metrics.features=[random_conv]",
                "metrics.lpips=null", seed,
            ],
        ),
        (
            "making the page",
            "report",
            [
                f"run=[{vqvae},{ldm}]", f"evaluation={folder / 'evaluation'}",
                f"output={folder / 'report.html'}",
            ],
        ),
    ]  # fmt: skip


def task(cfg: Any) -> None:
    import time

    from omegaconf import OmegaConf
    from rich.console import Console

    from medldm.outputs import claim

    console, start = Console(), time.monotonic()
    folder = Path(cfg.output).resolve()
    claim(folder, {key: OmegaConf.to_container(cfg)[key] for key in SETTINGS})
    steps = stages(cfg, folder)
    for number, (what, command, overrides) in enumerate(steps, 1):
        console.rule(f"[bold]{number}/{len(steps)}[/] {what} [dim]{time.monotonic() - start:.0f} s[/]")
        run(command, *overrides)
    console.rule(f"done in {time.monotonic() - start:.0f} s")
    print(folder / "evaluation" / "metrics.json")
    print(folder / "report.html")


def main() -> None:
    run_command(task, "demo", __doc__)


if __name__ == "__main__":
    main()
