"""Several processes share the cases of a command: together they write what one writes, to the bit."""

import json
import os
import shutil
import signal
import time
from functools import partial

import h5py
import pytest
import torch

from medldm import locks
from medldm.commands import encode, evaluate, sample
from medldm.errors import InputError
from medldm.locks import one_writer
from medldm.shards import Shard, read_shard
from tests.helpers import compose_config


def contents(folder, *patterns) -> dict:
    """The arrays of HDF5 files and the bytes of all others, by name."""
    found = {}
    for path in sorted(path for pattern in patterns for path in folder.rglob(pattern)):
        name = str(path.relative_to(folder))
        if path.suffix != ".h5":
            found[name] = path.read_bytes()
            continue
        with h5py.File(path) as file:
            found |= {f"{name}:{key}": file[key][()].tobytes() for key in file}
    return found


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_have_each_item_once_and_differ_by_one_at_most(count):
    parts = [Shard(k + 1, count).part(range(5)) for k in range(count)]
    assert sum(parts, []) == list(range(5))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@pytest.mark.parametrize(
    ("given", "environment", "expected"),
    [
        (None, {}, None),
        ("2/4", {}, Shard(2, 4)),
        ("1/1", {}, None),
        ("array", {"ID": 3, "COUNT": 4, "MIN": 1, "MAX": 4}, Shard(3, 4)),
        ("array", {"ID": 4, "COUNT": 3, "MIN": 0, "MAX": 4}, Shard(3, 3)),  # --array=0-4:2
        ("array", {"ID": 3, "COUNT": 1, "MIN": 3, "MAX": 3}, None),  # one element, submitted again
        ("tasks", {"PROCID": 0, "NTASKS": 2}, Shard(1, 2)),
        ("array", {"ID": 5, "COUNT": 3, "MIN": 1, "MAX": 8}, "not evenly spaced"),
        ("array", {}, "not one of `sbatch --array=1-N`"),
        ("tasks", {}, "not one of `srun -n N`"),
        ("5/4", {}, "shard=5/4: give k/n"),
        ("0/4", {}, "shard=0/4: give k/n"),
        (2, {}, "shard=2: give k/n"),
    ],
)
def test_a_share_is_given_by_its_number_or_by_slurm(monkeypatch, given, environment, expected):
    for name in ("ID", "COUNT", "MIN", "MAX"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
    for name in ("PROCID", "NTASKS"):
        monkeypatch.delenv(f"SLURM_{name}", raising=False)
    start = "SLURM_ARRAY_TASK_" if given == "array" else "SLURM_"
    for name, value in environment.items():
        monkeypatch.setenv(start + name, str(value))
    if isinstance(expected, str):
        with pytest.raises(InputError, match=expected):
            read_shard(given)
    else:
        assert read_shard(given) == expected


def sample_all(prepared, diffusion, output, *overrides) -> None:
    paths = (f"checkpoint={diffusion}", f"data.root={prepared}", f"output={output}", "split=all")
    options = ("num_samples=2", "max_slices=2", "data.batch_size=3", "sampler.num_steps=2")
    allowed = "allow_training_subjects=true"
    sample.task(compose_config("sample", *paths, *options, allowed, *overrides))


@pytest.fixture(scope="module")
def sampled(prepared, diffusion, tmp_path_factory):
    """Samples of all cases: by one process, and by two of which one lost a case and was started again."""
    run = partial(sample_all, prepared, diffusion)
    whole, shared = (tmp_path_factory.mktemp(name) for name in ("whole", "shared"))
    run(whole)
    run(shared, "shard=2/2")
    half = sorted(path.name for path in shared.glob("*.h5"))
    (shared / half[1]).unlink()
    for number in (1, 2):
        run(shared, f"shard={number}/2")
    return whole, shared, half


def test_samples_of_a_killed_process_go_on_to_the_same_bits(prepared, diffusion, sampled, tmp_path):
    """It is killed while it writes its first case."""
    child = os.fork()
    if child == 0:
        try:
            torch.set_num_threads(1)
            sample_all(prepared, diffusion, tmp_path)
        finally:
            os._exit(0)
    end = time.monotonic() + 60
    while not any(tmp_path.rglob("*.h5*")) and time.monotonic() < end:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    sample_all(prepared, diffusion, tmp_path)
    patterns = ("*.h5", "*.png")
    assert contents(tmp_path, *patterns) == contents(sampled[0], *patterns)
    assert not [path.name for path in tmp_path.rglob("*") if path.name.endswith((".tmp", ".lock"))]


def test_two_shares_of_samples_are_those_of_one_process_to_the_bit(sampled):
    """Batches of three images span cases, and the shares do not end where a batch does."""
    whole, shared, half = sampled
    expected = contents(whole, "*.h5", "*.png")
    assert contents(shared, "*.h5", "*.png") == expected
    cases = sorted(path.name for path in whole.glob("*.h5"))
    assert half == cases[len(cases) // 2 :] and len(cases) * 2 // 2 % 3


def test_two_shares_fill_one_cache_and_the_last_says_that_it_is_whole(prepared, first_stage, tmp_path):
    facts = []
    for name, shards in (("whole", ("null",)), ("shared", ("1/2", "2/2"))):
        root = shutil.copytree(prepared, tmp_path / name)
        shutil.rmtree(root / "latents", ignore_errors=True)
        for number, shard in enumerate(shards):
            paths = (f"checkpoint={first_stage}", f"data.root={root}", f"shard={shard}", "audit=2")
            encode.task(compose_config("encode", *paths, "data.num_workers=0"))
            assert len(list(root.glob("latents/*/latents.json"))) == (number + 1 == len(shards))
        facts.append(json.loads(next(root.glob("latents/*/latents.json")).read_text()))
    whole, shared = (contents(tmp_path / name / "latents", "*.h5") for name in ("whole", "shared"))
    assert whole == shared and len(whole) > 2
    assert facts[0] == facts[1]


def test_two_shares_of_an_evaluation_are_put_together_by_the_last(prepared, sampled, tmp_path):
    def run(output, *overrides):
        paths = (f"generated={sampled[0]}", f"reference={prepared}", f"output={output}")
        options = ("metrics.lpips=null", "metrics.features=[random_conv]", "panel_rows=1")
        evaluate.task(compose_config("evaluate", *paths, *options, f"train={prepared}", *overrides))

    whole, shared = tmp_path / "whole", tmp_path / "shared"
    run(whole)
    run(shared, "shard=2/2")
    assert not (shared / "metrics.json").exists()
    stamp = (shared / "shares/2of2.pt").stat().st_mtime_ns
    run(shared, "shard=2/2")  # started again, it measures nothing twice
    assert (shared / "shares/2of2.pt").stat().st_mtime_ns == stamp
    run(shared, "shard=1/2")
    assert (whole / "per_case.csv").read_bytes() == (shared / "per_case.csv").read_bytes()
    results = [json.loads((folder / "metrics.json").read_text()) for folder in (whole, shared)]
    for result in results:
        del result["folders"]
    assert results[0] == results[1]
    assert contents(whole, "*.png") == contents(shared, "*.png")


def test_shares_measured_otherwise_are_not_put_together(prepared, sampled, tmp_path):
    paths = (f"generated={sampled[0]}", f"reference={prepared}", f"output={tmp_path}", "panel_rows=0")
    options = (*paths, "metrics.lpips=null", "metrics.features=[]", "browse_volumes=0")
    evaluate.task(compose_config("evaluate", *options, "shard=1/2"))
    evaluate.task(compose_config("evaluate", *options, "shard=2/2", "metrics.image=[mae]"))
    assert not (tmp_path / "metrics.json").exists()


def test_shares_write_beside_each_other_and_nothing_else_does(tmp_path):
    with one_writer(tmp_path, share=(1, 2)):
        others = {
            "another process's second half": ((2, 2), True),
            "the same half": ((1, 2), False),
            "a third": ((3, 3), False),
            "the whole": (None, False),
        }
        for what, (share, is_free) in others.items():
            assert can_write(tmp_path, share) is is_free, what
    assert can_write(tmp_path, None)
    with one_writer(tmp_path):
        assert not can_write(tmp_path, (1, 2))
    assert list(tmp_path.iterdir()) == []


def can_write(folder, share) -> bool:
    """Whether another process may write there."""
    child = os.fork()
    if child == 0:
        locks.BEGINNING = 0.0
        try:
            with one_writer(folder, share=share):
                os._exit(0)
        except InputError:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_interpolations_are_not_divided(prepared, diffusion, tmp_path):
    paths = (f"checkpoint={diffusion}", f"data.root={prepared}", f"output={tmp_path / 'out'}", "split=all")
    with pytest.raises(InputError, match="shard=1/2: interpolations are not divided"):
        sample.task(compose_config("sample", *paths, "interpolate.count=2", "shard=1/2"))
    assert not (tmp_path / "out").exists()
