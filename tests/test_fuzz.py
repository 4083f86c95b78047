"""Changed inputs by a seed: each works or ends in one line. `scripts/soak.py --fuzz` tries thousands."""

import importlib.util
import shutil
import sys
from itertools import islice
from pathlib import Path

import pytest

from medldm.commands import train

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "soak" / "mutations.py"


@pytest.fixture(scope="module")
def mutations():
    sys.path.insert(0, str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("mutations", SCRIPT)
    module = sys.modules["mutations"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("kind", "count"),
    [
        ("readers", 300),
        ("folders", 100),
        ("manifests", 100),
        ("indexes", 100),
        ("splits", 40),
        ("recipes", 200),
    ],
)
def test_a_changed_input_works_or_is_told_in_one_line(kind, count, mutations, prepared, tmp_path):
    fuzzer = mutations.Fuzzer(tmp_path, seed=0, prepared=prepared)
    outcomes = [mutations.outcome_of(one) for one in islice(fuzzer.tries(kind), count)]
    assert set(outcomes) <= {"worked", "told"}, {o for o in outcomes if o not in ("worked", "told")}
    assert outcomes.count("told") > count / 4


@pytest.mark.parametrize(
    ("kind", "count"), [("checkpoints", 60), ("resumes", 12), ("records", 12), ("overrides", 60)]
)
def test_a_command_ends_in_one_line_and_leaves_nothing(
    kind, count, mutations, prepared, first_stage, diffusion, tmp_path, monkeypatch
):
    """Changed checkpoints and JSON files, and command lines with bad values."""
    monkeypatch.setattr(train, "fit", train.fit)  # which the fuzzer replaces
    data = shutil.copytree(prepared, tmp_path / "data")
    places = mutations.commandlines.Places(None, data, first_stage, diffusion)
    fuzzer = mutations.Fuzzer(tmp_path, seed=1, prepared=data, places=places)
    outcomes = [mutations.outcome_of(one) for one in islice(fuzzer.tries(kind), count)]
    assert set(outcomes) <= {"worked", "told"}, {o for o in outcomes if o not in ("worked", "told")}
    assert outcomes.count("told") > count / 4


def test_the_same_seed_gives_the_same_inputs(mutations):
    data = bytes(range(256)) * 4
    first, again, other = (
        [mutations.mutate(data, rng) for _ in range(20)]
        for rng in (mutations.random.Random(seed) for seed in (1, 1, 2))
    )
    assert first == again != other
