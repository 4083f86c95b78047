"""Refuses settings that have no effect beside the others, before training and each in one line.

A part checks its own arguments. Here are the rules that need the whole config.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from medldm.errors import InputError


class Idle(NamedTuple):
    """A key without effect, and why (`reason`, with the mend). It is refused where it holds another value
    than `neutral`, which presets hold; with `ANY`, it is refused only where it is typed on the command line.
    """

    key: str
    neutral: Any
    reason: str


ANY = object()


def refuse_idle(
    model: Mapping[str, Any],
    spatial_dims: int,
    groups: Sequence[str] = (),
    *,
    has_average: bool = True,
    options: Mapping[str, Any] | None = None,
    typed: Sequence[str] = (),
) -> None:
    """InputError for the first setting of `model` (the resolved config) that nothing reads.

    `groups` are the conditions that the built model has, and `has_average` says whether it keeps a moving
    average. `options` are the other sections of the config by name (`data`, `callbacks`), `typed` the keys
    given on the command line.
    """
    config = {"model": model, **(options or {})}
    rules = [*of_model(model, spatial_dims, groups), *of_options(config, has_average)]
    for key, neutral, reason in rules:
        value = look_up(config, key)
        names_it = any(name == key or name.startswith(f"{key}.") for name in typed)
        if value is not None and (names_it or neutral is not ANY) and value != neutral:
            raise InputError(f"{key}={value} has no effect: {reason}")


def look_up(config: Mapping[str, Any], key: str) -> Any:
    """The value at a dotted key, None where any part of it is absent."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def typed_keys(overrides: Sequence[str]) -> list[str]:
    """Keys of Hydra's overrides: `+a.b=1` and `++a.b=1` name a.b; what `~` deletes is not named."""
    return [text.lstrip("+").partition("=")[0] for text in overrides if not text.startswith("~")]


def of_options(config: Mapping[str, Any], has_average: bool) -> Iterator[Idle]:
    """Rules for the sections of the config beside the model."""
    if not look_up(config, "data.flip_axes"):
        yield Idle("data.flip_prob", ANY, "data.flip_axes names no axis to mirror")
    if look_up(config, "data.num_workers") == 0:
        yield Idle("data.worker_context", ANY, "data.num_workers=0 starts no worker")
    if not has_average:
        mend = "this model keeps no moving average; leave it out (in a chain: STAGE:key=value)"
        yield Idle("callbacks.ema", ANY, mend)


def of_model(model: Mapping[str, Any], spatial_dims: int, groups: Sequence[str]) -> Iterator[Idle]:
    """The rules of the parts that a model's config has: they hold for any kind of model with these parts."""
    objective = model.get("objective") or {}
    for part, prefix in ((model, "model"), (objective, "model.objective")):
        if "perceptual_weight" in part:
            yield from of_perceptual(part, spatial_dims, prefix)
    if {"adversarial", "discriminators"} & model.keys():
        yield from of_adversarial(model, spatial_dims, model if "perceptual_weight" in model else objective)
    if "autoencoder" in model:
        yield from of_autoencoder(model)
    if "conditioner" in model:
        yield from of_conditioner(model["conditioner"], groups)
    if model.get("adapter"):
        yield from of_conditioner(model["adapter"]["conditioner"], groups, "model.adapter.conditioner")
    if model.get("segmenter"):
        yield from of_segmenter(model)
    if {"conditioner", "network"} <= model.keys():
        yield from of_network(model)
    if str(objective.get("_target_", "")).endswith("DenoisingObjective"):
        yield from of_schedule(model["schedule"])
    if "first_stage" in model and model["first_stage"].get("checkpoint", "") is None:
        for name in ("latent", "requantize", "normalisation"):
            mend = "images themselves are diffused; choose model/first_stage=pixel"
            yield Idle(f"model.first_stage.{name}", None, mend)
    if "codec" in model:
        yield from of_codec(model, groups)
    if model.get("cosine_steps") is None:
        yield Idle("model.cosine_final", ANY, "model.cosine_steps is null; give it the length of the cosine")


def of_autoencoder(model: Mapping[str, Any]) -> Iterator[Idle]:
    """Rules for an autoencoder and its quantiser."""
    if (model.get("adversarial") or {}).get("kind") == "multiclass":
        raise InputError("model.adversarial.kind=multiclass: an autoencoder has no classes; set it to hinge")
    net = "model.autoencoder"
    if not model.get("decoder_sees_map"):
        for name in ("spade_kernel", "spade_hidden_channels"):
            yield Idle(f"{net}.{name}", ANY, "the decoder sees no map; set model.decoder_sees_map=true")
    parts = model["autoencoder"]
    if "attn" not in parts.get("mid", ()) and not parts.get("attention_levels"):
        yield Idle(f"{net}.num_heads", ANY, "no attention; put attn into model.autoencoder.mid")
    if parts.get("shortcut") == "none":
        yield Idle(f"{net}.dropout", 0.0, "blocks without a shortcut have one convolution and no dropout")
    quantizer = parts.get("quantizer", {})
    if quantizer.get("ema_decay") is not None:
        mend = "moving averages set the codebook; set model.autoencoder.quantizer.ema_decay=null"
        yield Idle(f"{net}.quantizer.codebook_weight", 1.0, mend)
    if quantizer.get("legacy_beta"):
        mend = "legacy_beta puts commitment_weight in its place; set commitment_weight"
        yield Idle(f"{net}.quantizer.codebook_weight", 1.0, mend)


def of_perceptual(part: Mapping[str, Any], spatial_dims: int, prefix: str) -> Iterator[Idle]:
    """Rules for a perceptual loss and its weight."""
    perceptual, weight = part.get("perceptual"), part.get("perceptual_weight")
    if perceptual is None:
        mend = f"{prefix}.perceptual is null; set {prefix}.perceptual_weight=0"
        yield Idle(f"{prefix}.perceptual_weight", 0, mend)
    elif not weight:
        mend = f"{prefix}.perceptual_weight is 0; set it above 0 too"
        yield Idle(f"{prefix}.perceptual", ANY, mend)
    elif perceptual["network"].startswith("medicalnet") and spatial_dims == 2:
        raise InputError(
            f"{prefix}.perceptual.network={perceptual['network']}: sees volumes alone; choose lpips_vgg"
        )


def of_adversarial(model: Mapping[str, Any], spatial_dims: int, losses: Mapping[str, Any]) -> Iterator[Idle]:
    """Rules for discriminators, and for the random slice of a volume that 2D discriminators and LPIPS see."""
    discriminators = [part for part in (model.get("discriminators") or {}).values() if part]
    perceptual = losses.get("perceptual") if losses.get("perceptual_weight") else None
    sees_slices = any(part.get("spatial_dims") == 2 for part in discriminators)
    sees_slices |= perceptual is not None and not perceptual["network"].startswith("medicalnet")
    if spatial_dims == 2 or not sees_slices:
        yield Idle("model.slice_axes", [0], "nothing sees single slices of a volume; leave it out")
    adversarial = model.get("adversarial") or {}
    if not adversarial.get("weight"):
        yield Idle("model.adversarial.adaptive", ANY, "model.adversarial.weight is 0; set it above 0 too")


def of_segmenter(model: Mapping[str, Any]) -> Iterator[Idle]:
    """Rules for the losses of a segmenter."""
    if model["kind"] != "diffusion":
        yield Idle("model.segmenter.checkpoint", None, f"a {model['kind']} model asks none; leave it out")
    if not model["segmenter"].get("contrast_weight"):
        mend = "model.segmenter.contrast_weight is 0; set it above 0 too"
        yield Idle("model.segmenter.temperature", ANY, mend)


def of_conditioner(
    conditioner: Mapping[str, Any], groups: Sequence[str], key: str = "model.conditioner"
) -> Iterator[Idle]:
    """Rules for a conditioner; `groups` are the conditions that the built model has."""
    if "encoder" in conditioner:
        if conditioner["encoder"] in (None, "area"):
            mend = f"{key}.encoder={conditioner['encoder'] or 'null'} decides the channels; choose another"
            yield Idle(f"{key}.out_channels", ANY, mend)
        if conditioner.get("spade") in (None, "planes", "map_latent", "area"):
            mend = f"{key}.spade={conditioner.get('spade') or 'null'} decides the channels; choose an encoder"
            yield Idle(f"{key}.spade_out_channels", ANY, mend)
    if not groups:
        yield Idle(f"{key}.drop_all_prob", ANY, "the dataset states none of the model's conditions")


def of_network(model: Mapping[str, Any]) -> Iterator[Idle]:
    """Rules for a U-Net, and for the one inside a score network."""
    network, conditioner = model["network"], model["conditioner"]
    network = network.get("unet", network)
    key = "model.network.unet" if "unet" in model["network"] else "model.network"
    if not conditioner.get("spade"):
        yield Idle(f"{key}.spade_kernel", ANY, "nothing gives the network a map; set model.conditioner.spade")
    if network.get("head_channels") is not None:
        yield Idle(f"{key}.num_heads", None, f"{key}.head_channels decides it; set that to null")
    if network.get("skips", "level") != "level":
        yield Idle(f"{key}.up_channels", None, f"skips={network['skips']} mirrors the way down")
        yield Idle(f"{key}.num_mid_units", ANY, f"skips={network['skips']} has two units in the middle")


def of_schedule(schedule: Mapping[str, Any]) -> Iterator[Idle]:
    """Rules for the schedule of a denoising objective."""
    if schedule["_target_"].endswith("learned_scalar_schedule"):
        raise InputError(
            "model/schedule=learned_scalar: a denoising objective leaves its end points where they start, so "
            "that nothing learns; choose model/schedule=fixed_linear or learned_nnet"
        )
    mend = "a denoising objective trains the interior, for the variance; choose model/objective=variational"
    yield Idle("model.schedule.interior", "variance", mend)
    yield Idle("model.schedule.endpoints", ANY, mend)


def of_codec(model: Mapping[str, Any], groups: Sequence[str]) -> Iterator[Idle]:
    """Rules for what stands around the codec of Medical VDM."""
    if not model.get("gradient_weight"):
        for name, neutral in (("gradient_power", 1.0), ("gradient_is_signed", False)):
            yield Idle(f"model.{name}", neutral, "model.gradient_weight is 0; set it above 0 too")
    if model["codec"]["_target_"].endswith("PixelCodec"):
        for name in ("mse_weight", "gradient_weight"):
            yield Idle(f"model.{name}", 0.0, "a pixel codec reconstructs nothing; choose model/codec=conv")
    if not groups:
        yield Idle("model.codec.film", ANY, "no condition enters the codec; choose model/conditioner=label")
