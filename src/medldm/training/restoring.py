"""Checks the state of a training that a checkpoint holds, before a run goes on from it: what Lightning,
callbacks and optimisers take from it must be of the form that they gave it, whoever wrote the file.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from pytorch_lightning import Callback, LightningDataModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer

from medldm.callbacks.power_averages import TRACKED
from medldm.checkpoints import is_whole, misfits
from medldm.errors import InputError, unreadable
from medldm.models.common import TrainedModule
from medldm.schemas import Count, Finite, Name, Schema, check_schema

ANOTHER = "take another checkpoint of the run"


class State(Schema):
    """What Lightning and medldm's callbacks write beside the weights."""

    version: Annotated[str, Field(alias="pytorch-lightning_version", pattern=r"^\d+\.\d+\.\d+")]
    global_step: Count
    epoch: Count
    loops: dict[str, Any]
    optimizer_states: list[dict[str, Any]]
    lr_schedulers: list[dict[str, Any]]
    callbacks: dict[str, dict[str, Any]]
    random_state: dict[str, Any] | None = None
    ema: dict[str, Any] | None = None
    averages: dict[str, Any] | None = None


class KeptCheckpoints(Schema):
    """The state of the callback `Checkpoints`."""

    best: float | None
    kept: list[tuple[Finite, Name]] = []


def check_state(
    path: Path | None,
    content: Mapping[str, Any] | None,
    module: TrainedModule,
    datamodule: LightningDataModule,
    trainer: Trainer,
) -> None:
    """InputError where the content of the checkpoint that a run continues from has another state than this
    training. Nothing is checked where it continues from none.
    """
    if content is None or path is None:
        return
    check_optimizers(path, content, module)
    check_averages(content, module.ema_modules, path)
    check_like(trainer.fit_loop.state_dict(), content["loops"].get("fit_loop"), f"{path}: loops.fit_loop")
    name = type(datamodule).__qualname__
    if name in content:
        check_like(datamodule.state_dict(), content[name], f"{path}: {name}")
    for callback in trainer.callbacks:
        check_callback(callback, content["callbacks"].get(callback.state_key), path)
    with unreadable(f"{path}: its random_state is damaged; {ANOTHER}"):
        if content.get("random_state") is not None:
            torch.Generator().set_state(content["random_state"]["cpu"].cpu())
    with unreadable(f"{path}: what this model keeps beside its weights is damaged; {ANOTHER}"):
        module.on_load_checkpoint(dict(content))


def check_optimizers(path: Path, content: Mapping[str, Any], module: TrainedModule) -> None:
    """InputError where the weights are not the module's, or the state of optimisers, such as Adam's moments,
    does not have the shapes of their parameters: fused optimisers read and write it without checks.
    """
    optimizers, schedules = module.configure_optimizers()
    states = content.get("optimizer_states")
    if not isinstance(states, list) or len(states) != len(optimizers):
        raise InputError(f"{path}: does not hold the state of {len(optimizers)} optimisers; {ANOTHER}")
    if wrong := misfits(module, content["state_dict"]):
        raise InputError(f"{path}: its state_dict does not fit the model: {wrong}; {ANOTHER}")
    schedules = [entry["scheduler"] if isinstance(entry, dict) else entry for entry in schedules]
    rates = [numbers_in(schedule.state_dict()) for schedule in schedules]
    check_like(rates, content.get("lr_schedulers"), f"{path}: lr_schedulers")
    for optimizer, state in zip(optimizers, states, strict=True):
        groups = [numbers_in(own) | {"params": [...] * len(own["params"])} for own in optimizer.param_groups]
        check_like({"param_groups": groups, "state": {}}, state, f"{path}: optimizer_states")
        with unreadable(f"{path}: the state of its optimiser is damaged; {ANOTHER}"):
            if not fits_parameters(optimizer, state):
                raise InputError(f"{path}: the state of its optimiser does not fit the parameters; {ANOTHER}")


def numbers_in(state: Mapping[str, Any]) -> dict[str, Any]:
    """The entries without switches, which torch adds from version to version and a device decides."""
    return {name: value for name, value in state.items() if value is not None and not isinstance(value, bool)}


def fits_parameters(optimizer: Optimizer, state: Mapping[str, Any]) -> bool:
    """Whether a saved state holds, for each parameter that it numbers, what the optimiser keeps of it."""
    groups = [group["params"] for group in state["param_groups"]]
    own = [group["params"] for group in optimizer.param_groups]
    pairs = [pair for a, b in zip(groups, own, strict=True) for pair in zip(a, b, strict=True)]
    shapes = {number: parameter.shape for number, parameter in pairs}
    names = moments_of(optimizer)
    return all(
        all(kept.get(name) is not None for name in names)
        and all(fits(name, value, shapes[number]) for name, value in kept.items())
        for number, kept in state["state"].items()
    )


def fits(name: str, value: Any, shape: torch.Size) -> bool:
    """Whether a value that an optimiser keeps for a parameter is real and of its shape, or a count of steps;
    None where it keeps nothing yet.
    """
    if name == "step" and isinstance(value, int | float):
        return math.isfinite(value)
    if not isinstance(value, Tensor):
        return value is None and name != "step"
    is_real = value.is_floating_point() and is_whole(value)
    return is_real and (value.numel() == 1 if name == "step" else value.shape == shape)


def check_averages(content: Mapping[str, Any], averaged: nn.Module | None, path: Path) -> None:
    """InputError where a moving average of the weights is not of the modules that it follows."""
    if averaged is None:
        return
    averages = {}
    if content.get("ema"):
        check_like({"n_averaged": torch.tensor(0)}, content["ema"], f"{path}: ema")
        averages["ema"] = {
            k.removeprefix("module."): x for k, x in content["ema"].items() if k != "n_averaged"
        }
    if content.get("averages"):
        form = {"num_updates": 0, "weights": {str(length): {} for length in TRACKED}}
        check_like(form, content["averages"], f"{path}: averages")
        averages |= {
            f"averages.{length}": content["averages"]["weights"][length] for length in form["weights"]
        }
    for key, weights in averages.items():
        if wrong := misfits(averaged, weights):
            raise InputError(f"{path}: its {key} does not fit the model: {wrong}; {ANOTHER}")


def check_callback(callback: Callback, state: Mapping[str, Any] | None, path: Path) -> None:
    """InputError where the state of a callback is not of the form of its own."""
    own = callback.state_dict()
    if state and "best" in own:
        check_schema(state, KeptCheckpoints, path, ANOTHER)
    elif state and own:
        check_like(own, state, f"{path}: callbacks.{type(callback).__name__}")


def check_like(own: Any, given: Any, place: str) -> None:
    """InputError where plain data lack an entry of `own`, or have one of another type, or a number that is
    not finite. What is `...` in `own` may be anything, and further entries may stand beside.
    """
    if isinstance(own, Mapping):
        lacks = [key for key in own if not isinstance(given, Mapping) or key not in given]
        if lacks:
            raise InputError(f"{place}: has no {lacks[0]}; {ANOTHER}")
        for key, value in own.items():
            check_like(value, given[key], f"{place}.{key}")
    elif isinstance(own, list | tuple):
        if not isinstance(given, list | tuple) or len(given) != len(own):
            raise InputError(f"{place}: is no list of {len(own)} entries; {ANOTHER}")
        for number, (value, entry) in enumerate(zip(own, given, strict=True)):
            check_like(value, entry, f"{place}.{number}")
    elif own is not ... and not is_like(own, given):
        raise InputError(f"{place}: is {given!s:.80} in the place of {own!s:.80}; {ANOTHER}")


def is_like(own: Any, given: Any) -> bool:
    if isinstance(own, Tensor):
        return isinstance(given, Tensor) and given.shape == own.shape
    if isinstance(own, bool) or not isinstance(own, int | float):
        return isinstance(given, type(own))
    return isinstance(given, int | float) and not isinstance(given, bool) and math.isfinite(given)


def moments_of(optimizer: Optimizer) -> set[str]:
    """The names of what an optimiser keeps for each parameter, found by a step on one of its own."""
    trial, x = copy.copy(optimizer), nn.Parameter(torch.zeros(1))
    x.grad = torch.zeros(1)
    trial.state, trial.param_groups = defaultdict(dict), [{**optimizer.param_groups[0], "params": [x]}]
    type(trial).step(trial)  # a scheduler has put the original's step into `trial.step`
    return {name for name, value in trial.state[x].items() if value is not None}
