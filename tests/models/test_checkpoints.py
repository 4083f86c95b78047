"""Checkpoints describe themselves, load strictly and are written whole or not at all."""

import os
import shutil
import signal

import pytest
import torch

from medldm.build import load_first_stage, load_module
from medldm.checkpoints import AtomicCheckpointIO, read_checkpoint
from medldm.commands import sample
from medldm.errors import InputError
from medldm.fingerprints import file_sha256
from tests.helpers import compose_config
from tests.training import in_child, load


def save(content, path):
    torch.save(content, path)
    return path


def test_a_moved_diffusion_checkpoint_samples_without_its_first_stage(
    prepared, diffusion, first_stage, tmp_path
):
    away = first_stage.with_name("away.ckpt")
    moved = tmp_path / "elsewhere" / "model.ckpt"
    moved.parent.mkdir()
    shutil.copy(diffusion, moved)
    first_stage.rename(away)
    try:
        overrides = [f"checkpoint={moved}", f"output={tmp_path / 'out'}", f"data.root={prepared}"]
        sample.task(compose_config("sample", *overrides, "max_slices=1", "png=false"))
    finally:
        away.rename(first_stage)
    assert (tmp_path / "out" / "004.h5").is_file()


@pytest.mark.parametrize("fixture", ["first_stage", "diffusion"])
def test_checkpoints_load_under_weights_only(fixture, request):
    path = request.getfixturevalue(fixture)
    assert torch.load(path, weights_only=True)["medldm"]["format"] == 1


def test_a_second_stage_holds_its_first_stage_once_and_no_training_networks(diffusion, first_stage):
    content, first = load(diffusion), load(first_stage)["state_dict"]
    keys = list(content["state_dict"])
    assert not [key for key in keys if "discriminator" in key or "perceptual" in key or "lpips" in key]
    held = {
        key.removeprefix("first_stage."): key for key in keys if key.startswith("first_stage.autoencoder.")
    }
    assert held.keys() == {key for key in first if key.startswith("autoencoder.")}
    assert all(torch.equal(content["state_dict"][held[key]], first[key]) for key in held)
    assert not [key for key in content["ema"] if "first_stage" in key]


def test_loading_is_strict(diffusion, tmp_path):
    content = load(diffusion)
    content["state_dict"].popitem()
    with pytest.raises(InputError, match="is missing"):
        load_module(save(content, tmp_path / "short.ckpt"))


def test_averaged_weights_by_default_and_raw_ones_on_request(diffusion):
    content = load(diffusion)
    averaged, raw = load_module(diffusion), load_module(diffusion, weights="raw")
    for name, value in averaged.network.named_parameters():
        assert torch.equal(value, content["ema"][f"module.network.{name}"])
    for name, value in raw.network.named_parameters():
        assert torch.equal(value, content["state_dict"][f"network.{name}"])
    pairs = zip(averaged.network.parameters(), raw.network.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert not averaged.training
    with pytest.raises(InputError, match="weights=best"):
        load_module(diffusion, weights="best")


def test_the_wrong_stage_is_named(diffusion):
    with pytest.raises(InputError, match=f"{diffusion}: holds a diffusion model; .* takes an autoencoder"):
        load_first_stage(diffusion)


def test_a_truncated_file_is_named(first_stage, tmp_path):
    path = tmp_path / "cut.ckpt"
    path.write_bytes(first_stage.read_bytes()[:-1000])
    with pytest.raises(InputError, match=f"{path}: not a readable checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize(
    "content", [{"state_dict": {}}, [1, 2], torch.zeros(3)], ids=["dict", "list", "tensor"]
)
def test_a_foreign_file_is_named(content, tmp_path):
    path = save(content, tmp_path / "foreign.ckpt")
    with pytest.raises(InputError, match=f"{path}: not a medldm checkpoint"):
        read_checkpoint(path)


def test_a_file_that_is_no_archive_is_named(tmp_path):
    path = tmp_path / "notes.ckpt"
    path.write_text("hello")
    with pytest.raises(InputError, match=f"{path}: not a readable checkpoint"):
        read_checkpoint(path)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    path = save({"medldm": os.system}, tmp_path / "code.ckpt")
    with pytest.raises(InputError, match=f"{path}: not a readable checkpoint"):
        read_checkpoint(path)


def test_a_newer_format_is_named(first_stage, tmp_path):
    content = load(first_stage)
    content["medldm"]["format"] = 2
    with pytest.raises(InputError, match="newer medldm"):
        load_module(save(content, tmp_path / "new.ckpt"))


def test_a_kill_during_a_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"value": 1}, path)

    def save_and_die():
        def die(content, file):
            with open(file, "wb") as out:
                out.write(b"half a checkpoint")
            os.kill(os.getpid(), signal.SIGKILL)

        monkeypatch.setattr(torch, "save", die)
        AtomicCheckpointIO().save_checkpoint({"value": 2}, path)

    assert in_child(save_and_die) == -signal.SIGKILL
    assert load(path) == {"value": 1}
    assert list(tmp_path.glob("*.ckpt")) == [path]  # the half-written one has another ending
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    AtomicCheckpointIO().save_checkpoint({"value": 3}, path)
    assert load(path) == {"value": 3}


def test_an_error_during_a_save_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"value": 1}, path)
    with pytest.raises(Exception, match="lambda"):
        AtomicCheckpointIO().save_checkpoint({"value": lambda: 2}, path)
    assert load(path) == {"value": 1} and list(tmp_path.iterdir()) == [path]


def test_weights_and_hash_are_of_one_file_though_training_goes_on(first_stage, tmp_path, monkeypatch):
    path = shutil.copy(first_stage, tmp_path / "last.ckpt")
    before, load_content = file_sha256(path), torch.load

    def load_while_another_is_saved(*arguments, **options):
        AtomicCheckpointIO().save_checkpoint({"medldm": {}}, path)
        return load_content(*arguments, **options)

    monkeypatch.setattr(torch, "load", load_while_another_is_saved)
    assert load_module(path).checkpoint_sha256 == before != file_sha256(path)
    shutil.copy(first_stage, path)
    assert load_first_stage(path)[1]["sha256"] == before
