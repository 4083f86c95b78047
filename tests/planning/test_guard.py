"""The guard of counts in scripts/benchmark: what it says of a step that has grown, and what it writes."""

import importlib.util
import json
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark" / "counting.py"


KNOWN = {
    "kernels": 1000, "gigabytes": 2.0, "roofline_ms": 5.0, "uncompiled_kernels": 2000,
    "uncompiled_gigabytes": 4.0,
}  # fmt: skip


@pytest.fixture(scope="module")
def counting():
    spec = importlib.util.spec_from_file_location("counting", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_benchmark_without_rows_takes_all_but_those_on_request():
    benchmark = SCRIPT.parents[1] / "benchmark.py"
    spec = importlib.util.spec_from_file_location("benchmark_script", benchmark)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    options = module.read_options(["--check"])
    assert options.check and options.rows == list(module.rows.ROWS)
    assert module.read_options(["vqvae", "unet"]).rows == ["vqvae", "unet"]
    with pytest.raises(SystemExit):
        module.read_options(["vqvea"])


def test_a_step_that_has_grown_fails_the_guard_and_a_smaller_one_passes(counting, monkeypatch, tmp_path):
    path, told = tmp_path / "counts.json", []
    path.write_text(json.dumps({"a/b": KNOWN}))
    found = KNOWN | {"kernels": 990, "gigabytes": 2.003}
    monkeypatch.setattr(counting, "count", lambda _: counting.Count(**found))
    assert counting.check(["a/b"], path=path, tell=told.append)
    found |= {"kernels": 1003, "gigabytes": 3.0}
    assert not counting.check(["a/b"], path=path, tell=told.append)
    assert told[0].startswith("ok") and told[1].startswith("GROWN")
    assert told[1].endswith("kernels 1000 -> 1003; gigabytes 2 -> 3")
    assert not counting.check(["a/new"], path=path, tell=told.append) and "no committed counts" in told[2]


def test_an_update_writes_what_the_guard_then_accepts(counting, monkeypatch, tmp_path):
    path = tmp_path / "counts.json"
    monkeypatch.setattr(counting, "count", lambda name: counting.Count(len(name), 1.5, 2.5, 9, 3.5))
    assert counting.check(["a/b", "c/long"], path=path, update=True, tell=lambda _: None)
    assert json.loads(path.read_text())["c/long"] == {
        "kernels": 6, "gigabytes": 1.5, "roofline_ms": 2.5, "uncompiled_kernels": 9,
        "uncompiled_gigabytes": 3.5,
    }  # fmt: skip
    assert counting.check(["a/b", "c/long"], path=path, tell=lambda _: None)


def test_every_guarded_experiment_has_its_counts(counting):
    assert set(json.loads(counting.COUNTS.read_text())) == set(counting.EXPERIMENTS)
