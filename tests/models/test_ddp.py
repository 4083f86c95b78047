"""Two processes with gloo equal one process with twice the batch, through the command line."""

import math
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from medldm.errors import InputError
from medldm.models.adversarial import AdversarialModule
from medldm.networks.discriminator import PatchDiscriminator
from medldm.training.trainer import check_tasks, scale_rates, syncs_batchnorm
from tests.training import (
    LDM,
    LONGER,
    PLAIN_SGD,
    RESTARTING_CODES,
    VQVAE,
    gpu_settings,
    load,
    read_metrics,
    run_training,
)


def train_in_two_processes(root, run_dir, *overrides, program=("-m", "medldm.commands.train")) -> None:
    command = [
        sys.executable, *program, "debug=tiny", f"data.root={root}",
        f"run_dir={run_dir}", "trainer.enable_progress_bar=false", *overrides,
        "trainer.devices=2", "data.batch_size=2",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900)
    assert finished.returncode == 0, finished.stderr
    lines = finished.stdout.splitlines()
    text = finished.stdout + finished.stderr
    assert text.count("batch: 2 a process x 2 processes on 1 nodes x 1 accumulated = 4 an update") == 1
    assert lines[-1] == str(run_dir) and lines.count(lines[-1]) == 1  # printed by the first rank alone


@pytest.mark.parametrize(
    ("norm", "choice", "devices", "has_gpu", "expected"),
    [
        ("batch", "auto", 2, True, True),
        ("batch", True, 2, True, True),
        ("batch", False, 2, True, False),
        ("batch", "auto", 1, True, False),
        ("batch", "auto", 2, False, False),
        ("group", "auto", 2, True, False),
        ("batch", True, 1, True, "the run is one process"),
        ("group", True, 2, True, "no batch norm"),
        ("batch", True, 2, False, "only GPUs"),
        ("batch", "yes", 2, True, "none of true, false, auto"),
    ],
)
def test_batch_norms_of_several_processes_are_synchronised(
    monkeypatch, caplog, norm, choice, devices, has_gpu, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    module = PatchDiscriminator(2, channels=(4, 8), strides=(2, 2), norm=norm)
    options = {"accelerator": "auto", "devices": devices, "num_nodes": 1, "sync_batchnorm": choice}
    if isinstance(expected, str):
        with pytest.raises(InputError, match=f"trainer.sync_batchnorm.*{expected}"):
            syncs_batchnorm(options, module)
    else:
        assert syncs_batchnorm(options, module) is expected
    is_left_alone = (norm, choice, devices, has_gpu) == ("batch", "auto", 2, False)
    assert ("own part of a batch" in caplog.text) == is_left_alone


@pytest.mark.parametrize(
    ("choice", "expected"),
    [(None, 1e-3), ("linear", 4e-3), ("sqrt", 2e-3), ("cubic", "none of null, linear")],
)
def test_learning_rates_are_scaled_by_the_number_of_processes_where_that_is_asked(choice, expected):
    optimizer, other = (partial(torch.optim.AdamW, lr=lr) for lr in (1e-3, 1e-2))
    module = AdversarialModule(discriminators=(), optimizer=optimizer, discriminator_optimizer=other)
    if isinstance(expected, str):
        with pytest.raises(InputError, match=f"scale_lr=cubic is {expected}"):
            scale_rates(choice, module, 4)
        return
    scale_rates(choice, module, 4)
    weight = [torch.nn.Parameter(torch.ones(1))]
    makers = (module.make_optimizer, module.make_discriminator_optimizer)
    rates = [make(weight).defaults["lr"] for make in makers]
    assert rates == [expected, 10 * expected]


def test_an_optimiser_without_a_rate_is_not_scaled():
    module = AdversarialModule(discriminators=(), optimizer=torch.optim.AdamW)
    with pytest.raises(InputError, match="scale_lr: the optimiser states no learning rate"):
        scale_rates("linear", module, 2)


@pytest.mark.parametrize(
    ("tasks", "nodes", "fits"), [(8, 2, True), (8, 1, False), (1, 1, False), (None, None, True)]
)
def test_a_slurm_step_must_have_the_trainer_s_tasks_and_nodes(monkeypatch, tasks, nodes, fits):
    for name, value in (("TASKS", tasks), ("NODES", nodes)):
        monkeypatch.delenv(f"SLURM_STEP_NUM_{name}", raising=False)
        if value is not None:
            monkeypatch.setenv(f"SLURM_STEP_NUM_{name}", str(value))
    options = {"accelerator": "cpu", "devices": 4, "num_nodes": 2}
    if fits:
        check_tasks(options)
        return
    with pytest.raises(InputError, match=f"8 processes, but this .* has {tasks} tasks on {nodes} nodes"):
        check_tasks(options)


@pytest.mark.parametrize("model", ["autoencoder", "diffusion"])
def test_two_processes_equal_one_with_twice_the_batch(prepared, first_stage, tmp_path, model):
    """The optimiser is SGD, because where a gradient is all rounding, Adam's first steps are as large as
    elsewhere, and the discriminator has no norms, because those of its first, nearly constant features make
    a difference of 1e-6 between images one of 6e-4 between gradients. Diffusion is stopped after three
    updates, in the middle of an epoch, and resumed.
    """
    options = {
        "autoencoder": (
            VQVAE, *LONGER, *PLAIN_SGD, RESTARTING_CODES, "model.discriminators.image.norm=none",
        ),
        "diffusion": (
            LDM, *LONGER, *PLAIN_SGD, f"model.first_stage.checkpoint={first_stage}",
            "model.conditioner.drop_all_prob=0.3",
        ),
    }[model]  # fmt: skip
    resume = ("resume=auto",) if model == "diffusion" else ()
    if resume:
        train_in_two_processes(prepared, tmp_path / "two", *options, "trainer.max_steps=3")
    train_in_two_processes(prepared, tmp_path / "two", *options, *resume)
    contents = [
        load(run_training(prepared, tmp_path / "one", *options)),
        load(tmp_path / "two/checkpoints/last.ckpt"),
    ]
    assert [content["global_step"] for content in contents] == [8, 8]
    for part in ("state_dict", "ema"):
        one, two = (content.get(part, {}) for content in contents)
        assert one.keys() == two.keys()
        for key, value in one.items():
            torch.testing.assert_close(
                two[key], value, atol=2e-6, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}"
            )
    assert ("ema" in contents[0]) == (model == "diffusion")
    one, two = (
        sorted(p.name for p in (tmp_path / name).rglob("*") if p.is_file()) for name in ("one", "two")
    )
    assert two == sorted([*one, "commands.txt"])  # a training that was typed notes its command


AS_ON_A_GPU = """
from medldm.commands import train
from medldm.networks.compiling import wrap_blocks

train.compile_blocks = lambda module, folder: wrap_blocks(module, lambda call: call)  # as compiled ones
train.main()
"""


def test_two_processes_train_under_a_gpu_s_settings(prepared, tmp_path):
    """bf16, channels_last, clipping, a fused optimiser, and blocks that round their weights at once."""
    program = tmp_path / "train.py"
    program.write_text(AS_ON_A_GPU)
    options = (VQVAE, "model.adversarial.start=0", *gpu_settings(VQVAE), "compile=true")
    train_in_two_processes(prepared, tmp_path / "run", *options, program=(str(program),))
    content = load(tmp_path / "run/checkpoints/last.ckpt")
    assert content["global_step"] == 2
    losses = [float(row["train/loss"]) for row in read_metrics(tmp_path / "run") if row["train/loss"]]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    values = [x for x in content["state_dict"].values() if x.is_floating_point()]
    assert {x.dtype for x in values} == {torch.float32} and all(x.isfinite().all() for x in values)
