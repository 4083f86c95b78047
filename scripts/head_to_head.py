"""Compares medldm with other libraries: the same split, minutes and machine, all measured by `medldm
evaluate`.

python scripts/head_to_head.py data=DATA output=DIR minutes=60 peers=medldm,monai,medtokenizers,medlat
python scripts/head_to_head.py data=DATA output=DIR minutes=60 first=cardiac2d/vqvae second=cardiac2d/ldm

DATA is a prepared folder of pictures, slices or volumes. Half of the minutes go to stage one, half to stage
two, on one device; sampling is not counted. medldm trains the experiments `first` and `second`, which may be
given the map and edges of each image; MONAI trains as its tutorials do, medtokenizers with medlatents
(`peers=medtokenizers`) and medlat by their defaults, all without conditions. So of the samples only distances
between sets (FID, KID, precision, recall) can be compared; paired metrics of an unconditional model say
nothing. Test images through the first stage and back are compared with themselves (PSNR, SSIM, LPIPS).

options     overrides of both of medldm's trainings, separated by spaces; `first:model.kind=x` is for one
metrics     overrides of `medldm evaluate`, likewise; volumes are evaluated with metrics=synthesis_3d
width       a multiple of 64, narrows the others' networks (256: the tutorials' and defaults), but MONAI's
            diffusion network of volumes, which has the tutorial's 32, 64 and 64 channels
peer_lr     their learning rate (1e-4); peer_batch: images an update (16); peer_steps: sampling steps (1000)

A library that cannot be imported, or has no networks for volumes, is left out, and a line says so;
`scripts/head_to_head/` says how to install. Run the command again to continue: stages, samples and
evaluations that are finished are kept, and so are the rows of other `peers` in head_to_head.json; other
settings for a library need another output.
"""

import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent / "head_to_head"))

import cv2
import h5py
import numpy as np
import peer
import torch
from medlat_peer import Medlat
from medlatents_peer import Medlatents
from monai_peer import Monai

from medldm.data.prepared import load_index
from medldm.data.records import ImageRecord, read_images
from medldm.data.splits import read_splits
from medldm.devices import pick_device
from medldm.files import replacing, write_json

DEFAULTS = {
    "minutes": "60", "peers": "medldm,monai", "first": "cardiac2d/vqvae", "second": "cardiac2d/ldm",
    "options": "", "metrics": "", "width": "256", "split": "default", "num_steps": "50",
    "peer_steps": "1000", "peer_lr": "1e-4", "peer_batch": "16",
}  # fmt: skip
REBUILT = ("psnr", "ssim", "ssim_gaussian", "lpips")
SHOWN = (
    "fid", "kid", "precision", "recall", "density", "coverage", "frechet_random_conv", "kernel_random_conv",
)  # fmt: skip


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
    for stage in ("first", "second"):
        run = folder / stage
        more = options_of(stage, task.given["options"])
        if stage == "second":
            more.append(f"model.first_stage.checkpoint={checkpoint_of(folder / 'first')}")
        if not (run / "finished").is_file():
            medldm("train", f"experiment={task.given[stage]}", f"run_dir={run}", *common, *more)
            (run / "finished").touch()
    steps = f"sampler.num_steps={task.given['num_steps']}"
    for stage, output, *more in (("first", "rebuilt"), ("second", "samples", steps)):
        places = [f"checkpoint={checkpoint_of(folder / stage)}", f"data.root={task.data}"]
        medldm("sample", *places, f"output={folder / output}", "split=test", "png=false", *more)


def options_of(stage: str, options: str) -> list[str]:
    """The overrides of one stage: those with its name and a colon before them, and those without."""
    words = options.split()
    named = {name for name in ("first", "second") if name != stage}
    return [word.removeprefix(f"{stage}:") for word in words if word.split(":")[0] not in named]


def run_peer(build: Callable[[Sequence[int], int], peer.Peer], task: Task, folder: Path) -> None:
    """Trains and samples another library's models. Their images get the names of the test images in a random
    order, which is seeded, since they have no conditions.
    """
    parts = {part: list(read_images(task.data, subjects=task.subjects(part))) for part in ("train", "test")}
    files = {
        output: [file_of(folder / output, record) for record in parts["test"]]
        for output in ("rebuilt", "samples")
    }
    if all(path.is_file() for paths in files.values() for path in paths):
        return
    train, test = (torch.from_numpy(np.stack([np.float32(r.image) for r in part])) for part in parts.values())
    settings = peer.Settings(
        task.seconds, pick_device("auto"), int(task.given["width"]), int(task.given["peer_steps"]),
        float(task.given["peer_lr"]), int(task.given["peer_batch"]),
    )  # fmt: skip
    found = peer.run(build, folder, train, test, settings)
    for paths, images in zip(files.values(), found, strict=True):
        for path, image in zip(paths, images.numpy(), strict=True):
            write_image(path, image)


def file_of(folder: Path, record: ImageRecord) -> Path:
    return folder / f"{record.id}{'.png' if record.image.ndim == 3 else '.h5'}"


def write_image(path: Path, image: np.ndarray) -> None:
    """A picture (1, H, W) in [-1, 1] as PNG of 8 bits, a volume (1, D, H, W) as HDF5."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        if path.suffix == ".h5":
            with h5py.File(aside, "w") as file:
                file["image"] = image
        else:
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
        places += [f"reconstruction={folder / 'rebuilt'}", f"train={task.data}"]
        more = task.given["metrics"].split()
        if load_index(task.data)["spatial_dims"] == 3:
            more = ["metrics=synthesis_3d", *more]
        split = f"train_split={task.given['split']}"
        medldm("evaluate", *more, *places, split, "generated_range=auto")
    return json.loads(path.read_text())


def check_same_settings(folder: Path, given: dict[str, str]) -> None:
    """Notes in the folder of a library what its stages, samples and numbers are made with; ends the command
    where they were made with something else.
    """
    path = folder / "settings.json"
    settings = {key: value for key, value in given.items() if key not in ("peers", "output")}
    earlier = json.loads(path.read_text()) if path.is_file() else settings
    for key in settings:
        if earlier.get(key) != settings[key]:
            sys.exit(
                f"head_to_head: {folder} was made with {key}={earlier.get(key)}, not {settings[key]}; "
                "give another output"
            )
    write_json(path, settings)


def main() -> None:
    given = DEFAULTS | dict(argument.split("=", 1) for argument in sys.argv[1:])
    unknown = given.keys() - DEFAULTS.keys() - {"data", "output"}
    if unknown or not {"data", "output"} <= given.keys():
        sys.exit(
            f"head_to_head: give data=DATA and output=DIR; unknown: {', '.join(sorted(unknown)) or 'none'}"
        )
    task = Task(Path(given["data"]), Path(given["output"]), 60 * float(given["minutes"]), given)
    written = task.output / "head_to_head.json"
    table = json.loads(written.read_text())["peers"] if written.is_file() else {}
    for name in given["peers"].split(","):
        if name not in CONTESTANTS:
            sys.exit(f"peers: no contestant {name!r}; choose from {', '.join(CONTESTANTS)}")
        folder = task.output / name
        folder.mkdir(parents=True, exist_ok=True)
        check_same_settings(folder, given)
        try:
            CONTESTANTS[name](task, folder)
        except ImportError as error:
            print(f"{name}: left out, as it cannot be imported ({error})", flush=True)
            continue
        except peer.NotOfferedError as error:
            print(f"{name}: left out ({error})", flush=True)
            continue
        results = evaluated(task, folder)
        table[name] = results["distribution"]["generated"]
        table[name]["memorization"] = results["memorization"].get("audit")
        floor = results["distribution"].get("real_halves", {})
        found = {key: table[name][key] for key in SHOWN if key in table[name]}
        rebuilt = results["rows"].get("reconstruction", {})
        table[name]["rebuilt"] = {key: rebuilt[key] for key in REBUILT if key in rebuilt}
        shown = [f"{key} {score['value']:.4g} (n = {score['n']})" for key, score in found.items()]
        shown += [
            f"{key} of the first stage {row['mean']:.4g}" for key, row in table[name]["rebuilt"].items()
        ]
        print(f"{name}: {', '.join(shown)}", flush=True)
        table[name] |= {"real_halves": floor, "settings": given}
        write_json(written, {"peers": table})
    print(written)


if __name__ == "__main__":
    main()
