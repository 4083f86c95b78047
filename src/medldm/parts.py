"""Lists the parts that a config in a checkpoint may name, and checks what else such a config holds.

A config on the command line is its user's own and may name whatever Python can import. A checkpoint may come
from anyone: before anything of its config is imported or built, `check_stored` goes through the whole of it.
"""

import os
from collections.abc import Iterator, Mapping
from pkgutil import resolve_name
from typing import Any

from medldm.errors import InputError

TRUSTED = "MEDLDM_PARTS"  # environment variable: further parts, separated by commas
LARGEST = 2**20  # of a whole number that decides a size
DEEPEST = 16  # mappings and lists inside each other
NO_SIZES = {"seed", "start", "ramp", "warmup_steps", "cosine_steps"}  # whole numbers that count steps instead

LISTED = {
    "medldm.diffusion.conditioner": ("NullConditioner", "SpatialConditioner"),
    "medldm.diffusion.likelihood": ("Bernoulli", "DiscretizedGaussian"),
    "medldm.diffusion.objective": ("DenoisingObjective",),
    "medldm.diffusion.sampler": (
        "AncestralSampler",
        "DDIMSampler",
        "DPMSolverSampler",
        "EulerSampler",
        "HeunSampler",
        "MidpointSampler",
    ),
    "medldm.diffusion.schedule": (
        "cosine_schedule",
        "exploding_schedule",
        "fixed_linear_schedule",
        "flow_schedule",
        "learned_nnet_schedule",
        "learned_scalar_schedule",
        "linear_schedule",
        "sqrt_linear_schedule",
    ),
    "medldm.diffusion.translation": ("TranslationConditioner",),
    "medldm.diffusion.variational": ("VariationalObjective",),
    "medldm.losses": ("AdversarialLoss", "PerceptualLoss"),
    "medldm.models.translation": ("ImageTranslation", "LatentTranslation"),
    "medldm.networks.autoencoder": ("VQAutoencoder",),
    "medldm.networks.codec": ("ConvCodec", "MLPCodec", "PixelCodec"),
    "medldm.networks.discriminator": ("PatchDiscriminator",),
    "medldm.networks.factorised": ("FactorisedAttention",),
    "medldm.networks.quantizer": ("VectorQuantizer",),
    "medldm.networks.quantizers": (
        "FiniteScalarQuantizer",
        "GaussianLatent",
        "LookupFreeQuantizer",
        "ResidualQuantizer",
    ),
    "medldm.networks.scorenet": ("PixelScoreNet", "ScoreNet"),
    "medldm.networks.translator": ("MSSPADE",),
    "medldm.networks.unet": ("UNet",),
    "monai.networks.nets": ("UNet",),
    "torch.optim": ("Adam", "AdamW", "NAdam", "RAdam", "SGD"),
}
# `_target_` -> where it is now: whoever moves or renames a part keeps its old names here.
PARTS = {f"{module}.{name}": f"{module}.{name}" for module, names in LISTED.items() for name in names}


def known_parts() -> dict[str, str]:
    """All parts that a stored config may name, those that the environment trusts among them."""
    own = [name.strip() for name in os.environ.get(TRUSTED, "").split(",")]
    return PARTS | {name: name for name in own if name}


def find_part(target: str) -> Any:
    """The class or function of a listed `_target_`. InputError for one that is not listed."""
    known = known_parts()
    if target not in known:
        raise InputError(f"{target} is none of the parts of a model")
    return resolve_name(known[target])


def in_place(config: Any) -> Any:
    """The config with every listed `_target_` by its present name; what is not listed stays."""
    if isinstance(config, Mapping):
        known = known_parts()
        return {
            key: known.get(value, value) if key == "_target_" and isinstance(value, str) else in_place(value)
            for key, value in config.items()
        }
    return [in_place(value) for value in config] if is_list(config) else config


def targets_in(config: Any) -> Iterator[str]:
    """Every `_target_` of a config."""
    values = config.values() if isinstance(config, Mapping) else config
    if isinstance(config, Mapping) and "_target_" in config:
        yield config["_target_"]
    for value in values:
        if isinstance(value, Mapping | list | tuple):
            yield from targets_in(value)


def entries(value: Any, place: str, key: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of a tree and of everything in it. InputError where it is nested too deeply."""
    if depth > DEEPEST:
        raise InputError(f"{place}: {key[:80]} is nested deeper than any model's config")
    yield key, value
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if is_list(value) else ()
    for name, part in items:
        yield from entries(part, place, f"{key}.{name}" if key else str(name), depth + 1)


def is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def check_plain(tree: Any, place: str) -> None:
    """InputError where a tree of a checkpoint holds what is no plain data, or a size beyond all bounds."""
    for key, value in entries(tree, place):
        if isinstance(value, int) and abs(value) > LARGEST and key.rpartition(".")[2] not in NO_SIZES:
            raise InputError(f"{place}: {key}={value:.3g} is beyond any model's size, {LARGEST}")
        if not (value is None or isinstance(value, Mapping | str | int | float) or is_list(value)):
            raise InputError(f"{place}: {key} is a {type(value).__name__}, which is no plain data")


def check_stored(config: Any, place: str) -> None:
    """InputError for the first thing in a stored config that could be more than the description of a model:
    a `_target_` that is not listed, an interpolation, another instruction to whoever instantiates it, a value
    that is no plain data, a size beyond all bounds. `place` says where the config was found.
    """
    check_plain(config, place)
    known = known_parts()
    for key, value in entries(config, place):
        if isinstance(value, str) and "${" in value:
            raise InputError(f"{place}: {key} holds the interpolation {value!r:.80}; none is resolved here")
        for name, part in value.items() if isinstance(value, Mapping) else ():
            check_entry(name, part, f"{place}: {key or 'its top'}", known)


def check_entry(name: Any, value: Any, place: str, known: Mapping[str, str]) -> None:
    """InputError for an entry of a stored config that instructs whoever instantiates it: of the names that
    begin with an underscore, `_target_` and `_partial_` alone are allowed.
    """
    if not isinstance(name, str) or (name.startswith("_") and name not in ("_target_", "_partial_")):
        raise InputError(f"{place} has the key {name!r:.80}, which no config of a model has")
    if name == "_target_" and (not isinstance(value, str) or value not in known):
        raise InputError(
            f"{place} names {value!r:.120}, which is none of medldm's parts; nothing of it was run. If it is "
            f"a part of your own, set {TRUSTED} to its name"
        )
    if name == "_partial_" and not isinstance(value, bool):
        raise InputError(f"{place} has _partial_={value!r:.80}; it is true or false")
