"""medldm utility: how good a segmenter becomes by training on synthetic images.

Segmenters are trained on real images, on synthetic ones and on both, for several shares of the training
subjects and several seeds, and all are tested on real images of held-out subjects.

  medldm sample checkpoint=runs/ldm/checkpoints/best.ckpt data.root=DATA split=train output=synthetic
  medldm utility reference=DATA generated=synthetic output=utility fractions=[0.1,0.3,1] seeds=[0,1,2]

A synthetic image stands in for the real one under the same map: with a fraction of 0.3, `real` sees the real
images of that share of the training subjects, `synthetic` the generated ones of the same subjects, and `both`
sees both. Every training has its folder below output/runs; one that is finished is kept, one that was
interrupted is continued, so the command can be run again. The test's Dice by class goes to test.json of each
run; means with intervals over subjects, and the deviation over seeds, to utility.json and onto the screen,
and as learning curves to utility.png (`medldm report utility=DIR` makes a page of them).

keys
  train_on=[real,synthetic,both] fractions=[0.1,0.3,1] seeds=[0,1,2]   what is trained
  segmenter_experiment=medlsdm/folder_segmentation           of every training
  training=['trainer.max_steps=400','data.spatial_dims=2']   its overrides, each in quotes
  split, device, precision, allow_training_subjects          as elsewhere
"""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from medldm.commands import clean_after_failure, run_command, run_here
from medldm.data.loading.synthetic import TRAIN_ON
from medldm.devices import inference_precision, pick_device
from medldm.errors import InputError
from medldm.evaluation.results import jsonable
from medldm.evaluation.screen import print_tables
from medldm.evaluation.utility import TrainedOn, judge_segmenter, read_trial, summarise_trials, utility_lines
from medldm.files import write_json
from medldm.metrics.summary import Bootstrap
from medldm.outputs import claim
from medldm.overrides import typed_command
from medldm.reporting.learning_curves import write_learning_curves

log = logging.getLogger(__name__)
# an output folder has one value of each
CLAIMED = ("training", "split", "generated", "reference")
TEST_FILE = "test.json"


class Training(NamedTuple):
    """The training of one segmenter."""

    trial: TrainedOn
    folder: Path
    overrides: list[str]


@clean_after_failure("output")
def task(cfg: DictConfig) -> None:
    check_choices(cfg)
    output = Path(cfg.output)
    device = pick_device(cfg.device)
    precision = inference_precision(cfg.precision, device)
    settings = OmegaConf.to_container(cfg)
    claim(output, {"experiment": cfg.segmenter_experiment} | {key: settings[key] for key in CLAIMED})
    trainings = list(trainings_of(cfg))
    for number, training in enumerate(trainings, 1):
        path = training.folder / TEST_FILE
        if path.is_file():
            continue
        log.info("%d of %d: %s", number, len(trainings), training.folder.name)
        train_segmenter(training)
        checkpoint = training.folder / "checkpoints" / "best.ckpt"
        found = judge_segmenter(checkpoint, Path(cfg.reference), cfg.split, device, precision)
        write_json(path, jsonable(training.trial._asdict() | found))
    bootstrap = Bootstrap(**settings["bootstrap"], seed=cfg.seed)
    tests = [read_trial(training.folder / TEST_FILE) for training in trainings]
    results = summarise_trials(tests, bootstrap) | {"command": typed_command(), **settings}
    write_json(output / "utility.json", jsonable(results))
    write_learning_curves(output / "utility.png", results)
    print_tables(utility_lines(results), results["warnings"])
    print(output / "utility.json")


def check_choices(cfg: DictConfig) -> None:
    """InputError for settings that would fail after the first trainings."""
    for name in cfg.train_on:
        if name not in TRAIN_ON:
            raise InputError(f"train_on: no choice {name!r}; choose from {', '.join(TRAIN_ON)}")
        if name != "real" and cfg.generated is None:
            raise InputError(
                f"generated: not given, and train_on={name} needs it; name the folder that `medldm sample "
                "split=train` wrote, or set train_on=[real]"
            )
    for key in ("train_on", "fractions", "seeds"):
        if not len(cfg[key]) or len(set(cfg[key])) < len(cfg[key]):
            raise InputError(f"{key}={list(cfg[key])}: give one or more values, each once")
    if not all(0 < fraction <= 1 for fraction in cfg.fractions):
        raise InputError(f"fractions={list(cfg.fractions)}: shares of the subjects lie in (0, 1]")


def train_segmenter(training: Training) -> None:
    """InputError that says which training it was, and where its overrides are written."""
    try:
        run_here("train", training.overrides)
    except InputError as error:
        raise InputError(f"{training.folder.name}, with the overrides of training=[...]: {error}") from error


def trainings_of(cfg: DictConfig) -> Iterator[Training]:
    """Every combination, the smallest fraction first, so that the beginning of the curve is known early."""
    for fraction in sorted(cfg.fractions):
        for seed in cfg.seeds:
            for train_on in cfg.train_on:
                folder = Path(cfg.output) / "runs" / f"{train_on}_{fraction:g}_{seed}"
                overrides = [
                    f"experiment={cfg.segmenter_experiment}", f"data.root={cfg.reference}",
                    f"run_dir={folder}", "resume=auto", f"seed={seed}", f"data.train_fraction={fraction}",
                    f"data.train_on={train_on}", f"data.split={cfg.split}",
                    f"allow_training_subjects={cfg.allow_training_subjects}", *cfg.training,
                ]  # fmt: skip
                overrides += [] if train_on == "real" else [f"data.synthetic={cfg.generated}"]
                yield Training(TrainedOn(train_on, float(fraction), int(seed)), folder, overrides)


def main() -> None:
    run_command(task, "utility")


if __name__ == "__main__":
    main()
