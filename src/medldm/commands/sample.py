"""medldm sample: write generated images for the conditions of a prepared dataset.

  medldm sample checkpoint=runs/.../best.ckpt data.root=DATA output=DIR split=test
  medldm sample ... sampler.num_steps=50 sampler.guidance_scale=2 num_samples=4 drop=[edges] seed=1

Of a translation model (ALDM) it writes every ordered pair of the split, <subject>_<source>_to_<target>;
stage=spade leaves out the diffusion, stage=autoencoder writes the targets' reconstructions.
With a stage-one checkpoint it writes that autoencoder's reconstructions instead: the ceiling of stage two;
with a regression checkpoint the predictions of every pair (data.pair_labels=[[t1,t2]]) as
<subject>_<source>_to_<target>.
A split that holds subjects which the checkpoint, or a stage inside it, was trained on is refused unless
allow_training_subjects=true.
Keys: split (train, val, test, all), num_samples, sampler.{kind,num_steps,guidance_scale,eta,...}, drop,
edge_level, limit, max_slices, weights (ema or raw), data.batch_size, seed, device,
precision (auto, bf16-mixed, 32-true; the last step and the image itself are float32 in each).
Volumes larger than those of training: windows.size=[32,256,256] (voxels; null: a whole axis) denoises in
overlapping windows, tile=64 decodes in tiles with the same result.
trajectory=20 also writes that many steps of each case as a GIF; interpolate.count=5 writes volumes between
each two neighbouring cases instead.
Writes per case HDF5 with the conditions (3D also NIfTI on the source's grid and in its units), 8-bit PNGs
and provenance.json. Run it again to continue.

Maps of your own need no images: put them into RAW/masks, run `medldm prepare data=folder data.raw=RAW ...`
with the size, spacing and orientation of the model's data, and sample with split=all.
"""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from rich.progress import Progress, track

from medldm.attributes import check_class_names
from medldm.build import load_module
from medldm.commands import clean_after_failure, run_command
from medldm.conditions import check_facts, embedded, number_as_trained
from medldm.data import build_datamodule
from medldm.data.loading.datamodule import CaseDataModule
from medldm.data.loading.dataset import CaseDataset
from medldm.data.splits import SUBSETS
from medldm.devices import inference_precision, pick_device
from medldm.diffusion.conditioner import check_drop
from medldm.diffusion.sampler import check_guidance, override_sampler
from medldm.diffusion.windows import Windows
from medldm.errors import InputError
from medldm.files import safe_name
from medldm.fingerprints import digest
from medldm.held_out import check_held_out, seen_subjects
from medldm.inference import items_by_case
from medldm.models.common import TrainedModule
from medldm.outputs import SampleFolder
from medldm.sampling import (
    Predictor,
    Recorder,
    Request,
    interpolate,
    predictor_of,
    sample_cases,
    spread,
)

log = logging.getLogger(__name__)
WINDOW_OVERLAP, INTERPOLATION_TIME = 0.5, 0.5  # as in configs/sample.yaml
SEED_STRIDE = 1_000_003  # between the samples of a condition


def windows_of(cfg: DictConfig, module: TrainedModule, predictor: Predictor) -> Windows | None:
    """InputError where the model denoises nothing larger than its training windows."""
    if cfg.windows.size is None:
        return None
    check_latent(predictor, "windows.size")
    return Windows.of_image(tuple(cfg.windows.size), module.first_stage.downsampling, cfg.windows.overlap)


def check_request(cfg: DictConfig, predictor: Predictor) -> None:
    """InputError for a setting that this request would not use."""
    sampler = [f"sampler.{key}" for key, value in cfg.sampler.items() if value is not None]
    changed = {"num_samples": cfg.num_samples != 1, "drop": cfg.drop, "trajectory": cfg.trajectory}
    options = [key for key, is_set in changed.items() if is_set]
    if not predictor.is_generative and [*options, *sampler]:
        key = [*options, *sampler][0]
        raise InputError(f"{key}: this checkpoint (or stage) draws no samples; leave it out")
    if cfg.interpolate.count and (options or cfg.max_slices is not None):
        key = [*options, "max_slices"][0]
        raise InputError(f"{key}: has no effect on interpolations; leave it out, or interpolate.count=0")
    if not cfg.interpolate.count and cfg.interpolate.time != INTERPOLATION_TIME:
        raise InputError("interpolate.time: has no effect without interpolate.count; set that to 2 or more")
    if cfg.windows.size is None and cfg.windows.overlap != WINDOW_OVERLAP:
        raise InputError("windows.overlap: has no effect without windows.size; give that too")


def choose_sampler(cfg: DictConfig, module: TrainedModule) -> None:
    """The checkpoint's sampler with the user's changes; InputError where it or `drop` cannot work."""
    module.sampler = override_sampler(module.sampler, OmegaConf.to_container(cfg.sampler))
    check_drop(module.conditioner, tuple(cfg.drop))
    check_guidance(module.sampler, module.conditioner, tuple(cfg.drop))


def check_latent(predictor: Predictor, key: str) -> None:
    if not predictor.is_latent:
        raise InputError(f"{key}: needs a latent diffusion checkpoint; set it to its default")


def build_dataset(
    cfg: DictConfig, module: TrainedModule, keys: tuple[str, ...]
) -> tuple[CaseDataset, CaseDataModule]:
    """The cases to sample, and the data module that they come from."""
    if cfg.split not in (*SUBSETS, "all"):
        raise InputError(f"split={cfg.split} is none of {', '.join(SUBSETS)}, all")
    data = OmegaConf.to_container(cfg.data, resolve=True) | {"latents": None, "crop_size": None}
    data["pairs"] = "all" if "source" in keys else None
    datamodule = build_datamodule(data, keys=keys, seed=cfg.seed)
    prepared = datamodule.facts
    if prepared.get("has_images") is False and prepared["num_classes"] < (module.facts["num_classes"] or 0):
        prepared |= {"num_classes": module.facts["num_classes"]}  # not all maps show every class
    check_facts(module.facts, prepared, cfg.checkpoint, data["root"])
    if "mask" in keys:
        check_class_names(module.facts, prepared, f"{cfg.checkpoint}: trained on", data["root"])
    dataset = datamodule.dataset(cfg.split, edge_level=cfg.edge_level).as_cases()
    number_as_trained(dataset, module.facts, *embedded(module, keys))
    return dataset, datamodule


def write_interpolations(
    cfg: DictConfig,
    module: TrainedModule,
    windows: Windows | None,
    dataset: CaseDataset,
    folder: SampleFolder,
    positions: list[int],
) -> None:
    """Volumes between neighbouring cases: <output>/interpolation/<a>_to_<b>.{h5,gif}."""
    count = cfg.interpolate.count
    if count < 2 or len(positions) < 2:
        raise InputError(f"interpolate.count={count}: give 2 or more, and a split of two cases or more")
    shares = [k / (count - 1) for k in range(count)]
    request = Request(cfg.seed, windows=windows, precision=cfg.precision)
    for pair in track(list(zip(positions, positions[1:], strict=False)), "interpolating", transient=True):
        batch = dataset.__getitems__([(0, p) for p in pair])
        images = interpolate(module, batch, shares, time=cfg.interpolate.time, request=request)
        folder.write_series(f"interpolation/{safe_name('_to_'.join(batch['case_id']))}", images, shares)


def write_trajectory(
    module: TrainedModule, recorder: Recorder, folder: SampleFolder, done: Any, name: str
) -> None:
    folder.write_gif(f"trajectory/{name}", recorder.decoded(module, done.batches[-1]))


@clean_after_failure("output")
def task(cfg: DictConfig) -> None:
    device = pick_device(cfg.device)
    precision = inference_precision(cfg.precision, device)
    module = load_module(cfg.checkpoint, weights=cfg.weights).to(device)
    predictor = predictor_of(module, stage=cfg.stage, tile=cfg.tile)
    check_request(cfg, predictor)
    if predictor.is_generative:
        choose_sampler(cfg, module)
    windows, keys = windows_of(cfg, module, predictor), predictor.keys
    for key, is_set in (("trajectory", cfg.trajectory), ("interpolate.count", cfg.interpolate.count)):
        if is_set:
            check_latent(predictor, key)
    if cfg.interpolate.count:
        keys = tuple(dict.fromkeys(("image", *keys)))
    dataset, datamodule = build_dataset(cfg, module, keys)
    cases = list(items_by_case(dataset.items).items())[: cfg.limit]
    if not cases:
        raise InputError(f"split={cfg.split}: no case of {cfg.data.root} is in it; see its splits.json")
    about = describe_run(cfg, module, predictor, precision) | describe_data(cfg, dataset)
    about |= check_subjects(cfg, module, datamodule, {dataset.cases[case]["subject"] for case, _ in cases})
    folder = SampleFolder(Path(cfg.output), dataset, about, png=cfg.png)
    if cfg.interpolate.count:
        write_interpolations(cfg, module, windows, dataset, folder, [positions[0] for _, positions in cases])
        print(cfg.output)
        return

    if datamodule.facts.get("has_images") is False:
        give_units(dataset, module.facts)
    write_samples(cfg, predictor, module, windows, folder, dict(cases), datamodule.facts["image_size"])
    print(cfg.output)


def write_samples(
    cfg: DictConfig,
    predictor: Predictor,
    module: TrainedModule,
    windows: Windows | None,
    folder: SampleFolder,
    cases: Mapping[int, list[int]],
    image_size: Sequence[int],
) -> None:
    """The images of all items of `cases` (case -> positions) that the folder lacks, case by case."""
    dataset, precision = folder.dataset, inference_precision(cfg.precision, module.device)

    def size_of(case: int) -> tuple[int, ...]:
        return tuple(dataset.cases[case].get("shape") or image_size)[-dataset.spatial_dims :]

    recorder = Recorder(module.sampler.num_steps, cfg.trajectory, precision) if cfg.trajectory else None
    seeds = [cfg.seed + SEED_STRIDE * k for k in range(cfg.num_samples if predictor.is_generative else 1)]
    requests = [Request(seed, tuple(cfg.drop), windows, precision=precision) for seed in seeds]
    requests[0] = requests[0]._replace(callback=recorder)
    jobs = [(case, spread(positions, cfg.max_slices)) for case, positions in cases.items()]
    with Progress() as progress:
        total = len(seeds) * sum(len(positions) for _, positions in jobs)
        bar = progress.add_task("sampling" if predictor.is_generative else "predicting", total=total)
        missing = set(folder.pending([case for case, _ in jobs]))
        pending = [job for job in jobs if job[0] in missing]
        progress.advance(bar, total - len(seeds) * sum(len(positions) for _, positions in pending))
        # A recorder looks at one case at a time.
        for part in [[job] for job in pending] if recorder else [pending]:
            for done in sample_cases(
                predictor,
                dataset,
                part,
                size_of=size_of,
                requests=requests,
                batch_size=cfg.data.batch_size,
                advance=lambda count: progress.advance(bar, count),
            ):
                if recorder is not None:
                    write_trajectory(module, recorder, folder, done, dataset.cases[done.case]["id"])
                folder.write(done.case, done.positions, done.samples, done.batches)


def give_units(dataset: CaseDataset, facts: dict[str, Any]) -> None:
    """Maps alone tell no intensities: their volumes get those typical of what the model was trained on."""
    ranges = facts.get("intensity_ranges") or {}
    for item in dataset.every_item():
        label = dataset.number("label", item) if facts.get("label_values") else 0
        typical = ranges.get(label)
        if typical is not None:
            dataset.cases[item.case]["intensity_range"] = list(typical)
        elif ranges:
            log.warning("%s: of no known units; written in [0, 1]", dataset.item_id(item))
            dataset.cases[item.case]["intensity_range"] = [0.0, 1.0]


def describe_run(
    cfg: DictConfig, module: TrainedModule, predictor: Predictor, precision: str
) -> dict[str, Any]:
    """What provenance.json says: everything that decides what is written."""
    conditioner = module.conditioner
    return {
        "checkpoint": str(cfg.checkpoint),
        "checkpoint_sha256": module.checkpoint_sha256,
        "weights": cfg.weights,
        "stage": predictor.stage,
        "decoder": describe_decoder(module),
        "condition_channels": None if conditioner is None else conditioner.spade_channels,
        "sampler": describe_sampler(module) if predictor.is_generative else None,
        "condition": list(predictor.keys) if predictor.is_generative else None,
        "attributes": [] if conditioner is None else list(conditioner.attributes),
        "dropped": list(cfg.drop),
        "edge_level": cfg.edge_level,
        "seed": cfg.seed,
        "precision": precision,
        "num_samples": cfg.num_samples,
        "max_slices": cfg.max_slices,
        "windows": [*cfg.windows.size, cfg.windows.overlap] if cfg.windows.size else None,
        "interpolate": [cfg.interpolate.count, cfg.interpolate.time] if cfg.interpolate.count else None,
        "torch": torch.__version__,
    }


def describe_data(cfg: DictConfig, dataset: CaseDataset) -> dict[str, Any]:
    """The part of provenance.json that is about the conditions; each case's file knows its own."""
    data = OmegaConf.to_container(cfg.data, resolve=True)
    names = sorted({dataset.cases[item.case]["id"] for item in dataset.items})
    return {
        "data_root": str(Path(cfg.data.root).resolve()),
        "data_split": data["split"],
        "split": cfg.split,
        "cases": f"{len(names)}, digest {digest(names)}",
        "views": data["views"],
        "edge_degrade": data["edge_degrade"] if cfg.edge_level is not None else None,
    }


def check_subjects(
    cfg: DictConfig, module: TrainedModule, datamodule: CaseDataModule, subjects: set[str]
) -> dict[str, Any]:
    """What provenance.json says of subjects that the checkpoint was trained on: those of the whole folder, so
    that whoever uses the images can tell. InputError where a held-out part has one of them.
    """
    seen = seen_subjects(module.description, datamodule.index)
    if cfg.split in ("val", "test"):
        allow = bool(cfg.allow_training_subjects)
        check_held_out(seen, subjects, cfg.checkpoint, cfg.split, allow=allow, key="checkpoint")
    return {"training_subjects": sorted(seen.all), "unrecorded_stages": seen.unrecorded}


def describe_decoder(module: TrainedModule) -> str | None:
    """What decodes: "spade" where it sees the map, "plain" where not, None where there is no autoencoder."""
    if module.image_decoder is None:
        return None
    return "plain" if module.image_decoder.decoder_map_channels is None else "spade"


def describe_sampler(module: TrainedModule) -> dict[str, Any]:
    return {"kind": type(module.sampler).__name__} | dataclasses.asdict(module.sampler)


def main() -> None:
    run_command(task, "sample")


if __name__ == "__main__":
    main()
