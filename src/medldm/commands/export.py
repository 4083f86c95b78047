"""medldm export: prepared images as 8-bit PNG slices, or a checkpoint as safetensors with a model card.

  medldm export root=DATA output=DIR
  medldm export format=safetensors checkpoint=CKPT output=DIR [licence=CC-BY-4.0] [evaluation=DIR]

png, for people and 2D programs: DIR/images/<split>/<case>_<slice>.png, [-1, 1] as 0 to 255, and where there
are maps DIR/masks/all/<split>/<case>_<slice>.png with the class numbers: the two folders that
segmentation-guided diffusion (Konz et al. 2024) trains on. Slices of volumes are axial ones, numbered from
the first of the prepared array; `medldm evaluate generated=DIR/images/test reference=DATA` puts pictures of
these names together again. Keys: root, output, split (a name in splits.json). Run it again to continue, or to
replace the slices of cases that were prepared again.
safetensors, to give a model away: DIR/model.safetensors, which every command and `medldm.load` take as a
checkpoint, DIR/config.yaml, and DIR/README.md: data, split, licence, metrics and intended use. The state of
the training is left out. Keys: checkpoint, output, licence, evaluation (a folder of `medldm evaluate`).
"""

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from medldm.commands import clean_after_failure, run_command
from medldm.errors import InputError
from medldm.exporting import export_slices
from medldm.sharing import share_checkpoint

FORMATS = ("png", "safetensors")


def check_format(cfg: DictConfig) -> None:
    """InputError for an unknown format, and for keys that belong to the other one."""
    if cfg.format not in FORMATS:
        raise InputError(f"format={cfg.format}: choose {' or '.join(FORMATS)}")
    of_weights = [key for key in ("checkpoint", "licence", "evaluation") if cfg[key] is not None]
    if cfg.format == "png" and of_weights:
        raise InputError(f"{of_weights[0]}: has no effect on pictures; leave it out, or format=safetensors")
    if cfg.format == "safetensors" and (not OmegaConf.is_missing(cfg, "root") or cfg.split != "default"):
        raise InputError("root, split: have no effect on weights; leave them out, or format=png")
    if cfg.format == "safetensors" and cfg.checkpoint is None:
        raise InputError("checkpoint: not given; name the model as checkpoint=CKPT")


@clean_after_failure("output")
def task(cfg: DictConfig) -> None:
    check_format(cfg)
    if cfg.format == "png":
        export_slices(Path(cfg.root), Path(cfg.output), cfg.split)
        print(cfg.output)
        return
    for path in share_checkpoint(
        cfg.checkpoint, Path(cfg.output), licence=cfg.licence, evaluation=cfg.evaluation
    ):
        print(path)


def main() -> None:
    run_command(task, "export")


if __name__ == "__main__":
    main()
