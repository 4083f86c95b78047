"""`medldm plan` on experiments: what it prints, what it refuses, and that a trace and a real step agree."""

import re

import pytest
import torch
from omegaconf import OmegaConf

from medldm.commands import plan
from medldm.errors import InputError
from medldm.planning.assume import Experiments, guess_stage
from medldm.planning.measure import measured_step
from medldm.planning.step import random_batch, traced_step, train_step
from medldm.planning.trace import StepTrace
from tests.helpers import compose_config

SMALL = ("image_shape=[16,16]", "data.batch_size=2")


@pytest.fixture
def named(monkeypatch):
    """The experiment's name, which Hydra knows on the command line alone."""

    def name(experiment: str, *overrides: str):
        monkeypatch.setattr("medldm.commands.plan.experiment_name", lambda: experiment)
        return compose_config("plan", f"experiment={experiment}", *overrides)

    return name


def job_of(named, experiment: str, *overrides: str):
    return plan.job_of(OmegaConf.to_container(named(experiment, *overrides), resolve=True), experiment)


ADDITIONS = {
    "none": ("cardiac2d/demo_ldm",),
    "branch": ("cardiac2d/control", "adapter_experiment=cardiac2d/demo_ldm"),
    "segmenter": ("cardiac2d/demo_ldm", "+model/segmenter=contrast"),
}


@pytest.mark.parametrize("addition", ADDITIONS)
def test_a_trace_counts_what_a_real_step_runs(named, addition):
    job = job_of(named, *ADDITIONS[addition], *SMALL)
    cost = traced_step(job, 2, bf16=False, on_cuda=False).cost
    module = job.build()
    batch = random_batch(job, module, 2, torch.device("cpu"))
    with StepTrace() as real:
        train_step(module, batch)
    assert cost.flops == real.cost.flops > 0
    assert cost.num_kernels == pytest.approx(real.cost.num_kernels, rel=0.02)
    assert cost.peak_bytes == pytest.approx(real.cost.peak_bytes, rel=0.02)


def test_the_base_of_a_branch_is_found_by_its_name(named):
    for experiment, base in (
        ("cardiac2d/control", "cardiac2d/ldm"),
        ("medlsdm/control", "medlsdm/folder_ldm"),
    ):
        job = job_of(named, experiment)
        theirs = plan.compose_model(base)
        assert job.model["network"] == theirs["network"] and job.model["schedule"] == theirs["schedule"]
        assert job.first_stage is not None and "mask" in job.keys
    with pytest.raises(InputError, match="adapter_experiment: name the experiment of the base"):
        job_of(named, "aldm/control", "experiment=cardiac2d/control")


def test_a_plan_ends_with_3_where_the_card_is_too_small(named, capsys):
    cfg = named("cardiac2d/demo_vqvae", *SMALL, "gpu=rtx3090", "cards.rtx3090.memory_gib=0.001")
    with pytest.raises(SystemExit) as stop:
        plan.task(cfg)
    assert stop.value.code == 3
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_a_plan_says_what_fits(named, capsys):
    plan.task(named("cardiac2d/demo_vqvae", *SMALL, "gpu=rtx3090", "batches=[4]"))
    printed = capsys.readouterr().out
    assert "fits; data.batch_size up to" in printed and "528 updates" in printed
    assert re.search(r"^blocks compiled; without: \d+ kernels, [\d.]+ GB$", printed, re.MULTILINE)


def test_a_compiled_step_does_the_same_work_with_fewer_bytes(named):
    job = job_of(named, "cardiac2d/demo_ldm", *SMALL)
    traced = traced_step(job, 2, bf16=True, on_cuda=True, compiles=True)
    assert traced.cost.flops == traced.compiled.flops
    assert traced.compiled.num_bytes < traced.cost.num_bytes


def test_where_a_step_does_not_fit_the_plan_says_what_would(named, capsys):
    """The crop that it names fits, and a crop one step larger does not."""
    cfg = named(
        "cardiac2d/demo_vqvae", "image_shape=[64,64]", "data.batch_size=16", "gpu=rtx3090",
        "cards.rtx3090.memory_gib=0.04",
    )  # fmt: skip
    with pytest.raises(SystemExit):
        plan.task(cfg)
    lines = capsys.readouterr().out.splitlines()
    switched = next(line for line in lines if line.startswith("activation checkpointing on"))
    assert "model.autoencoder.use_checkpoint=true" in switched
    (crop,) = [line for line in lines if line.startswith("data.crop_size up to")]
    edge = int(crop.split("[")[1].split(",")[0])
    assert f"[{edge},{edge}] fits at data.batch_size=16" in crop and edge < 64
    whole = OmegaConf.to_container(cfg, resolve=True)
    limit = whole["cards"]["rtx3090"]["memory_gib"] / whole["reserved"]
    sizes = []
    for size in (edge, edge + 8):
        planner = plan.planner_of(whole | {"image_shape": [size, size]}, "rtx3090", "cardiac2d/demo_vqvae")
        sizes.append(planner.estimate(16).memory.allocated)
    assert sizes[0] <= limit
    assert sizes[1] > 0.9 * limit


def test_a_card_and_a_size_that_nobody_knows_are_refused(named):
    with pytest.raises(InputError, match="gpu=rtx9: no such card; choose from rtx3090"):
        plan.task(named("cardiac2d/demo_vqvae", "gpu=rtx9"))
    with pytest.raises(InputError, match="image_shape: the config leaves the size of images open"):
        plan.task(named("cardiac2d/demo_vqvae", "gpu=cpu", "data.image_size=null"))


def test_a_measured_step_runs_the_same_losses(named):
    job = job_of(named, "cardiac2d/demo_vqvae", *SMALL)
    measured = measured_step(job, 2, torch.device("cpu"), 1, bf16=False)
    assert measured.seconds > 0 and measured.allocated_gib is None


@pytest.mark.parametrize(
    ("experiment", "stage"),
    [
        ("medlsdm/autopet_ldm", "medlsdm/autopet_vqgan"),
        ("cardiac2d/ldm_as_run", "cardiac2d/vqvae_as_run"),
        ("aldm/brats_ldm_r3", "aldm/brats_msspade_r3"),
        ("aldm/brats_joint", "aldm/brats_vqgan"),
    ],
)
def test_the_stage_before_is_found_by_its_name(experiment, stage):
    model = {"conditioner": {"latents": []} if "aldm/brats_ldm" in experiment else {}}
    beside = Experiments(experiment, set(plan.known_experiments()), plan.compose_model)
    assert guess_stage("first_stage", model, beside) == stage
