"""Compares medldm with other libraries: the same split, minutes and machine, all measured by `medldm
evaluate`.

python scripts/head_to_head.py data=DATA output=DIR minutes=60 peers=medldm,monai,medtokenizers,medlat
python scripts/head_to_head.py data=DATA output=DIR minutes=60 first=cardiac2d/vqvae second=cardiac2d/ldm

DATA is a prepared 2D folder. Half of the minutes go to stage one, half to stage two, on one device; sampling
is not counted. medldm trains the experiments `first` and `second`, which are given the map and edges of each
image; MONAI trains as its tutorials do, medtokenizers with medlatents (`peers=medtokenizers`) and medlat by
their defaults, all without conditions. So only distances between sets (FID, KID, precision, recall) can be
compared; paired metrics of an unconditional model say nothing. `options` are overrides of both of medldm's
trainings, separated by spaces; `width`, a multiple of 64, narrows the others' networks (256: the tutorials'
and defaults), and `peer_steps` are their sampling steps (1000: likewise). A library that cannot be imported
is left out, and a line says so; `scripts/head_to_head/` says how to install. Run the command again to
continue: stages, samples and evaluations that are finished are kept. The table goes to head_to_head.json.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "head_to_head"))

import cv2
import numpy as np
import peer
import torch
from medlat_peer import Medlat
from medlatents_peer import Medlatents
from monai_peer import Monai

from medldm.data.records import read_images
from medldm.data.splits import read_splits
from medldm.devices import pick_device
from medldm.files import replacing, write_json

DEFAULTS = {
    "minutes": "60", "peers": "medldm,monai", "first": "cardiac2d/vqvae", "second": "cardiac2d/ldm",
    "options": "", "width": "256", "split": "default", "num_steps": "50", "peer_steps": "1000",
}  # fmt: skip
SHOWN = ("fid", "kid", "precision", "recall", "density", "coverage", "frechet_random_conv")


class Task(NamedTuple):
    """The data, time and device that every library is given."""

    data: Path
    output: Path
    seconds: float
    given: dict[str, str]

    def subjects(self, part: str) -> list[str]:
        return read_splits(self.data / "splits.json")[self.given["split"]][part]


def medldm(command: str, *overrides: str) -> None:
    words = [sys.executable, "-m", f"medldm.commands.{command}", *overrides]
    if status := subprocess.run(words, check=False).returncode:
        sys.exit(f"head_to_head: `medldm {shlex.join([command, *overrides])}` ended with status {status}")


def clock(seconds: float) -> str:
    """Days, hours, minutes and seconds, as Lightning reads them."""
    minutes, rest = divmod(max(1, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours // 24:02}:{hours % 24:02}:{minutes:02}:{rest:02}"


def checkpoint_of(run: Path) -> Path:
    """The best checkpoint where there was a validation within the time, else the last one."""
    folder = run / "checkpoints"
    return next(folder / name for name in ("best.ckpt", "last.ckpt") if (folder / name).is_file())


def run_medldm(task: Task, folder: Path) -> None:
    limit = f"+trainer.max_time='{clock(task.seconds / 2)}'"
    common = [f"data.root={task.data}", f"data.split={task.given['split']}", "resume=auto", limit]
    common += ["trainer.max_epochs=-1"]  # the time alone ends a stage, as it ends those of the others
    common += task.given["options"].split()
    stages = {"first": [], "second": []}
    for stage, more in stages.items():
        run = folder / stage
        if stage == "second":
            more = [f"model.first_stage.checkpoint={checkpoint_of(folder / 'first')}"]
        if not (run / "finished").is_file():
            medldm("train", f"experiment={task.given[stage]}", f"run_dir={run}", *common, *more)
            (run / "finished").touch()
    places = [f"checkpoint={checkpoint_of(folder / 'second')}", f"data.root={task.data}"]
    steps = f"sampler.num_steps={task.given['num_steps']}"
    medldm("sample", *places, f"output={folder / 'samples'}", "split=test", "png=false", steps)


def run_peer(build: Callable[[int, int], peer.Peer], task: Task, folder: Path) -> None:
    """Trains and samples another library's models. Their images get the names of the test images in a random
    order, which is seeded, since they have no conditions.
    """
    train = [np.asarray(r.image, np.float32) for r in read_images(task.data, subjects=task.subjects("train"))]
    names = [record.id for record in read_images(task.data, subjects=task.subjects("test"))]
    if all((folder / "samples" / f"{name}.png").is_file() for name in names):
        return
    images = torch.from_numpy(np.stack(train))
    device, width, steps = pick_device("auto"), int(task.given["width"]), int(task.given["peer_steps"])
    made = peer.run(build, folder, images, len(names), task.seconds, device, width, steps)
    for name, image in zip(names, made.numpy(), strict=True):
        with replacing(folder / "samples" / f"{name}.png") as aside:
            pixels = np.round((image[0] + 1) * 127.5).astype(np.uint8)
            aside.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())


CONTESTANTS = {
    "medldm": run_medldm,
    "monai": partial(run_peer, Monai),
    "medtokenizers": partial(run_peer, Medlatents),
    "medlat": partial(run_peer, Medlat),
}


def evaluated(task: Task, folder: Path) -> dict:
    path = folder / "evaluation" / "metrics.json"
    if not path.is_file():
        places = [f"generated={folder / 'samples'}", f"reference={task.data}", f"output={path.parent}"]
        medldm(
            "evaluate",
            *places,
            f"train={task.data}",
            f"train_split={task.given['split']}",
            "generated_range=auto",
        )
    return json.loads(path.read_text())


def main() -> None:
    given = DEFAULTS | dict(argument.split("=", 1) for argument in sys.argv[1:])
    unknown = given.keys() - DEFAULTS.keys() - {"data", "output"}
    if unknown or not {"data", "output"} <= given.keys():
        sys.exit(
            f"head_to_head: give data=DATA and output=DIR; unknown: {', '.join(sorted(unknown)) or 'none'}"
        )
    task = Task(Path(given["data"]), Path(given["output"]), 60 * float(given["minutes"]), given)
    table = {}
    for name in given["peers"].split(","):
        if name not in CONTESTANTS:
            sys.exit(f"peers: no contestant {name!r}; choose from {', '.join(CONTESTANTS)}")
        folder = task.output / name
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        try:
            CONTESTANTS[name](task, folder)
        except ImportError as error:
            print(f"{name}: left out, as it cannot be imported ({error})", flush=True)
            continue
        results = evaluated(task, folder)
        table[name] = results["distribution"]["generated"]
        table[name]["memorization"] = results["memorization"].get("audit")
        floor = results["distribution"].get("real_halves", {})
        found = {key: table[name][key] for key in SHOWN if key in table[name]}
        shown = [f"{key} {score['value']:.4g} (n = {score['n']})" for key, score in found.items()]
        print(f"{name}: {', '.join(shown)}", flush=True)
        table[name]["real_halves"] = floor
    write_json(task.output / "head_to_head.json", {"settings": given, "peers": table})
    print(task.output / "head_to_head.json")


if __name__ == "__main__":
    main()
