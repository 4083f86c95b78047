"""Takes the config, first stage and weights of a student from the checkpoint of its teacher."""

import logging
from collections.abc import Mapping
from typing import Any

from medldm.build import load_module, module_class
from medldm.checkpoints import read_checkpoint
from medldm.errors import InputError, told_of
from medldm.models.common import TrainedModule
from medldm.models.diffusion import DiffusionModule
from medldm.models.distillation import DistillationModule

log = logging.getLogger(__name__)
KEY = "model.teacher.checkpoint"


def teacher_of(model: Mapping[str, Any]) -> str | None:
    """The path of the teacher in a config; None where that is no distillation."""
    return model["teacher"]["checkpoint"] if model["kind"] == "distillation" else None


def as_student(model: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The config of what is trained, and the content of its teacher's checkpoint where it has one.

    A student has its teacher's parts. min-SNR weights are left out: at pure noise, where a student begins,
    they are 0.
    """
    path = teacher_of(model)
    if path is None:
        return model, None
    if path == "???":
        raise InputError(f"{KEY}: not given; name the checkpoint of a latent diffusion model")
    content = read_checkpoint(path)
    taught = content["medldm"]["model"]
    if not issubclass(module_class(taught), DiffusionModule):
        raise InputError(f"{KEY}={path}: of the kind {taught['kind']}; give a latent diffusion model")
    left = ("teacher", "student_steps", "segmenter")
    student = {key: value for key, value in taught.items() if key not in left} | model
    student["objective"] = taught["objective"]
    if "min_snr_gamma" in taught["objective"]:
        student["objective"] = taught["objective"] | {"min_snr_gamma": None}
    return student, content


def attach_teacher(module: TrainedModule, path: str) -> None:
    """Loads the teacher for a training."""
    assert isinstance(module, DistillationModule)
    with told_of("model.teacher"):
        module.learn_from(load_module(path))
    log.info("learning from %s", path)
