"""Models from configs, and trained models from checkpoints.

A config names its parts by `_target_`; what data and earlier stages decide (channels, classes, latent shapes)
is passed to them here and nowhere else.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from hydra.utils import instantiate
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from medldm.attributes import check_class_names, known_attributes
from medldm.checkpoints import fit_weights, read_hashed
from medldm.diffusion.latent import FirstStage, PixelStage
from medldm.diffusion.translation import TranslationConditioner
from medldm.errors import InputError
from medldm.models.autoencoder import AutoencoderModule
from medldm.models.common import TrainedModule
from medldm.models.diffusion import DiffusionModule
from medldm.models.segmentation import RegressionModule, SegmentationModule
from medldm.models.translation import TranslationModule
from medldm.models.variational import VariationalModule
from medldm.parts import in_place

SLACK = 2**30  # bytes that building a model may take beside its weights: discriminators, tables
LARGEST_COUNT = 100_000  # tensors made while a model is built


class Earlier(NamedTuple):
    """What checkpoints say of the stages that a model stands on; None for a stage that is to be loaded."""

    first_stage: Mapping[str, Any] | None = None
    map_stage: Mapping[str, Any] | None = None


NOTHING_EARLIER = Earlier()


@contextmanager
def told_of(key: str, **keys: str) -> Iterator[None]:
    """A ValueError in which the part of the config at `key` speaks of its own arguments becomes an InputError
    that names their keys: "film=x is none of ..." begins with `key`.film then. `keys` has those of arguments
    that do not stand under `key`.
    """
    try:
        yield
    except Exception as error:
        cause = error.__cause__ or error  # Hydra wraps what it calls
        if not isinstance(cause, ValueError) or isinstance(cause, InputError):
            raise
        name, equals, rest = str(cause).partition("=")
        if equals and name.replace(".", "").isidentifier():
            raise InputError(f"{keys.get(name, f'{key}.{name}')}={rest}") from error
        raise InputError(f"{key}: {cause}") from error


def instantiate_parts(model: Mapping[str, Any], skip: tuple[str, ...]) -> dict[str, Any]:
    """Every dict of the config becomes what its `_target_` names; numbers and strings stay."""
    parts = {}
    for key in (key for key in model if key not in ("kind", *skip)):
        with told_of(f"model.{key}"):
            value = model[key]
            parts[key] = instantiate(in_place(value)) if isinstance(value, Mapping) else value
    return parts


def build_autoencoder_module(
    model: Mapping[str, Any], facts: Mapping[str, Any], earlier: Earlier = NOTHING_EARLIER
) -> AutoencoderModule:
    parts = instantiate_parts(model, skip=())
    channels = facts["image_channels"]
    for key, is_used in (
        ("decoder_sees_map=true", parts.pop("decoder_sees_map", False)),
        ("reconstructs=mask", parts.get("reconstructs") == "mask"),
    ):
        if is_used and not facts["num_classes"]:
            raise InputError(f"model.{key}: the dataset has no masks; prepare it with masks")
    if parts.get("reconstructs") == "mask":
        channels = facts["num_classes"]
    derived = {"spatial_dims": facts["spatial_dims"], "image_channels": channels}
    if model.get("decoder_sees_map"):
        derived["decoder_map_channels"] = facts["num_classes"]
    with told_of("model.autoencoder"):
        autoencoder = parts.pop("autoencoder")(**derived)
    discriminators = build_discriminators(parts, facts, in_channels=channels)
    return AutoencoderModule(autoencoder, discriminators=discriminators, **parts)


def build_discriminators(parts: dict[str, Any], facts: Mapping[str, Any], **sizes: int) -> list[nn.Module]:
    """Taken out of `parts`; a discriminator of its own `spatial_dims` sees slices of volumes."""
    discriminators = []
    for name, build in (parts.pop("discriminators", None) or {}).items():
        if build is not None:
            dims = () if "spatial_dims" in build.keywords else (facts["spatial_dims"],)
            with told_of(f"model.discriminators.{name}"):
                discriminators.append(build(*dims, **sizes))
    return discriminators


def build_translation_module(
    model: Mapping[str, Any], facts: Mapping[str, Any], earlier: Earlier
) -> TranslationModule:
    first_stage, description = build_first_stage(model, facts, earlier.first_stage)
    if description is None:
        raise InputError("model.first_stage.checkpoint: translation needs an autoencoder; give one")
    parts = instantiate_parts(model, skip=("first_stage",))
    num_labels = num_modalities(facts)
    with told_of("model.translator"):
        translator = parts.pop("translator")(
            facts["spatial_dims"], latent_channels=first_stage.latent_channels, num_classes=num_labels
        )
    if first_stage.translator is not None:  # a translator's checkpoint: training goes on from its weights
        continue_from(first_stage, translator)
    channels = parts["objective"].discriminated_channels(first_stage, facts["image_channels"])
    classes = num_labels + 1 if parts["adversarial"] is not None and parts["adversarial"].uses_label else 1
    sizes = {"in_channels": channels, "out_channels": classes}
    discriminators = build_discriminators(parts, facts, **sizes)
    module = TranslationModule(first_stage, translator, discriminators=discriminators, **parts)
    module.first_stage_description = description
    return module


def continue_from(first_stage: FirstStage, translator: nn.Module) -> None:
    """Moves the stage's translator over; InputError where it has other sizes than the config's."""
    try:
        translator.load_state_dict(first_stage.translator.state_dict())
    except RuntimeError as error:
        raise InputError(
            "model.first_stage.checkpoint: its translator has other sizes than model.translator; "
            "choose the same ones"
        ) from error
    first_stage.translator = None


def num_modalities(facts: Mapping[str, Any]) -> int:
    if (facts["num_labels"] or 0) < 2:
        raise InputError(
            "data: translation needs cases of at least two modalities; prepare with data=brats or data=ixi"
        )
    return facts["num_labels"]


def build_diffusion_module(
    model: Mapping[str, Any], facts: Mapping[str, Any], earlier: Earlier
) -> DiffusionModule:
    map_stage, map_stage_description = build_map_stage(model, facts, earlier.map_stage)
    first_stage, description = build_first_stage(model, facts, earlier.first_stage)
    parts = instantiate_parts(model, skip=("first_stage", "map_stage"))
    make_network = parts.pop("network")
    make_conditioner = parts.pop("conditioner")
    sizes = {}
    if make_conditioner.func is TranslationConditioner:
        check_translator(model, facts, first_stage)
        sizes |= {"latent_channels": first_stage.latent_channels, "num_labels": facts["num_labels"]}
    if map_stage is not None:
        sizes["map_latent_channels"] = map_stage.latent_channels
    with told_of("model.conditioner"):
        conditioner = make_conditioner(
            facts["num_classes"],
            **sizes,
            spatial_dims=facts["spatial_dims"],
            downsampling=first_stage.downsampling,
            known=known_attributes(facts),
            embedding_dim=make_network.keywords["embedding_channels"],
        )
    with told_of("model.network"):
        network = make_network(
            facts["spatial_dims"],
            in_channels=first_stage.latent_channels + conditioner.concat_channels,
            out_channels=first_stage.latent_channels,
            spade_channels=conditioner.spade_channels or None,
            context_channels=conditioner.context_dim or None,
        )
    module = DiffusionModule(first_stage, conditioner, network, map_stage=map_stage, **parts)
    module.first_stage_description, module.map_stage_description = description, map_stage_description
    return module


def check_translator(model: Mapping[str, Any], facts: Mapping[str, Any], first_stage: nn.Module) -> None:
    num_modalities(facts)
    if "spade" in model["conditioner"]["latents"] and first_stage.translator is None:
        raise InputError(
            "model.first_stage.checkpoint: holds no translator, which model.conditioner.latents=[spade] "
            "needs; give the checkpoint of an msspade experiment"
        )


def build_variational_module(
    model: Mapping[str, Any], facts: Mapping[str, Any], earlier: Earlier = NOTHING_EARLIER
) -> VariationalModule:
    parts = instantiate_parts(model, skip=())
    make_network = parts.pop("network")
    with told_of("model.conditioner"):
        conditioner = parts.pop("conditioner")(
            None,
            spatial_dims=facts["spatial_dims"],
            downsampling=(1,) * facts["spatial_dims"],
            known=known_attributes(facts),
            embedding_dim=make_network.keywords["embedding_channels"],
        )
    with told_of("model.codec", image_size="data.image_size"):
        codec = parts.pop("codec")(
            facts["spatial_dims"],
            image_channels=facts["image_channels"],
            image_size=facts["image_size"],
            condition_channels=conditioner.embedding_dim,
        )
    with told_of("model.network"):
        network = make_network(
            facts["spatial_dims"],
            in_channels=codec.latent_channels,
            out_channels=codec.latent_channels,
            spade_channels=None,
            context_channels=None,
        )
    return VariationalModule(codec, conditioner, network, **parts)


def build_segmentation_module(
    model: Mapping[str, Any], facts: Mapping[str, Any], earlier: Earlier = NOTHING_EARLIER
) -> SegmentationModule:
    if not facts["num_classes"]:
        raise InputError("model=segmentation: the dataset has no masks to learn; prepare it with masks")
    parts = instantiate_parts(model, skip=())
    with told_of("model.network"):
        network = parts.pop("network")(
            facts["spatial_dims"], in_channels=facts["image_channels"], out_channels=facts["num_classes"]
        )
    names = facts.get("label_names")
    return SegmentationModule(network, num_classes=facts["num_classes"], label_names=names, **parts)


def build_regression_module(
    model: Mapping[str, Any], facts: Mapping[str, Any], earlier: Earlier = NOTHING_EARLIER
) -> RegressionModule:
    parts = instantiate_parts(model, skip=())
    channels = facts["image_channels"]
    with told_of("model.network"):
        network = parts.pop("network")(facts["spatial_dims"], in_channels=channels, out_channels=channels)
    return RegressionModule(network, **parts)


class Kind(NamedTuple):
    """A kind of model: the module, and what builds it from a config, facts of the data and earlier stages."""

    module: type[TrainedModule]
    build: Callable[[Mapping[str, Any], Mapping[str, Any], Earlier], TrainedModule]


MODELS = {  # by `model.kind`
    "autoencoder": Kind(AutoencoderModule, build_autoencoder_module),
    "diffusion": Kind(DiffusionModule, build_diffusion_module),
    "regression": Kind(RegressionModule, build_regression_module),
    "segmentation": Kind(SegmentationModule, build_segmentation_module),
    "translation": Kind(TranslationModule, build_translation_module),
    "variational": Kind(VariationalModule, build_variational_module),
}


def kind_of(model: Mapping[str, Any]) -> Kind:
    if model.get("kind") not in MODELS:
        raise InputError(f"model.kind={model.get('kind')} is none of {', '.join(MODELS)}")
    return MODELS[model["kind"]]


def module_class(model: Mapping[str, Any]) -> type[TrainedModule]:
    """The class of the module that a model's config describes. InputError for an unknown kind."""
    return kind_of(model).module


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
    return kind_of(model).build(model, facts, Earlier(first_stage, map_stage))


# ---- earlier stages ----


def build_first_stage(
    model: Mapping[str, Any], facts: Mapping[str, Any], description: Mapping[str, Any] | None
) -> tuple[FirstStage | PixelStage, dict[str, Any] | None]:
    """The first stage of a model with its description; the images themselves where it has none."""
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


def memory_of_machine() -> int:
    """Bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Allowance(TorchDispatchMode):
    """Tensors that are made meanwhile have at most `num_bytes` together, and are not more than LARGEST_COUNT:
    InputError before the one that is too much is allocated.
    """

    def __init__(self, num_bytes: int) -> None:
        super().__init__()
        self.num_bytes, self.bytes_left, self.count_left = num_bytes, num_bytes, LARGEST_COUNT

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if "device" in {argument.name for argument in func._schema.arguments} and not types:
            like = func(*args, **(kwargs | {"device": "meta"}))
            self.bytes_left -= like.numel() * like.element_size()
            self.count_left -= 1
            if self.bytes_left < 0 or self.count_left < 0:
                limit = f"{self.num_bytes / 2**30:.3g} GiB in {LARGEST_COUNT} tensors"
                raise InputError(f"the config asks for a model larger than its weights can be: {limit}")
        return func(*args, **kwargs)


def check_map_stage(description: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    key = "model.map_stage.checkpoint"
    if description["model"].get("reconstructs") != "mask":
        raise InputError(f"{key}: an autoencoder of images; give one trained with model.reconstructs=mask")
    if description["facts"]["num_classes"] != facts["num_classes"]:
        theirs, ours = description["facts"]["num_classes"], facts["num_classes"]
        raise InputError(f"{key}: encodes maps of {theirs} classes, but the dataset has {ours}")
    check_class_names(description["facts"], facts, f"{key}: encodes", "the dataset")


def as_first_stage(module: TrainedModule, options: Mapping[str, Any]) -> FirstStage:
    """What comes before diffusion: an autoencoder under `options`, or a translator under its own."""
    if isinstance(module, AutoencoderModule):
        with told_of("model.first_stage"):
            return FirstStage(module.autoencoder, **options)
    if options:
        raise InputError(
            f"model.first_stage.{min(options)}: a translator keeps the latents that it was trained on; "
            "choose model/first_stage=translator"
        )
    return module.as_first_stage()


def check_modalities(facts: Mapping[str, Any], description: Mapping[str, Any]) -> None:
    """InputError where a translator was trained on other modalities, or on another order of them."""
    known = description["facts"].get("label_values")
    if description["stage"] == "translation" and known != facts.get("label_values"):
        raise InputError(
            f"model.first_stage.checkpoint: translates between {known}, the data has "
            f"{facts.get('label_values')}; use the data it was trained on"
        )


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


def restore(path: str | Path, content: Mapping[str, Any], *, weights: str) -> TrainedModule:
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
            raise InputError(f"{path}: holds a moving average, which a {description['stage']} model has not")
        fit_weights(module.ema_modules, averaged, f"{path}: ema")
    module.facts, module.description = description["facts"], description
    return module.eval()
