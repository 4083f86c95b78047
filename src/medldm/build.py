"""Builds models from configs, with the stages that they stand on, and trained models from checkpoints.

A config names its parts by `_target_`; `medldm.builders.kinds` has the builder of each kind of model.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medldm.attributes import check_class_names
from medldm.builders.allowance import Allowance, memory_of_machine
from medldm.builders.keys import check_parts
from medldm.builders.kinds import MODELS, EarlierStages, batch_keys, kind_of, module_class
from medldm.checkpoints import fit_weights, read_hashed
from medldm.diffusion.latent import FirstStage, PixelStage
from medldm.errors import InputError, told_of
from medldm.models.common import TrainedModule
from medldm.models.segmentation import SegmentationModule
from medldm.signatures import check_arguments

__all__ = [
    "MODELS", "batch_keys", "build_module", "load_first_stage", "load_module", "load_segmenter_of",
    "module_class",
]  # fmt: skip
BASE_KEY = "model.adapter.checkpoint"
BASE_PARTS = ("network", "conditioner", "schedule", "objective", "first_stage", "map_stage")
SLACK = 2**30  # bytes that building a model may take beside its weights: discriminators, tables


def build_module(
    model: Mapping[str, Any],
    facts: Mapping[str, Any],
    first_stage: Mapping[str, Any] | None = None,
    map_stage: Mapping[str, Any] | None = None,
) -> TrainedModule:
    """The module of a config, with fresh weights.

    A second stage loads its first stage from `model.first_stage.checkpoint`, and the encoder of its maps from
    `model.map_stage.checkpoint`. Where the description of a stage is given, the stage is built from that
    instead, with fresh weights: those of the checkpoint that is about to be loaded replace them.
    """
    kind = kind_of(model)
    check_parts(model, "model")
    with told_of("model"):
        check_arguments(kind.module, {key: model[key] for key in model if key != "discriminators"})
    maps = build_map_stage(model, facts, map_stage)
    images = build_first_stage(model, facts, first_stage)
    return kind.build(model, facts, EarlierStages(*images, *maps))


def rebuild(description: Mapping[str, Any], place: str, largest: int | None = None) -> TrainedModule:
    """The module that a checkpoint describes, with fresh weights.

    They have at most `largest` bytes, by default half of this machine's memory. InputError, in one line,
    where nothing can be built from the description.
    """
    stages = (description.get("first_stage"), description.get("map_stage"))
    try:
        with Allowance(largest or memory_of_machine() // 2):
            return build_module(description["model"], description["facts"], *stages)
    except InputError as error:
        raise InputError(f"{place}: {error}") from error
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        raise InputError(f"{place}: its config builds no model: {text}") from error


def restore(path: str | Path, content: Mapping[str, Any], *, weights: str) -> TrainedModule:
    """The module of the `content` of a checkpoint, in eval mode, with "raw" weights or their "ema"."""
    description, state = content["medldm"], content.get("state_dict", {})
    held = sum(value.numel() * value.element_size() for value in state.values())
    module = rebuild(description, str(path), largest=SLACK + 4 * held)
    fit_weights(module, state, f"{path}: state_dict")
    if weights == "ema" and "ema" in content:
        averaged = {
            key.removeprefix("module."): value
            for key, value in content["ema"].items()
            if key.startswith("module.")
        }
        if module.ema_modules is None:
            raise InputError(f"{path}: holds a moving average, which no {description['stage']} model has")
        fit_weights(module.ema_modules, averaged, f"{path}: ema")
    module.facts, module.description = description["facts"], description
    return module.eval()


def load_module(path: str | Path, *, weights: str = "ema") -> TrainedModule:
    """The trained module of a checkpoint, in eval mode, with the checkpoint's `description` and
    `checkpoint_sha256`. `weights`: "ema" (where there are any) or "raw".
    """
    if weights not in ("ema", "raw"):
        raise InputError(f"weights={weights} is none of ema, raw")
    content, sha256 = read_hashed(path)
    module = restore(path, content, weights=weights)
    module.checkpoint_sha256 = sha256
    return module


def load_first_stage(path: str | Path, **options: Any) -> tuple[FirstStage, dict[str, Any]]:
    """The frozen first stage in a checkpoint, and its description with the file's `sha256`."""
    content, sha256 = read_hashed(path)
    description = content["medldm"]
    module = restore(path, content, weights="ema")
    if module.encodes is None:
        raise InputError(
            f"{path}: holds a {description['stage']} model; model.first_stage.checkpoint takes an "
            "autoencoder or a translator"
        )
    return as_first_stage(module, options), description | {"sha256": sha256}


def load_segmenter_of(
    path: str | Path, images: tuple[int, int], facts: Mapping[str, Any], *, key: str, whose: str
) -> SegmentationModule:
    """The trained segmenter of a checkpoint for images of so many (channels, dimensions). InputError, by
    `key`, where it takes others, is none, or numbers other classes than `whose` data with these `facts`.
    """
    module = load_module(path)
    if not isinstance(module, SegmentationModule):
        raise InputError(f"{key}={path}: holds no segmenter; train one with model=segmentation")
    expected = (module.facts["image_channels"], module.facts["spatial_dims"])
    if expected != images:
        raise InputError(
            f"{key}={path}: takes {expected[0]} channels in {expected[1]}D, the images have "
            f"{images[0]} in {images[1]}D"
        )
    check_class_names(module.facts, facts, f"{key}={path}: finds", whose)
    return module


def with_base_parts(model: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a controlled model: its own, with the parts of its base's config. InputError where it
    states such a part itself.
    """
    stated = [key for key in BASE_PARTS if model.get(key) is not None]
    if stated:
        raise InputError(f"model.{stated[0]} has no effect: it is that of {BASE_KEY}; leave it out")
    return {key: base[key] for key in BASE_PARTS if key in base} | dict(model)


# ---- stages ----


def build_first_stage(
    model: Mapping[str, Any], facts: Mapping[str, Any], description: Mapping[str, Any] | None
) -> tuple[FirstStage | PixelStage | None, dict[str, Any] | None]:
    """The first stage of a model with its description: the images themselves where its config names no
    checkpoint, None where its kind has no first stage.
    """
    if "first_stage" not in model:
        return None, None
    if model["first_stage"]["checkpoint"] is None and description is None:
        return PixelStage(facts["image_channels"], spatial_dims=facts["spatial_dims"]), None
    stage, description = build_stage(model["first_stage"], description)
    if description["model"].get("reconstructs") == "mask":
        raise InputError("model.first_stage.checkpoint: an autoencoder of maps; give one of images")
    check_modalities(facts, description)
    if description["model"].get("decoder_sees_map"):
        what = "model.first_stage.checkpoint: decodes under"
        check_class_names(description["facts"], facts, what, "the dataset")
    return stage, dict(description)


def build_map_stage(
    model: Mapping[str, Any], facts: Mapping[str, Any], description: Mapping[str, Any] | None
) -> tuple[FirstStage | None, dict[str, Any] | None]:
    """The encoder of a model's semantic maps with its description, None where it has none."""
    if not model.get("map_stage"):
        return None, None
    stage, description = build_stage(model["map_stage"], description)
    check_map_stage(description, facts)
    stage.fit(())
    return stage, dict(description)


def build_stage(
    options: Mapping[str, Any], description: Mapping[str, Any] | None
) -> tuple[FirstStage, Mapping[str, Any]]:
    """An earlier stage with its description: built from the description with fresh weights where that is
    given, else loaded from the checkpoint that its options name.
    """
    options = dict(options)
    path = options.pop("checkpoint")
    if description is None:
        return load_first_stage(path, **options)
    return as_first_stage(rebuild(description, f"the stage of {path}"), options), description


def as_first_stage(module: TrainedModule, options: Mapping[str, Any]) -> FirstStage:
    """What comes before diffusion: an autoencoder under `options`, or a translator under its own."""
    if options and module.translation is not None:
        raise InputError(
            f"model.first_stage.{min(options)}: a translator keeps the latents that it was trained on; "
            "choose model/first_stage=translator"
        )
    with told_of("model.first_stage"):
        return module.as_first_stage(**options)


def check_map_stage(description: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    key = "model.map_stage.checkpoint"
    if description["model"].get("reconstructs") != "mask":
        raise InputError(f"{key}: an autoencoder of images; give one trained with model.reconstructs=mask")
    if description["facts"]["num_classes"] != facts["num_classes"]:
        theirs, ours = description["facts"]["num_classes"], facts["num_classes"]
        raise InputError(f"{key}: encodes maps of {theirs} classes, but the dataset has {ours}")
    check_class_names(description["facts"], facts, f"{key}: encodes", "the dataset")


def check_modalities(facts: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """InputError where a translator was trained on other modalities, or on another order of them."""
    known = description["facts"].get("label_values")
    if "translator" in description["model"] and known != facts.get("label_values"):
        raise InputError(
            f"model.first_stage.checkpoint: translates between {known}, the data has "
            f"{facts.get('label_values')}; use the data it was trained on"
        )
