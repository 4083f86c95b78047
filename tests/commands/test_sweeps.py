"""Sweeps whose jobs run side by side, by Hydra's submitit launcher: `medldm train -m hydra/launcher=...`."""

import pytest

from medldm.commands import CONFIG_DIR, user_message
from medldm.errors import InputError
from medldm.overrides import explain
from medldm.runs import find_run_dir

LAUNCHER = "hydra/launcher=submitit_slurm"


def test_a_missing_launcher_is_told_with_the_command_that_installs_it():
    error = Exception(
        "In 'hydra/config': Could not find 'hydra/launcher/submitit_slurm'\n\nAvailable options"
    )
    told = explain(error, "train", ["-m", LAUNCHER, "seed=1,2"], CONFIG_DIR)
    assert told == f"{LAUNCHER}: needs hydra-submitit-launcher; run `pip install 'medldm[sweep]'`"


def test_a_mistake_in_a_job_is_told_in_the_job_s_own_line():
    lines = ("Job 7 (task: 0) has not produced any output", "medldm train: data.root=/x: no such folder", "")
    failed = type("UncompletedJobError", (RuntimeError,), {"__module__": "submitit.core.utils"})
    assert user_message(failed("\n".join(lines)), "train") == "data.root=/x: no such folder"
    assert user_message(failed("Traceback (most recent call last):"), "train") is None
    assert user_message(RuntimeError("\n".join(lines)), "train") is None


def test_the_jobs_of_a_sweep_have_folders_of_their_own(tmp_path):
    (one, _), (two, _) = (find_run_dir(tmp_path, None, None, job) for job in (0, 1))
    assert (one.name[-5:], two.name[-5:]) == ("-job0", "-job1")
    with pytest.raises(InputError, match=r"run_dir='runs/sweep/\$\{hydra:job\.num\}'"):
        find_run_dir(tmp_path, None, "auto", 0)
    assert find_run_dir(tmp_path, str(tmp_path / "0"), "auto", 0) == (tmp_path / "0", None)
