"""Runs one evaluation: reads images from folders, measures them, and writes numbers and pictures."""

import csv
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medldm.errors import InputError, told_of
from medldm.evaluation import screen
from medldm.evaluation.baselines import (
    TrainingSet,
    make_rows,
    read_training_set,
)
from medldm.evaluation.browsing import write_browser
from medldm.evaluation.closest import name_closest, write_closest
from medldm.evaluation.conditions import Conditions, read_conditions
from medldm.evaluation.diversity import measure_diversity
from medldm.evaluation.folders import read_samples
from medldm.evaluation.foreign import Reading
from medldm.evaluation.matching import attributes_to_match, choose_match, has_partner
from medldm.evaluation.measure import Measured, measure
from medldm.evaluation.names import besides, faults_of
from medldm.evaluation.origins import describe_inputs, for_report, read_provenance
from medldm.evaluation.pairs import (
    Pair,
    edge_recipe,
    group_members,
    known_facts,
    make_pairs,
    training_subjects,
    view_names,
    withhold,
)
from medldm.evaluation.panels import choose, draw_panel
from medldm.evaluation.results import build_results, case_columns, jsonable, spacing_of
from medldm.evaluation.shares import key_of, measure_share
from medldm.evaluation.slices import axial_axis, orientation_of
from medldm.evaluation.tools import Segmenter, Tools, build_tools
from medldm.evaluation.translation import make_translation_pairs
from medldm.files import inside, replacing, write_json
from medldm.locks import FINISHING, while_beginning
from medldm.metrics.catalogue import find_metric, select_metrics
from medldm.metrics.summary import Bootstrap
from medldm.progress import progress
from medldm.shards import Shard

PANEL_ORDER = ("nmse_var", "dice_mean", "psnr")  # by which best, median and worst are chosen
KNOWN_BASELINES = ("mean_image", "random_real", "shuffled")
Folders = Mapping[str, Path | None]  # by their role: generated, reference, train, ...


class Inputs(NamedTuple):
    """The images of an evaluation, and what is known of them."""

    folders: Folders
    reading: Reading  # how images of other programs are read
    facts: Mapping[str, Any]  # the reference's index.json; empty where it is a folder of images
    provenance: Mapping[str, Mapping[str, Any]]  # provenance.json by the role of its folder
    pairs: Sequence[Pair]
    conditions: Conditions  # what the generated images were drawn under

    @property
    def split(self) -> str:
        """The split of the dataset that the images were sampled under, as far as it is known."""
        return self.provenance.get("generated", {}).get("data_split", "default")

    @property
    def orientation(self) -> str:
        return orientation_of(self.facts, self.pairs[0].attributes)


class Outcome(NamedTuple):
    """The content of metrics.json and of per_case.csv, and the values by which pictures are chosen."""

    results: dict[str, Any]
    table: tuple[list[str], list[list]]
    generated: Mapping[str, Sequence[float]]


def check_settings(settings: Mapping[str, Any]) -> None:
    """InputError for a metric or a baseline that there is not, before any image is read."""
    with told_of("metrics.image"):
        select_metrics(settings["image"])
    for name in settings["baselines"]:
        if name not in KNOWN_BASELINES:
            known = ", ".join(KNOWN_BASELINES)
            raise InputError(f"metrics.baselines: no baseline '{name}'; choose from {known}")


def read_inputs(folders: Folders, settings: Mapping[str, Any], reading: Reading) -> Inputs:
    """The images that are judged with their real partners: by name, or a translation with its source and
    target. Images stay in their files until they are measured.
    """
    with besides(lambda: faults_of(partial(read_samples, folders["generated"]))):
        facts, provenance = known_facts(folders["reference"]), read_provenance(folders)
    three = (folders["generated"], folders["reference"], folders["reconstruction"])
    if settings["translation"]:
        others = {name: folders[name] for name in ("spade", "regression") if folders[name]}
        pairs = make_translation_pairs(*three, others, reading)
    else:
        pairs = make_pairs(*three, reading)
    conditions = read_conditions(provenance.get("generated", {}))
    withhold(pairs, conditions)
    return Inputs(folders, reading, facts, provenance, pairs, conditions)


def make_tools(
    inputs: Inputs, settings: Mapping[str, Any], weights_dir: str | None, segmenter: Segmenter | None
) -> Tools:
    """The metrics that `settings` (a file of configs/metrics) choose, with their networks."""
    facts, shape = inputs.facts, inputs.pairs[0].real.shape
    axis = axial_axis(facts, inputs.pairs[0].attributes) if len(shape) == 4 else None
    depth = 0 if axis is None else min(pair.real.shape[axis + 1] for pair in inputs.pairs)
    tools = build_tools(
        select_metrics(settings["image"]),
        recipe=edge_recipe(facts),
        view_names=view_names(facts),
        tolerances=settings["edge_tolerances"],
        networks=settings["features"],
        lpips=settings["lpips"],
        weights_dir=weights_dir,
        image_shape=shape,
        axial_axis=axis,
        num_slices=min(depth, settings["max_slices"] or depth),
        segmenter=segmenter,
        regions=settings["regions"],
        fid_features=settings["fid_features"],
        spacing=common_spacing(inputs.pairs) if len(shape) == 4 else None,
    )
    tools.edges_given = any(pair.edges is not None for pair in inputs.pairs)
    return tools


def common_spacing(pairs: Sequence[Pair]) -> list[float] | None:
    """The voxel size in mm; None where it is not known, and empty where there are several."""
    spacing = spacing_of(pairs)
    is_known = any(pair.attributes.get("spacing") is not None for pair in pairs)
    return [] if spacing is None and is_known else spacing


def read_training(
    inputs: Inputs, tools: Tools, split: str, names: Sequence[str]
) -> tuple[TrainingSet | None, str]:
    """What is kept of the training set, and a line that says where the mean images come from."""
    train = inputs.folders["train"]
    if train is None:
        return None, "mean over every other subject of the reference set (leave one subject out), per view"
    subjects = training_subjects(train, split)
    evaluated = {pair.subject for pair in inputs.pairs}
    embedders = {name: partial(embed_on, tools.device, embed) for name, embed in tools.embedders().items()}
    with torch.no_grad():
        training = read_training_set(train, subjects, evaluated, inputs.reading, names, embedders)
    tools.train_thumbnails, tools.train_embeddings = training.thumbnails, training.embeddings
    whose = f"split '{split}' of {train}" if subjects is not None else f"all of {train}"
    count = training.num_images
    return training, f"mean over {count} training images, {whose}, judged subjects left out, per view"


def embed_on(device: torch.device, embed: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    return embed(image.to(device)).cpu()


def judge(
    inputs: Inputs,
    tools: Tools,
    settings: Mapping[str, Any],
    bootstrap: Bootstrap,
    *,
    train_split: str | None = None,
    shard: Shard | None = None,
) -> Outcome | None:
    """Measures the generated images and the rows beside them. `tools` are on their device; `train_split`
    names the split whose training images make the mean image, by default the one of the samples. With a
    `shard` this process measures that share alone, and all but the last to end have no outcome: None.
    """
    pairs, conditions, seed = inputs.pairs, inputs.conditions, bootstrap.seed
    wanted = attributes_to_match(settings["match"], conditions, inputs.facts, pairs)
    training, mean_source = read_training(inputs, tools, train_split or inputs.split, wanted.names)
    rows = make_rows(
        pairs,
        settings["baselines"],
        training=training and training.means,
        seed=seed,
        match=wanted,
        relax=settings["match"] == "auto",
    )
    groups = group_members(pairs, inputs.facts)
    how = measure
    if shard is not None:
        chosen = {"settings": settings, "seed": seed, "train_split": train_split, "split": inputs.split}
        key = key_of(inputs.folders, inputs.facts, pairs, **chosen)
        how = partial(measure_share, inputs.folders["output"], shard, key)
    measured = measure_with_progress(how, pairs, rows.images, tools)
    if measured is None:
        return None
    alike = {"generated": rows.images["generated"], "real": [pair.real for pair in pairs]}
    told = attributes_to_match("auto", conditions, inputs.facts, pairs)
    shared = choose_match(told, partial(has_partner, pairs), relax=True).attributes
    diversity = measure_diversity(pairs, alike, settings["ms_ssim_pairs"], seed, shared)
    results = build_results(
        pairs, measured, tools, groups, bootstrap, settings["kernel"], diversity, rows.matches, conditions
    )
    name_closest(results["memorization"], pairs, training)
    generated = measured.values["generated"]
    results["warnings"] = [*inputs.reading.notes, *rows.missing, *results["warnings"]]
    results |= {"folders": inputs.folders, "mean_image": mean_source, "metrics": settings}
    results |= {"dataset": inputs.facts.get("dataset"), "panels_by": panel_metric(generated)}
    results |= {"provenance": for_report(inputs.provenance)}
    results |= {"inputs": describe_inputs(inputs.folders, inputs.facts)}
    return Outcome(results, case_columns(pairs, measured, groups), generated)


def measure_with_progress(
    how: Callable, pairs: Sequence[Pair], rows: Mapping[str, Sequence], tools: Tools
) -> Measured | None:
    with progress("evaluating", len(pairs)) as advance:
        return how(pairs, rows, tools, advance)


def write_outcome(
    output: Path, inputs: Inputs, outcome: Outcome, *, panel_rows: int, num_browsed: int
) -> None:
    """Everything that an evaluation leaves in `output`; where several share it, one of them at a time."""
    with while_beginning(output, wait=FINISHING):
        write_results(output, outcome)
        write_pictures(output, inputs, outcome, panel_rows=panel_rows, num_browsed=num_browsed)


def write_results(output: Path, outcome: Outcome) -> None:
    """metrics.json and per_case.csv in `output`."""
    header, lines = outcome.table
    with replacing(output / "per_case.csv") as temporary, open(temporary, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(lines)
    write_json(output / "metrics.json", jsonable(outcome.results))


def panel_metric(values: Mapping[str, Sequence[float]]) -> str:
    return next((name for name in PANEL_ORDER if name in values), next(iter(values)))


def write_pictures(
    output: Path, inputs: Inputs, outcome: Outcome, *, panel_rows: int, num_browsed: int
) -> None:
    """panels/, closest/, and browser/ for the report's slice browser."""
    write_panels(output, inputs, outcome, panel_rows)
    write_closest(
        output,
        outcome.results["memorization"],
        inputs.pairs,
        inputs.folders["train"],
        inputs.reading,
        inputs.orientation,
    )
    name = panel_metric(outcome.generated)
    write_browser(output, inputs.pairs, outcome.generated[name], name, num_browsed, inputs.orientation)


def write_panels(output: Path, inputs: Inputs, outcome: Outcome, num_rows: int) -> None:
    """panels/{best,median,worst}.png by the first of `PANEL_ORDER`, or by the first metric there is."""
    panels = inside(output, "panels", "best.png").parent
    for path in panels.glob("*.png"):
        path.unlink()  # of an earlier evaluation
    if num_rows < 1:
        return
    name = panel_metric(outcome.generated)
    values, pairs = outcome.generated[name], inputs.pairs
    for kind, chosen in choose(values, num_rows, not find_metric(name).higher_is_better).items():
        if chosen:
            captions = [f"{pairs[i].id}\n{name} {values[i]:.3f}" for i in chosen]
            figure = draw_panel([pairs[i].loaded() for i in chosen], captions, inputs.orientation)
            with replacing(panels / f"{kind}.png") as temporary:
                figure.savefig(temporary, format="png")


def show_results(results: Mapping[str, Any]) -> None:
    """The tables on screen, and every note."""
    tables = [screen.main_table(results)]
    if results["distribution"]:
        tables.append(screen.distribution_table(results))
    lines = [table for lines in screen.LINES for table in lines(results)]
    screen.print_tables([*tables, *lines, *screen.group_tables(results)], screen.notes_of(results))
