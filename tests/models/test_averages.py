"""Averages of any length after training, against profiles that are tracked directly."""

import json

import pytest
import torch

from medldm.averages import (
    Snapshot,
    combination,
    decay_at,
    exponent,
    profile,
    snapshots_of,
    use_average,
    weighted_sum,
    write_average,
)
from medldm.build import load_module
from medldm.callbacks import PowerAverages
from medldm.commands import sample
from medldm.errors import InputError
from tests.helpers import compose_config
from tests.models.test_ema import Recorder
from tests.training import LDM, PIXELS, build, fit, make_batches


def followed(values, length):
    """The average of values 1 .. n by its recursion."""
    average = torch.zeros_like(values[0])
    for n, value in enumerate(values, 1):
        average = torch.lerp(value, average, decay_at(n, length))
    return average


@pytest.mark.parametrize(("length", "gamma"), [(0.05, 16.97), (0.1, 6.94), (12**-0.5, 0.0)])
def test_lengths_have_the_papers_exponents(length, gamma):
    assert exponent(length) - 1 == pytest.approx(gamma, abs=5e-3)


@pytest.mark.parametrize("length", [0.02, 0.1, 0.25])
def test_a_profile_is_what_the_recursion_gives_and_as_wide_as_it_says(length):
    tracked = followed(torch.eye(200, dtype=torch.float64), length)
    torch.testing.assert_close(tracked, profile(200, length), rtol=1e-12, atol=0)
    weights, times = profile(20_000, length), (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    mean = (weights * times).sum()
    assert (weights * (times - mean) ** 2).sum().sqrt().item() == pytest.approx(length, rel=1e-4)


def embedded(snapshot, size):
    row = torch.zeros(size, dtype=torch.float64)
    row[: snapshot.update] = profile(snapshot.update, snapshot.length)
    return row


def test_the_combination_is_the_least_squares_of_the_profiles():
    stored = [Snapshot(n, length) for n in (40, 80, 120, 160, 200) for length in (0.05, 0.1)]
    rows = torch.stack([embedded(snapshot, 200) for snapshot in stored])
    for length in (0.03, 0.07, 0.15, 0.2):
        factors, missed = combination(stored, Snapshot(200, length))
        wanted = profile(200, length)
        expected = torch.linalg.lstsq(rows.t(), wanted[:, None]).solution[:, 0]
        torch.testing.assert_close(factors, expected, rtol=1e-4, atol=1e-6)
        residual = (factors @ rows - wanted).norm() / wanted.norm()
        assert missed == pytest.approx(residual.item(), abs=1e-6)


@pytest.mark.parametrize("snapshot", [Snapshot(160, 0.05), Snapshot(200, 0.1)])
def test_what_was_stored_comes_back_as_it_was(snapshot):
    stored = [Snapshot(n, length) for n in (120, 160, 200) for length in (0.05, 0.1)]
    factors, missed = combination(stored, snapshot)
    expected = torch.tensor([float(key == snapshot) for key in stored], dtype=torch.float64)
    torch.testing.assert_close(factors, expected, rtol=0, atol=1e-6)
    assert missed < 1e-6


@pytest.mark.parametrize("length", [0.05, 0.1, 0.17, 0.25])
def test_any_length_of_a_training_equals_the_one_tracked_directly(tmp_path, length):
    """With an average stored at every update, every profile is a sum of theirs."""
    module, recorder = build(LDM, *PIXELS, "model.optimizer.lr=0.01"), Recorder()
    trainer = fit(module, make_batches(6, 2), PowerAverages(tmp_path, every_n_steps=1), recorder)
    found = snapshots_of(tmp_path)
    assert list(found) == [Snapshot(n, x) for n in range(1, 7) for x in (0.05, 0.1)]
    factors, missed = combination(list(found), Snapshot(6, length))
    total = weighted_sum(factors, found.values())
    names = [name for name, _ in module.ema_modules.named_parameters()]
    for i, name in enumerate(names):
        expected = followed([weights[i].double() for weights in recorder.weights], length)
        torch.testing.assert_close(total[name], expected, rtol=1e-5, atol=1e-6)
    assert missed < 1e-5 and trainer.global_step == 6


def test_files_are_bounded_and_the_last_one_stays(tmp_path):
    for update in range(1, 40):
        write_average(tmp_path, Snapshot(update, 0.05), {"w": torch.tensor(float(update))}, keep=6)
        updates = [key.update for key in snapshots_of(tmp_path)]
        assert len(updates) <= 6 and updates[-1] == update


def test_a_resumed_run_goes_on_with_its_averages(tmp_path):
    """Six updates at once, and three and three."""
    whole, first, second = (PowerAverages(tmp_path / name, every_n_steps=3) for name in "abc")
    batches, content = make_batches(6, 2), {}
    fit(build(LDM, *PIXELS), batches, whole)
    module = build(LDM, *PIXELS)
    fit(module, batches[:3], first)
    first.on_save_checkpoint(None, module, content)
    second.on_load_checkpoint(None, module, content)
    second.on_fit_start(None, module)
    assert second.num_updates == 3
    for length, average in first.averages.items():
        for mine, theirs in zip(second.averages[length].parameters(), average.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    assert {key.update for key in snapshots_of(tmp_path / "a")} == {3, 6}


def test_samples_are_drawn_with_an_average_of_the_length_that_was_asked_for(prepared, diffusion, tmp_path):
    module = load_module(diffusion)
    assert use_average(module.ema_modules, diffusion, 0.1) == Snapshot(2, 0.1)
    stored = torch.load(snapshots_of(diffusion.parent.parent)[Snapshot(2, 0.1)], weights_only=True)
    for name, value in module.ema_modules.state_dict().items():
        torch.testing.assert_close(value, stored[name])
    settings = (f"checkpoint={diffusion}", f"data.root={prepared}", "split=val", "limit=1", "max_slices=1")
    options = ("sampler.num_steps=1", "device=cpu", "png=false", "allow_training_subjects=true")
    sample.task(compose_config("sample", *settings, *options, f"output={tmp_path}", "ema_length=0.1"))
    assert json.loads((tmp_path / "provenance.json").read_text())["ema_length"] == 0.1


def test_what_cannot_be_averaged_is_told_in_one_line(first_stage, diffusion, prepared, tmp_path):
    module = load_module(diffusion)
    with pytest.raises(InputError, match=r"ema_length=0.5 must lie in \(0, 0.289\]"):
        use_average(module.ema_modules, diffusion, 0.5)
    with pytest.raises(InputError, match="train with callbacks=post_hoc_ema"):
        use_average(module.ema_modules, first_stage, 0.1)
    cfg = compose_config("sample", f"checkpoint={diffusion}", "output=-", "weights=raw", "ema_length=0.1")
    with pytest.raises(InputError, match="ema_length=0.1: has no effect"):
        sample.average_as_asked(cfg, module)
    with pytest.raises(InputError, match="callbacks.post_hoc_ema: every_n_steps=0"):
        PowerAverages(tmp_path, every_n_steps=0)
