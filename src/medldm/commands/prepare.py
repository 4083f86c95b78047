"""medldm prepare: raw images -> prepared cases, index.json and splits.json.

    medldm prepare data=mnms2 data.raw=DIR data.root=OUT
    medldm prepare data=folder data.raw=DIR data.root=OUT data.spatial_dims=3

data              mnms2 (M&Ms-2 as published), nih_cxr14, chestxray or class_folders (one folder a class),
                  or folder (images/ and masks/, or manifest.csv)
data.raw          the raw dataset; data.root: folder to write to
data.num_workers  processes (0: none beside this one)
data.image_size   grid of the prepared images; data.spatial_dims: 2 or 3
data.cine         mnms2: true adds the frames of the CINE, without maps, to what autoencoders train on
data.select.*     classes, split, max_images: what is prepared at all
data.preprocess.* resizing, intensity, labels, edges, storage

It can be stopped and started again: finished cases are kept as long as raw files and preprocessing
are the same. A bad file ends the run with one line that names it. The last lines (and `inventory` in
index.json) say what was found, what was left out and why, and how the subjects were split.
"""

import shlex
from typing import TYPE_CHECKING

from medldm.commands import run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def task(cfg: "DictConfig") -> None:
    from omegaconf import OmegaConf

    from medldm.data.preparation.prepare import prepare_dataset
    from medldm.data.raw.inventory import summary
    from medldm.data.raw.readers import load_index
    from medldm.data.splits import read_splits

    raw, root = cfg.data.raw, cfg.data.root
    data = OmegaConf.to_container(cfg.data, resolve=True)
    keys = ("dataset", "spatial_dims", "image_size", "num_workers", "preprocess", "splits", "select")
    options = {key: data[key] for key in (*keys, "modalities", "label_dir", "task", "cine")}
    prepared = prepare_dataset(raw=raw, root=root, command=command_line(), **options)
    inventory = load_index(prepared)["inventory"]
    print("\n".join(summary(inventory, read_splits(prepared / "splits.json"))))
    print(prepared)


def command_line() -> str | None:
    """What was typed, to be told again; None outside the command line."""
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized():
        return None
    return shlex.join(["medldm", "prepare", *HydraConfig.get().overrides.task])


def main() -> None:
    run_command(task, "prepare", __doc__)


if __name__ == "__main__":
    main()
