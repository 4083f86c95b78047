"""medldm plan: what an experiment will need on a card, before it runs: memory, work, time, and what fits.

  medldm plan experiment=medlsdm/autopet_ldm gpu=rtx3090
  medldm plan experiment=cardiac2d/vqvae gpu=a6000 data.batch_size=48 image_shape=[320,320]

Every override of `medldm train` counts. Nothing is computed: one training step is followed through its
shapes. That takes seconds, and needs neither a GPU nor data nor checkpoints.

Keys people use:
  gpu=rtx3090|a6000|a100|h100|h200|cpu    default: the device of this machine
  data.root=DATA              take number of classes, image size and length of an epoch from prepared data
  image_shape=[32,256,256]    voxels that training sees
  first_stage_experiment=E    what to assume for model.first_stage.checkpoint; adapter_experiment,
                              segmenter_experiment: for those checkpoints
  alternatives=true           also which crop fits, and what activation checkpointing changes; both are shown
                              anyway where the step does not fit
  operations=10               also list the operations that move most bytes
  measure=true                also run the steps on this machine's device, on random data

Ends with status 3 where the card cannot hold the step.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from medldm.build import batch_keys
from medldm.commands import CONFIG_DIR, experiment_name, run_command
from medldm.devices import CPU, GPU, compiles_on, pick_device
from medldm.errors import InputError
from medldm.planning.assume import Experiments, describe_job, with_assumed_base
from medldm.planning.estimate import HEADER, Estimate, Planner, operations_table, settings, this_device
from medldm.planning.fit import advice
from medldm.planning.measure import measured_step
from medldm.planning.step import Job
from medldm.training.teacher import teacher_of

TOO_LARGE = 3  # exit status


def task(cfg: DictConfig) -> None:
    plan = OmegaConf.to_container(cfg, resolve=True)
    gpu = plan["gpu"] or this_device()
    planner = planner_of(plan, gpu, experiment_name())
    precision = "bf16-mixed" if planner.bf16 else "32-true"
    print(f"{experiment_name()} on {gpu}, {precision}, {list(planner.job.image_shape)} voxels\n{HEADER}")
    found = planner.estimate(int(plan["data"]["batch_size"]))
    for row in (found, *(planner.estimate(int(n)) for n in plan["batches"])):
        print(row.row(), flush=True)
    if planner.compiles:
        print(f"blocks compiled; without: {found.uncompiled}")
    for line in (*operations_table(found.cost, plan["operations"]), *advice(planner, found, plan)):
        print(line, flush=True)
    if plan["measure"]:
        print(measured(planner, found, int(plan["measure_steps"])))
    if found.memory.allocated * plan["reserved"] > planner.card.memory_gib:
        sys.exit(TOO_LARGE)


def planner_of(plan: Mapping[str, Any], gpu: str, experiment: str) -> Planner:
    """The estimator of a resolved config on a card. InputError where there is no such card."""
    if gpu not in plan["cards"]:
        raise InputError(f"gpu={gpu}: no such card; choose from {', '.join(plan['cards'])}")
    card, habits = settings(plan, gpu)
    precision = plan["trainer"]["precision"]
    if precision == "auto":
        precision = "bf16-mixed" if card.bf16 else "32-true"
    return Planner(
        job=job_of(plan, experiment),
        card=card,
        habits=habits,
        bf16=precision == "bf16-mixed",
        on_cuda=gpu != "cpu",
        averages=bool(plan["callbacks"]["ema"]),
        compiles=compiles_on(CPU if gpu == "cpu" else GPU, plan["compile"]),
    )


def plan_of(experiment: str, *overrides: str) -> Estimate:
    """The estimate of one step at an experiment's own batch, on the card that `gpu=` names."""
    with configs():
        cfg = compose("plan", overrides=[f"experiment={experiment}", *overrides])
    plan = OmegaConf.to_container(cfg, resolve=True)
    planner = planner_of(plan, plan["gpu"], experiment)
    return planner.estimate(int(plan["data"]["batch_size"]))


def measured(planner: Planner, found: Estimate, count: int) -> str:
    """The same step on this machine's device, beside what was expected."""
    device = pick_device()
    real = measured_step(planner.job, found.batch_size, device, count, bf16=planner.bf16)
    memory = "" if real.allocated_gib is None else (
        f", {real.allocated_gib:.2f} GiB allocated ({found.memory.allocated:.2f} expected), "
        f"{real.reserved_gib:.2f} reserved"
    )  # fmt: skip
    low, high = real.spread
    return (
        f"measured on {device.type}: {1e3 * real.seconds:.4g} ms a step [{1e3 * low:.4g}, {1e3 * high:.4g}], "
        f"n = {count}; expected {1e3 * found.expected:.4g}, at least {1e3 * found.roofline:.4g}{memory}"
    )


def job_of(plan: Mapping[str, Any], experiment: str) -> Job:
    """The job of a config, with the experiments beside it for stages that are not trained yet."""
    experiments = Experiments(experiment, set(known_experiments()), compose_model)
    if teacher_of(plan["model"]) is not None:
        raise InputError(
            "model.teacher.checkpoint: a student's parts are its teacher's, which this config does not hold; "
            "ask for the teacher's experiment instead"
        )
    model, experiments = with_assumed_base(plan, experiments)
    keys = batch_keys(model, plan["data"].get("latents"))
    return describe_job({**plan, "model": model}, experiments, keys)


def known_experiments() -> Iterator[str]:
    folder = CONFIG_DIR / "experiment"
    return (str(path.relative_to(folder).with_suffix("")) for path in folder.rglob("*.yaml"))


def compose_model(experiment: str) -> dict[str, Any]:
    """The model's config of another experiment."""
    with configs():
        cfg = compose("train", overrides=[f"experiment={experiment}", "data.root=-"])
    return OmegaConf.to_container(cfg.model, resolve=True)


def configs() -> AbstractContextManager:
    """A context in which `compose` finds medldm's configs: the one that Hydra has set up, or one
    of its own.
    """
    if GlobalHydra.instance().is_initialized():
        return nullcontext()
    return initialize_config_dir(str(CONFIG_DIR), version_base="1.3")


def main() -> None:
    run_command(task, "plan")


if __name__ == "__main__":
    main()
