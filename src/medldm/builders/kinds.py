"""One builder for each kind of model: what data and earlier stages decide (channels, classes, latent shapes)
is passed to its parts here and nowhere else.
"""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from medldm.attributes import known_attributes
from medldm.builders.additions import build_segmenter_loss, with_branch
from medldm.builders.keys import instantiate_parts
from medldm.diffusion.latent import FirstStage, PixelStage
from medldm.diffusion.variational import ImageTerms
from medldm.errors import InputError, told_of
from medldm.models.autoencoder import AutoencoderModule
from medldm.models.common import TrainedModule
from medldm.models.diffusion import DiffusionModule
from medldm.models.distillation import DistillationModule
from medldm.models.segmentation import RegressionModule, SegmentationModule
from medldm.models.translation import TranslationModule
from medldm.models.variational import VariationalModule


class EarlierStages(NamedTuple):
    """The trained models that a module stands on, each with what its checkpoint says of it (`description`).

    `first_stage` is a `PixelStage` without a description where a model works on the images themselves, and
    None, like `map_stage`, for a model that has no such stage at all.
    """

    first_stage: FirstStage | PixelStage | None = None
    first_description: dict[str, Any] | None = None
    map_stage: FirstStage | None = None
    map_description: dict[str, Any] | None = None


def build_autoencoder_module(
    model: Mapping[str, Any], facts: Mapping[str, Any], stages: EarlierStages
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
    if parts.get("quantizer") is not None:
        derived["quantizer"] = parts["quantizer"]
    parts.pop("quantizer", None)
    with told_of("model.autoencoder", levels="model.quantizer.levels"):
        autoencoder = parts.pop("autoencoder")(**derived)
    discriminators = build_discriminators(parts, facts, in_channels=channels)
    with told_of("model"):
        return AutoencoderModule(autoencoder, discriminators=discriminators, **parts)


def build_discriminators(parts: dict[str, Any], facts: Mapping[str, Any], **sizes: int) -> list[nn.Module]:
    """The discriminators, which are taken out of `parts`. One with a `spatial_dims` of its own sees slices of
    volumes.
    """
    discriminators = []
    for name, build in (parts.pop("discriminators", None) or {}).items():
        if build is not None and not isinstance(build, partial):
            raise InputError(
                f"model.discriminators.{name}={build!s:.80}: give a part with a _target_ and _partial_=true"
            )
        if build is not None:
            dims = () if "spatial_dims" in build.keywords else (facts["spatial_dims"],)
            with told_of(f"model.discriminators.{name}"):
                discriminators.append(build(*dims, **sizes))
    return discriminators


def build_translation_module(
    model: Mapping[str, Any], facts: Mapping[str, Any], stages: EarlierStages
) -> TranslationModule:
    first_stage = stages.first_stage
    if stages.first_description is None:
        raise InputError("model.first_stage.checkpoint: translation needs an autoencoder; give one")
    parts = instantiate_parts(model, skip=("first_stage",))
    num_labels = num_modalities(facts)
    with told_of("model.translator"):
        translator = parts.pop("translator")(
            facts["spatial_dims"], latent_channels=first_stage.latent_channels, num_classes=num_labels
        )
    if first_stage.translator is not None:  # from a checkpoint of a translator
        continue_from(first_stage, translator)
    channels = parts["objective"].discriminated_channels(first_stage, facts["image_channels"])
    classes = num_labels + 1 if parts["adversarial"] is not None and parts["adversarial"].uses_label else 1
    sizes = {"in_channels": channels, "out_channels": classes}
    discriminators = build_discriminators(parts, facts, **sizes)
    with told_of("model"):
        module = TranslationModule(first_stage, translator, discriminators=discriminators, **parts)
    module.first_stage_description = stages.first_description
    return module


def continue_from(first_stage: FirstStage, translator: nn.Module) -> None:
    """Move the weights of the translator that `first_stage` holds to `translator`, with which training goes
    on. InputError where it has other sizes than the config's.
    """
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
    model: Mapping[str, Any], facts: Mapping[str, Any], stages: EarlierStages
) -> DiffusionModule:
    first_stage, map_stage = stages.first_stage, stages.map_stage
    parts = instantiate_parts(model, skip=("first_stage", "map_stage", "segmenter", "adapter"))
    make_network = parts.pop("network")
    make_conditioner = parts.pop("conditioner")
    sizes = {}
    if getattr(make_conditioner.func, "is_of_modalities", False):
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
    with told_of("model.objective"):
        parts["objective"].check_schedule(parts["schedule"])
    if model.get("adapter"):
        parts["schedule"].requires_grad_(False)
        conditioner, network = with_branch(model, facts, conditioner, network, first_stage.downsampling)
    stages_and_losses = {"map_stage": map_stage, "segmenter_loss": build_segmenter_loss(model, facts)}
    with told_of("model"):
        module = module_class(model)(first_stage, conditioner, network, **stages_and_losses, **parts)
    module.first_stage_description = stages.first_description
    module.map_stage_description = stages.map_description
    return module


def check_translator(model: Mapping[str, Any], facts: Mapping[str, Any], first_stage: nn.Module) -> None:
    num_modalities(facts)
    if "spade" in model["conditioner"]["latents"] and first_stage.translator is None:
        raise InputError(
            "model.first_stage.checkpoint: holds no translator, which model.conditioner.latents=[spade] "
            "needs; give the checkpoint of an msspade experiment"
        )


def build_variational_module(
    model: Mapping[str, Any], facts: Mapping[str, Any], stages: EarlierStages
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
    with told_of("model.objective"):
        parts["objective"].check_schedule(parts["schedule"])
    names = [field.name for field in fields(ImageTerms) if field.name in parts]
    terms = ImageTerms(**{name: parts.pop(name) for name in names})
    with told_of("model"):
        return VariationalModule(codec, conditioner, network, image_terms=terms, **parts)


def build_segmentation_module(
    model: Mapping[str, Any], facts: Mapping[str, Any], stages: EarlierStages
) -> SegmentationModule:
    if not facts["num_classes"]:
        raise InputError("model=segmentation: the dataset has no masks to learn; prepare it with masks")
    parts = instantiate_parts(model, skip=())
    with told_of("model.network"):
        network = parts.pop("network")(
            facts["spatial_dims"], in_channels=facts["image_channels"], out_channels=facts["num_classes"]
        )
    names = facts.get("label_names")
    with told_of("model"):
        return SegmentationModule(network, num_classes=facts["num_classes"], label_names=names, **parts)


def build_regression_module(
    model: Mapping[str, Any], facts: Mapping[str, Any], stages: EarlierStages
) -> RegressionModule:
    parts = instantiate_parts(model, skip=())
    channels = facts["image_channels"]
    with told_of("model.network"):
        network = parts.pop("network")(facts["spatial_dims"], in_channels=channels, out_channels=channels)
    with told_of("model"):
        return RegressionModule(network, **parts)


class Kind(NamedTuple):
    """A kind of model: the module, and what builds it from a config, facts of the data and its stages."""

    module: type[TrainedModule]
    build: Callable[[Mapping[str, Any], Mapping[str, Any], EarlierStages], TrainedModule]


MODELS = {  # by `model.kind`
    "autoencoder": Kind(AutoencoderModule, build_autoencoder_module),
    "diffusion": Kind(DiffusionModule, build_diffusion_module),
    "distillation": Kind(DistillationModule, build_diffusion_module),
    "regression": Kind(RegressionModule, build_regression_module),
    "segmentation": Kind(SegmentationModule, build_segmentation_module),
    "translation": Kind(TranslationModule, build_translation_module),
    "variational": Kind(VariationalModule, build_variational_module),
}


def kind_of(model: Mapping[str, Any]) -> Kind:
    kind = model.get("kind")
    if not isinstance(kind, str) or kind not in MODELS:
        raise InputError(f"model.kind={kind!s:.80} is none of {', '.join(MODELS)}")
    return MODELS[kind]


def batch_keys(model: Mapping[str, Any], latents: str | None) -> tuple[str, ...]:
    """The arrays that a model reads of a batch, where `latents` names their cache if there is one. InputError
    where the model cannot learn from it.
    """
    module = module_class(model)
    try:
        return module.batch_keys(model, is_cached=bool(latents))
    except ValueError as error:
        raise InputError(f"data.latents={latents}: {error}; set it to null") from error


def module_class(model: Mapping[str, Any]) -> type[TrainedModule]:
    """The class of the module that a model's config describes. InputError for an unknown kind."""
    return kind_of(model).module
