"""Checkpoints that describe themselves: one file rebuilds its model, and is written whole or not at all.

Under the key "medldm" a checkpoint holds plain data: the stage, the resolved model config, facts of the data
and, for a second stage, the first stage's own description. It may come from anyone: it is read under
`weights_only=True`, and its whole structure is checked before anything is made of it.
"""

import hashlib
import logging
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, BinaryIO, Literal

import torch
from lightning_fabric.plugins import TorchCheckpointIO
from pydantic import Field
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from medldm.errors import InputError
from medldm.files import replacing
from medldm.parts import TRUSTED, check_plain, check_stored, find_part, known_parts, targets_in
from medldm.schemas import AttributeEntry, Count, Schema, Text, check_schema
from medldm.tensors import is_safetensors, read_tensors

FORMAT = 1
NUM_TOLD = 20  # weights that do not fit, in a line
EARLIER_STAGES = ("first_stage", "map_stage")  # what a second stage stands on
ORIGINS = ("adapter", "segmenter", "init_from")  # what else a model was made with, or from
MEND = "give one that `medldm train` wrote"
Names = Sequence[Text] | None

log = logging.getLogger(__name__)


class Subjects(Schema):
    """The subjects of a split, by part."""

    train: Sequence[str]
    val: Sequence[str]
    test: Sequence[str] = ()


class TrainingRecord(Schema):
    """What a checkpoint keeps of the data that it was trained on."""

    dataset: str
    raw: str | None = None
    split: str | None = None
    subjects: Subjects
    images: dict[str, list[str]] | None = None
    content: str | None = None
    attributes: dict[str, str] | None = None
    generator: Sequence[str] = ()


class Facts(Schema):
    """What a model was told of its data."""

    spatial_dims: Literal[0, 2, 3]  # 0: points
    image_channels: Annotated[int, Field(ge=1, le=2**17)]
    num_classes: Count | None = None
    num_views: Count | None = None
    num_phases: Count | None = None
    num_labels: Count | None = None
    label_names: Names = None
    view_names: Names = None
    phase_names: Names = None
    label_values: Names = None
    attributes: dict[str, AttributeEntry] | None = None
    unknown_attributes: Sequence[str] | None = None


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's reading and writing of checkpoints, made safe against a crash at any moment."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path, storage_options: Any = None) -> None:
        with replacing(Path(path)) as aside:
            torch.save(checkpoint, aside)

    def load_checkpoint(self, path, map_location=None, weights_only: bool | None = True) -> dict[str, Any]:
        return read_checkpoint(path, map_location or "cpu")


def read_checkpoint(path: str | Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The content of a medldm checkpoint; InputError for a missing, damaged or foreign file."""
    with open(existing(path), "rb") as file:
        return read_content(file, path, map_location)


def read_hashed(path: str | Path) -> tuple[dict[str, Any], str]:
    """The content of a checkpoint and the sha256 of the very file that was read: a training that goes on may
    put another file in its place meanwhile.
    """
    with open(existing(path), "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        return read_content(file, path, "cpu"), sha256


def existing(path: str | Path) -> Path:
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint; give the path of a .ckpt that `medldm train` wrote")
    return Path(path)


def read_content(file: BinaryIO, path: str | Path, map_location: Any) -> dict[str, Any]:
    """The content of a checkpoint of either format. InputError where it is damaged or of another program."""
    try:
        if is_safetensors(path):
            content = read_tensors(file.read())
        else:
            check_archive(file)
            content = torch.load(file, map_location=map_location, weights_only=True)
    except InputError:
        raise
    except Exception as error:  # of bytes that anyone may have written, anything can be raised
        raise InputError(
            f"{path}: not a readable checkpoint ({type(error).__name__}); take another one of the run"
        ) from error
    if not isinstance(content, Mapping) or "medldm" not in content:
        raise InputError(f"{path}: not a medldm checkpoint; give one that `medldm train` wrote")
    check_description(content["medldm"], str(path))
    for key in ("state_dict", "ema"):
        check_weights(content.get(key, {}), f"{path}: {key}")
    return content


def check_archive(file: BinaryIO) -> None:
    """ValueError for an archive whose content is larger than the file, as torch writes without compression,
    or differs from its checksums, which torch does not look at.
    """
    if zipfile.is_zipfile(file):
        file.seek(0)
        archive = zipfile.ZipFile(file)
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
            raise ValueError("compressed")
        if (name := archive.testzip()) is not None:
            raise ValueError(f"{name} is damaged")
    file.seek(0)


def check_description(description: Any, place: str) -> None:
    """InputError where what a checkpoint says of its model, or of a stage below it, is not of the form that
    `describe` gives it, or where its config names what it may not.
    """
    if not isinstance(description, Mapping):
        raise InputError(f"{place}: does not describe its model; give one that `medldm train` wrote")
    for key, kind in (("format", int), ("stage", str), ("model", Mapping), ("facts", Mapping)):
        if not isinstance(description.get(key), kind):
            raise InputError(f"{place}: its description has no valid `{key}`")
    if description["format"] > FORMAT:
        raise InputError(
            f"{place}: written by a newer medldm (format {description['format']}); update medldm"
        )
    if description["model"].get("kind") != description["stage"]:
        raise InputError(f"{place}: says that it is a {description['stage']} model, unlike its config")
    check_stored(description["model"], f"{place}: its config")
    check_plain(description["facts"], f"{place}: the facts of its data")
    check_schema(description["facts"], Facts, f"{place}: the facts of its data", MEND)
    check_records(description, place)
    for key in EARLIER_STAGES:
        settings = description["model"].get(key)
        if not isinstance(settings, Mapping | None):
            raise InputError(f"{place}: its config has {settings!s:.80} in the place of its {key}; {MEND}")
        if description.get(key) is not None:
            check_description(description[key], f"{place}: its {key}")
            if not isinstance(description[key].get("sha256"), str):
                raise InputError(f"{place}: its {key} does not state its sha256; {MEND}")
        elif settings is not None and settings.get("checkpoint") is not None:
            raise InputError(f"{place}: lacks the description of its {key}, which its config names")


def check_records(description: Mapping[str, Any], place: str) -> None:
    """InputError where the records of what a model, and those that it came from, were trained on are not of
    the form that `medldm.held_out` reads.
    """
    if description.get("data") is not None:
        check_schema(description["data"], TrainingRecord, f"{place}: the record of its data", MEND)
    for key in ORIGINS:
        origin = description.get(key)
        if origin and not (isinstance(origin, Mapping) and isinstance(origin.get("stage"), str)):
            raise InputError(f"{place}: its {key} does not describe a model; {MEND}")
        if origin:
            check_records(origin, f"{place}: its {key}")


def check_weights(weights: Any, place: str) -> None:
    """InputError for weights that are not plain tensors by name, each with all its values in the file."""
    if not isinstance(weights, Mapping):
        raise InputError(f"{place} is no table of weights")
    for name, value in weights.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise InputError(f"{place}: {name!r:.120} is no named tensor")
        if not is_whole(value):
            raise InputError(f"{place}: {name:.120} {tuple(value.shape)} has not as many values in the file")


def is_whole(value: Tensor) -> bool:
    """Whether a tensor is a plain one with all its values in memory: kernels read and write it unasked."""
    is_plain = value.layout == torch.strided and not value.is_quantized and not value.is_meta
    return is_plain and value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def fit_weights(module: nn.Module, weights: Mapping[str, Tensor], place: str) -> None:
    """Load the weights into the module. InputError that names every key which is missing, unknown to the
    module, of another shape or kind of number, or not finite.
    """
    if wrong := misfits(module, weights):
        raise InputError(f"{place} does not fit the model of its config: {wrong}")
    module.load_state_dict(weights)


def misfits(module: nn.Module, weights: Mapping[str, Tensor]) -> str:
    """What is wrong with weights for a module, key by key; an empty text where they fit."""
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own if name not in weights]
    wrong += [f"{name} is not the model's" for name in weights if name not in own]
    both = [(name, wrong_value(own[name], weights[name])) for name in own if name in weights]
    wrong += [f"{name} {what}" for name, what in both if what]
    more = [f"and {len(wrong) - NUM_TOLD} more"] if len(wrong) > NUM_TOLD else []
    return "; ".join([*wrong[:NUM_TOLD], *more])


def wrong_value(own: Tensor, given: Tensor) -> str | None:
    """What is wrong with a weight in the place of a module's own one, None if nothing."""
    if not isinstance(given, Tensor):
        return "is no tensor"
    if given.shape != own.shape:
        return f"is {tuple(given.shape)}, not {tuple(own.shape)}"
    if given.is_complex() or given.is_floating_point() != own.is_floating_point():
        return f"is {given.dtype}, not {own.dtype}"
    if given.is_floating_point() and not given.isfinite().all():
        return "holds values that are not finite"
    return None


def encoder_sha256(description: Mapping[str, Any], sha256: str) -> str:
    """The sha256 of the checkpoint that a stage's encoder was trained in.

    For a translator that left its autoencoder as it was, this is the autoencoder's checkpoint, else the
    stage's own, whose hash is `sha256`.
    """
    is_shared = (
        "translator" in description["model"]
        and not find_part(description["model"]["objective"]["_target_"]).trains_autoencoder
    )
    return description["first_stage"]["sha256"] if is_shared else sha256


def latents_name(path: str | Path) -> str:
    """The name of the folder that caches the latents of a checkpoint's encoder."""
    content, sha256 = read_hashed(path)
    return encoder_sha256(content["medldm"], sha256)[:12]


def describe(
    model: Mapping[str, Any],
    facts: Mapping[str, Any],
    module: LightningModule,
    data: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Plain data from which `medldm.build` makes the module again, and `data`, the record of what it was
    trained on (`medldm.held_out`).
    """
    description = {
        "format": FORMAT,
        "stage": model["kind"],
        "model": dict(model),
        "facts": dict(facts),
        "data": data,
    }
    for name in sorted(set(targets_in(model)) - set(known_parts())):
        log.warning("%s is none of medldm's parts: to load the checkpoints, set %s=%s", name, TRUSTED, name)
    for stage in EARLIER_STAGES:
        if getattr(module, f"{stage}_description", None):
            description[stage] = getattr(module, f"{stage}_description")
    return description
