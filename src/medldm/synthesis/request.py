"""Checks the request of `medldm sample`: settings must have an effect, and the model must not know the
subjects.
"""

import logging
from typing import Any

from omegaconf import DictConfig, OmegaConf

from medldm.attributes import check_class_names
from medldm.averages import use_average
from medldm.conditions import check_facts, embedded, number_as_trained
from medldm.data import build_datamodule
from medldm.data.loading.datamodule import CaseDataModule
from medldm.data.loading.dataset import CaseDataset
from medldm.data.splits import SUBSETS
from medldm.diffusion.condition import check_drop
from medldm.diffusion.sampler import check_guidance, override_sampler
from medldm.diffusion.windows import WINDOWS_KEPT, Windows
from medldm.errors import InputError, told_of
from medldm.held_out import check_held_out, seen_subjects
from medldm.models.common import TrainedModule
from medldm.outputs import VIDEO_FORMATS
from medldm.sampling import Predictor

log = logging.getLogger(__name__)
WINDOW_OVERLAP, INTERPOLATION_TIME = 0.5, 0.5  # as in configs/sample.yaml


def check_request(cfg: DictConfig, predictor: Predictor) -> None:
    """InputError for a setting that this request would not use."""
    sampler = [f"sampler.{key}" for key, value in cfg.sampler.items() if value is not None]
    changed = {"num_samples": cfg.num_samples != 1, "drop": cfg.drop, "trajectory": cfg.trajectory}
    options = [key for key, is_set in changed.items() if is_set]
    if not predictor.is_generative and [*options, *sampler]:
        key = [*options, *sampler][0]
        raise InputError(f"{key}: this checkpoint (or stage) draws no samples; leave it out")
    if cfg.interpolate.count and cfg.shard is not None:
        raise InputError(f"shard={cfg.shard}: interpolations are not divided; set it to null")
    if cfg.interpolate.count and (options or cfg.max_slices is not None):
        key = [*options, "max_slices"][0]
        raise InputError(f"{key}: has no effect on interpolations; leave it out, or interpolate.count=0")
    if not cfg.interpolate.count and cfg.interpolate.time != INTERPOLATION_TIME:
        raise InputError("interpolate.time: has no effect without interpolate.count; set that to 2 or more")
    if cfg.video_format not in VIDEO_FORMATS:
        raise InputError(f"video_format={cfg.video_format} is none of {', '.join(VIDEO_FORMATS)}")
    if cfg.video_format != "gif" and not (cfg.trajectory or cfg.interpolate.count):
        raise InputError(
            f"video_format={cfg.video_format}: has no effect without trajectory or interpolate.count"
        )
    for key, default in (("overlap", WINDOW_OVERLAP), ("keep", WINDOWS_KEPT)):
        if cfg.windows.size is None and cfg.windows[key] != default:
            raise InputError(f"windows.{key}: has no effect without windows.size; give that too")


def average_as_asked(cfg: DictConfig, module: TrainedModule) -> None:
    """Gives the model the average of the length `ema_length`, where one is asked for."""
    if cfg.ema_length is None:
        return
    if cfg.weights != "ema" or module.ema_modules is None:
        raise InputError(f"ema_length={cfg.ema_length}: has no effect without an average; set it to null")
    use_average(module.ema_modules, cfg.checkpoint, cfg.ema_length)


def choose_sampler(cfg: DictConfig, module: TrainedModule) -> None:
    """The checkpoint's sampler with the user's changes; InputError where it or `drop` cannot work."""
    given = OmegaConf.to_container(cfg.sampler)
    has_guide = given.pop("guide") is not None
    check_drop(module.conditioner, tuple(cfg.drop))
    with told_of("sampler"):
        module.sampler = override_sampler(module.sampler, given)
        check_guidance(module.sampler, module.conditioner, tuple(cfg.drop), has_guide=has_guide)


def check_latent(predictor: Predictor, key: str) -> None:
    """InputError for a `key` that only latent diffusion can serve."""
    if not predictor.is_latent:
        raise InputError(f"{key}: needs a latent diffusion checkpoint; set it to its default")


def windows_of(cfg: DictConfig, module: TrainedModule, predictor: Predictor) -> Windows | None:
    """The windows that are asked for, None where none are. InputError where the model cannot denoise in
    windows.
    """
    if cfg.windows.size is None:
        return None
    check_latent(predictor, "windows.size")
    given = cfg.windows
    with told_of("windows"):
        return Windows.of_image(tuple(given.size), module.first_stage.downsampling, given.overlap, given.keep)


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


def check_subjects(
    cfg: DictConfig, module: TrainedModule, datamodule: CaseDataModule, subjects: set[str]
) -> dict[str, Any]:
    """What provenance.json says of subjects that the checkpoint was trained on: those of the whole folder, so
    that whoever uses the images can tell. InputError where a held-out part has one of them.
    """
    known, unrecorded = set(), []
    paths = {"checkpoint": cfg.checkpoint, "sampler.guide": cfg.sampler.guide}
    for (key, path), model in zip(paths.items(), (module, *getattr(module, "guides", ())), strict=False):
        seen = seen_subjects(model.description, datamodule.index)
        if cfg.split in ("val", "test"):
            allow = bool(cfg.allow_training_subjects)
            check_held_out(seen, subjects, path, cfg.split, allow=allow, key=key)
        known |= seen.all
        unrecorded += seen.unrecorded
    return {"training_subjects": sorted(known), "unrecorded_stages": unrecorded}


def give_units(dataset: CaseDataset, facts: dict[str, Any]) -> None:
    """Gives cases without an image, which state no intensities, the range that is typical of the training
    data.
    """
    ranges = facts.get("intensity_ranges") or {}
    for item in dataset.every_item():
        label = dataset.number("label", item) if facts.get("label_values") else 0
        typical = ranges.get(label)
        if typical is not None:
            dataset.cases[item.case]["intensity_range"] = list(typical)
        elif ranges:
            log.warning("%s: its units are unknown; it is written in [0, 1]", dataset.item_id(item))
            dataset.cases[item.case]["intensity_range"] = [0.0, 1.0]
