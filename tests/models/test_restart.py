"""A run that is killed and resumed ends bit-equal to the one that was not."""

import shutil
import signal
from functools import partial

import pytest

from medldm.callbacks import StopOnSignal
from tests.training import (
    LDM,
    LONGER,
    RESTARTING_CODES,
    VQVAE,
    first_difference,
    kill_self,
    load,
    read_metrics,
    run_training,
    train_in_child,
)

SAVES = "callbacks.checkpoints.every_n_steps=2"


@pytest.fixture(scope="module")
def overrides(first_stage):
    accumulated = ("trainer.accumulate_grad_batches=2", "data.batch_size=2")  # 11 batches, 6 updates an epoch
    autoencoder = (VQVAE, *LONGER, SAVES, RESTARTING_CODES, "model.autoencoder.dropout=0.1")
    diffusion = (
        LDM,
        *LONGER,
        SAVES,
        f"model.first_stage.checkpoint={first_stage}",
        "model.network.dropout=0.1",
    )
    return {
        "autoencoder": autoencoder,
        "diffusion": diffusion,
        "autoencoder_accumulated": (*autoencoder, *accumulated),
        "diffusion_accumulated": (*diffusion, *accumulated),
    }


@pytest.fixture(scope="module")
def uninterrupted(prepared, overrides, tmp_path_factory):
    """Run folders of the runs that nothing happened to, by name, each trained once."""
    runs = {}

    def run(name: str):
        if name not in runs:
            runs[name] = tmp_path_factory.mktemp(name) / "run"
            run_training(prepared, runs[name], *overrides[name])
        return runs[name]

    return run


def assert_same_end(run_dir, reference) -> None:
    for name in ("last.ckpt", "best.ckpt"):
        ends = [load(folder / "checkpoints" / name) for folder in (run_dir, reference)]
        for end in ends:
            end.pop("loops")
        assert first_difference(*ends) is None
    assert read_metrics(run_dir) == read_metrics(reference)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("model", ["autoencoder", "diffusion"])
def test_a_run_killed_mid_epoch_and_resumed_ends_bit_equal(
    prepared, overrides, uninterrupted, tmp_path, model, num_workers
):
    options = (*overrides[model], f"data.num_workers={num_workers}")
    status = train_in_child(prepared, tmp_path / "run", *options, at_batch=3, act=kill_self)
    assert status == -signal.SIGKILL
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 2
    run_training(prepared, tmp_path / "run", *options, "resume=auto")
    assert_same_end(tmp_path / "run", uninterrupted(model))


@pytest.mark.parametrize("model", ["autoencoder", "diffusion"])
def test_a_run_resumed_from_the_end_of_an_epoch_ends_bit_equal(
    prepared, overrides, uninterrupted, tmp_path, model
):
    status = train_in_child(prepared, tmp_path / "run", *overrides[model], at_batch=5, act=kill_self)
    assert status == -signal.SIGKILL
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 5
    run_training(prepared, tmp_path / "run", *overrides[model], "resume=auto")
    assert_same_end(tmp_path / "run", uninterrupted(model))


@pytest.mark.parametrize("model", ["autoencoder_accumulated", "diffusion_accumulated"])
def test_a_run_killed_between_accumulated_batches_resumes_from_the_last_update(
    prepared, overrides, uninterrupted, tmp_path, model
):
    # Batches 4 and 5 are update 3: the run dies in its middle.
    options = overrides[model]
    status = train_in_child(prepared, tmp_path / "run", *options, at_batch=5, act=kill_self)
    assert status == -signal.SIGKILL
    assert load(tmp_path / "run/checkpoints/last.ckpt")["global_step"] == 2
    run_training(prepared, tmp_path / "run", *options, "resume=auto")
    assert_same_end(tmp_path / "run", uninterrupted(model))


def test_a_run_killed_twice_ends_bit_equal(prepared, overrides, uninterrupted, tmp_path):
    for batch in (3, 7):
        options = (*overrides["autoencoder"], "resume=auto")
        assert train_in_child(prepared, tmp_path / "run", *options, at_batch=batch, act=kill_self) < 0
    run_training(prepared, tmp_path / "run", *overrides["autoencoder"], "resume=auto")
    assert_same_end(tmp_path / "run", uninterrupted("autoencoder"))


def test_a_run_resumed_from_best_ends_bit_equal(prepared, overrides, uninterrupted, tmp_path):
    reference = uninterrupted("diffusion")
    run_dir = tmp_path / "run"
    assert train_in_child(prepared, run_dir, *overrides["diffusion"], at_batch=7, act=kill_self) < 0
    best = run_dir / "checkpoints/best.ckpt"  # written during the validation of epoch one
    assert load(best)["global_step"] == 5
    run_training(prepared, run_dir, *overrides["diffusion"], f"resume={best}")
    assert_same_end(run_dir, reference)


@pytest.mark.parametrize("model", ["autoencoder", "diffusion"])
def test_a_finished_run_resumed_changes_nothing(prepared, overrides, uninterrupted, tmp_path, model):
    shutil.copytree(uninterrupted(model), tmp_path / "run")
    run_training(prepared, tmp_path / "run", *overrides[model], "resume=auto")
    assert_same_end(tmp_path / "run", uninterrupted(model))


def test_a_finished_run_goes_on_with_more_steps_as_if_it_had_not_stopped(
    prepared, overrides, uninterrupted, tmp_path
):
    options = overrides["autoencoder"]
    run_training(prepared, tmp_path / "run", *options, "trainer.max_steps=3")
    last = run_training(prepared, tmp_path / "run", *options, "resume=auto")
    ends = [
        load(path)["state_dict"] for path in (last, uninterrupted("autoencoder") / "checkpoints/last.ckpt")
    ]
    assert first_difference(*ends) is None


@pytest.mark.parametrize(
    ("signum", "expected"), [(signal.SIGUSR1, 85), (signal.SIGTERM, 143), (signal.SIGINT, 130)]
)
def test_a_signal_saves_at_the_step_boundary_and_the_resumed_run_ends_bit_equal(
    prepared, overrides, uninterrupted, tmp_path, signum, expected
):
    options, run_dir = overrides["autoencoder"], tmp_path / "run"
    act = partial(kill_self, signum=signum)
    streams = {"stderr": tmp_path / "stderr"}
    assert train_in_child(prepared, run_dir, *options, at_batch=2, act=act, **streams) == expected
    assert load(run_dir / "checkpoints/last.ckpt")["global_step"] == 3  # the step was finished
    line = (tmp_path / "stderr").read_text().splitlines()[-1]
    assert line.endswith(f"continue with run_dir={run_dir} resume=auto")
    run_training(prepared, run_dir, *options, "resume=auto")
    assert_same_end(run_dir, uninterrupted("autoencoder"))


def test_a_signal_in_the_last_batch_of_an_epoch_waits_for_its_validation(
    prepared, overrides, uninterrupted, tmp_path
):
    options, run_dir = overrides["autoencoder"], tmp_path / "run"
    act = partial(kill_self, signum=signal.SIGUSR1)
    assert train_in_child(prepared, run_dir, *options, at_batch=4, act=act) == 85
    for name in ("last.ckpt", "best.ckpt"):
        assert load(run_dir / "checkpoints" / name)["global_step"] == 5
    run_training(prepared, run_dir, *options, "resume=auto")
    assert_same_end(run_dir, uninterrupted("autoencoder"))


def test_a_signal_between_accumulated_batches_waits_for_the_update(
    prepared, overrides, uninterrupted, tmp_path
):
    options, run_dir = overrides["autoencoder_accumulated"], tmp_path / "run"
    act = partial(kill_self, signum=signal.SIGUSR1)
    assert train_in_child(prepared, run_dir, *options, at_batch=4, act=act) == 85
    assert load(run_dir / "checkpoints/last.ckpt")["global_step"] == 3
    run_training(prepared, run_dir, *options, "resume=auto")
    assert_same_end(run_dir, uninterrupted("autoencoder_accumulated"))


def break_codebook(module):
    module.autoencoder.quantizer.codebook.fill_(float("nan"))


def break_weights(module):
    next(module.autoencoder.parameters()).data.fill_(float("nan"))


def test_weights_that_are_not_finite_are_never_saved(prepared, overrides, tmp_path):
    streams = {"stderr": tmp_path / "stderr"}
    options, run_dir = overrides["autoencoder"], tmp_path / "run"
    assert train_in_child(prepared, run_dir, *options, at_batch=3, act=break_weights, **streams) == 2
    assert "not finite" in (tmp_path / "stderr").read_text().splitlines()[-1]
    kept = load(run_dir / "checkpoints/last.ckpt")
    assert kept["global_step"] == 2
    assert all(v.isfinite().all() for v in kept["state_dict"].values() if v.is_floating_point())


def test_a_codebook_that_is_not_finite_costs_an_update_and_is_made_anew(prepared, overrides, tmp_path):
    """The update is left out, and the moving averages, which are finite, give the codebook again."""
    options, run_dir = overrides["autoencoder"], tmp_path / "run"
    assert train_in_child(prepared, run_dir, *options, at_batch=3, act=break_codebook) == 0
    assert "had gradients that are not finite and were left out" in (run_dir / "log").read_text()
    kept = load(run_dir / "checkpoints/last.ckpt")
    assert kept["global_step"] == 8
    assert all(v.isfinite().all() for v in kept["state_dict"].values() if v.is_floating_point())


def test_a_second_ctrl_c_ends_at_once():
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        stop = StopOnSignal(checkpoints=None)
        signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
