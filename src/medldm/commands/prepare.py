"""medldm prepare: raw images -> prepared cases, index.json and splits.json.

    medldm prepare data=mnms2 data.raw=DIR data.root=OUT
    medldm prepare data=folder data.raw=DIR data.root=OUT data.spatial_dims=3

data              the dataset: a file of configs/data, such as mnms2 (M&Ms-2 as published), brats or autopet;
                  class_folders (one folder for each class); folder (images/ and masks/, or manifest.csv)
data.raw          the raw dataset; data.root: folder to write to
data.num_workers  number of processes (0: this one alone)
data.image_size   grid of the prepared images; data.spatial_dims: 2 or 3
data.cine         mnms2: true adds the frames of the CINE, without maps, to what autoencoders train on
data.select.*     which classes, split or number of images are prepared at all
data.preprocess.* resizing, intensity, labels, edges, storage

It can be stopped and started again: finished cases are kept as long as raw files and preprocessing
are the same. A bad file ends the run with one line that names it. The last lines (and `inventory` in
index.json) say what was found, what was left out and why, and how the subjects were split.
"""

import shlex

from omegaconf import DictConfig, OmegaConf

from medldm.commands import run_command
from medldm.data.preparation.prepare import prepare_dataset
from medldm.data.prepared import load_index
from medldm.data.raw.inventory import summary
from medldm.data.splits import read_splits
from medldm.errors import told_of
from medldm.overrides import typed_overrides
from medldm.signatures import check_arguments

OPTIONS = (
    "dataset", "spatial_dims", "image_size", "num_workers", "preprocess", "splits", "select", "modalities",
    "label_dir", "task", "cine",
)  # fmt: skip


def task(cfg: DictConfig) -> None:
    raw, root = cfg.data.raw, cfg.data.root  # a missing one is told by its name
    data = OmegaConf.to_container(cfg.data, resolve=True)
    options = {key: data[key] for key in OPTIONS}
    with told_of("data"):
        check_arguments(prepare_dataset, options)
    prepared = prepare_dataset(raw=raw, root=root, command=command_line(), **options)
    inventory = load_index(prepared)["inventory"]
    print("\n".join(summary(inventory, read_splits(prepared / "splits.json"))))
    print(prepared)


def command_line() -> str | None:
    """What was typed, so that messages can repeat it with a change; None outside the command line."""
    typed = typed_overrides()
    return None if typed is None else shlex.join(["medldm", "prepare", *typed])


def main() -> None:
    run_command(task, "prepare")


if __name__ == "__main__":
    main()
