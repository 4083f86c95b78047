"""What data and earlier stages would tell a model, assumed where there are none yet."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from medldm.build import with_base_parts
from medldm.checkpoints import read_checkpoint
from medldm.data import build_datamodule
from medldm.data.loading.facts import FACTS
from medldm.data.prepared import load_index
from medldm.errors import InputError
from medldm.planning.step import Job

OFFERED = {
    "first_stage": "first_stage_experiment",
    "map_stage": "map_stage_experiment",
    "segmenter": "segmenter_experiment",
}  # the key that names the experiment of a stage
GIVEN = "assumed"  # in the place of a checkpoint's path: its description comes along
NUM_CLASSES = 4  # where neither config nor data say how many there are


class Experiments(NamedTuple):
    """The experiments beside the planned one."""

    name: str  # of the planned one
    known: Collection[str]
    model: Callable[[str], dict[str, Any]]  # the model's config of another one


def describe_job(plan: Mapping[str, Any], experiments: Experiments, keys: Sequence[str]) -> Job:
    """The job of a plain config of `medldm plan`. InputError where image size or an earlier stage is open."""
    model, facts = dict(plan["model"]), facts_to_assume(plan)
    stages = {}
    for key in ("first_stage", "map_stage"):
        options = model.get(key)
        if options and options["checkpoint"] is not None:
            stages[key] = stage_before(key, model, plan, experiments, facts)
            model[key] = options | {"checkpoint": GIVEN}
    if model.get("segmenter"):
        stages["segmenter"] = stage_before("segmenter", model, plan, experiments, facts)
    return Job(model, facts, keys, image_shape(plan, facts), **stages)


def with_assumed_base(
    plan: Mapping[str, Any], experiments: Experiments
) -> tuple[dict[str, Any], Experiments]:
    """The model's config, that of a control branch with the parts of its base, and the experiments beside the
    one that makes its earlier stages.
    """
    model = plan["model"]
    if not model.get("adapter"):
        return model, experiments
    path = model["adapter"]["checkpoint"]
    if path != "???" and Path(path).is_file():
        return with_base_parts(model, read_checkpoint(path)["medldm"]["model"]), experiments
    system = experiments.name.partition("/")[0]
    guesses = (f"{system}/{name}" for name in ("ldm", "folder_ldm"))
    name = plan.get("adapter_experiment") or next((x for x in guesses if x in experiments.known), None)
    if name is None:
        raise InputError("adapter_experiment: name the experiment of the base, such as cardiac2d/ldm")
    return with_base_parts(model, experiments.model(name)), experiments._replace(name=name)


def facts_to_assume(plan: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of prepared data where there are some, else what the config says about them; what `facts=`
    states wins.
    """
    root = plan["data"].get("root")
    if root in (None, "???", "-"):
        facts = stated_facts(plan["data"])
    else:
        index = load_index(root)
        facts = {key: index.get(key) for key in FACTS}
    return facts | {key: value for key, value in plan["facts"].items() if value is not None}


def stated_facts(data: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of data that are not prepared yet, as far as their config states them."""
    if data["dataset"] == "swirl":
        return build_datamodule(data, keys=("image",), seed=0).facts
    names, modalities = data["preprocess"]["labels"]["names"], data["modalities"] or ()
    size = data["image_size"]
    return {
        "spatial_dims": data["spatial_dims"],
        "image_channels": 1,
        "num_classes": len(names) if isinstance(names, list) else names or NUM_CLASSES,
        "num_views": 2,
        "num_phases": 2,
        "num_labels": max(2, len(modalities)),
        "label_values": list(modalities),
        "image_size": [size] * data["spatial_dims"] if isinstance(size, int) else size,
    }


def image_shape(plan: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[int, ...]:
    """Voxels of one item in training. InputError where nothing says how many."""
    dims = facts["spatial_dims"]
    size = plan["image_shape"] or plan["data"].get("crop_size") or facts["image_size"]
    shape = (size,) * dims if isinstance(size, int) else tuple(size or ())
    if len(shape) != dims or None in shape:
        raise InputError(
            f"image_shape: the config leaves the size of images open ({size}); give image_shape=[...] with "
            f"{dims} numbers, or data.root=DATA"
        )
    return shape


def stage_before(
    key: str,
    model: Mapping[str, Any],
    plan: Mapping[str, Any],
    experiments: Experiments,
    facts: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Description of a stage: of its checkpoint where that is there, else of the experiment that makes it."""
    path = model[key]["checkpoint"]
    if path != "???" and Path(path).is_file():
        return read_checkpoint(path)["medldm"]
    name = plan.get(OFFERED[key]) or guess_stage(key, model, experiments)
    theirs = experiments.model(name)
    description = {"stage": theirs["kind"], "model": theirs, "facts": facts, "format": 1}
    if theirs.get("first_stage"):  # a translator stands on an autoencoder itself
        description["first_stage"] = stage_before(key, theirs, {}, experiments._replace(name=name), facts)
        theirs["first_stage"]["checkpoint"] = GIVEN
    return description


def guess_stage(key: str, model: Mapping[str, Any], experiments: Experiments) -> str:
    """The experiment of the stage before, by the names beside this one: autopet_ldm -> autopet_vqgan."""
    for candidate in candidate_experiments(key, model, experiments.name):
        if candidate in experiments.known:
            return candidate
    raise InputError(
        f"{key}_experiment: no experiment beside {experiments.name} makes its {key.replace('_', ' ')}; name "
        f"one, for instance {key}_experiment=medlsdm/folder_vqgan"
    )


def candidate_experiments(key: str, model: Mapping[str, Any], name: str) -> Iterator[str]:
    kinds: tuple[str, ...] = ("vqgan", "vqvae")
    if key in ("map_stage", "segmenter"):
        kinds = ("map_vqvae",) if key == "map_stage" else ("segmentation", "folder_segmentation")
    elif "latents" in (model.get("conditioner") or {}):  # diffusion from a translation
        kinds = ("msspade",)
    system, _, own = name.rpartition("/")
    for kind in kinds:
        for ending in ("", ".*"):  # autopet_vqgan_published beside autopet_ldm_published
            yield f"{system}/" + re.sub(f"(ldm|msspade|joint){ending}", kind, own, count=1)
    if key == "segmenter":
        yield from (f"{system}/{kind}" for kind in kinds)
