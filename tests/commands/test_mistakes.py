"""A mistake ends in one line on stderr that names the file or key and the mend, status 2, and no folder."""

import os
import subprocess
import sys

import pytest

from medldm.commands import encode, mistakes_in_one_line, prepare, sample, train
from medldm.files import nothing_empty
from tests.helpers import compose_config
from tests.training import LDM, VQVAE, run_training, train_config

TINY = (VQVAE, "debug=tiny")


def told(capfd, name, make_cfg, task) -> str:
    """The only line on stderr of a command that must fail."""
    with pytest.raises(SystemExit) as stop, mistakes_in_one_line(name):
        task(make_cfg())
    lines = capfd.readouterr().err.splitlines()
    assert stop.value.code == 2
    assert len(lines) == 1 and lines[0].startswith(f"medldm {name}: "), lines
    return lines[0]


@pytest.fixture
def told_by_train(capfd, prepared, tmp_path):
    """train(overrides) -> the line, having checked that no run folder came of it."""

    def run(*overrides: str, run_dir=tmp_path / "run") -> str:
        line = told(capfd, "train", lambda: train_config(prepared, run_dir, *overrides), train.task)
        assert not (tmp_path / "run").exists()
        return line

    return run


@pytest.fixture
def told_by_sample(capfd, prepared, diffusion, tmp_path):
    def run(*overrides: str, checkpoint=diffusion, output=tmp_path / "out") -> str:
        options = (
            f"checkpoint={checkpoint}",
            f"data.root={prepared}",
            f"output={output}",
            "max_slices=1",
            *overrides,
        )
        return told(capfd, "sample", lambda: compose_config("sample", *options), sample.task)

    return run


def test_a_misspelt_override(told_by_train):
    assert "max_stepz" in told_by_train(VQVAE, "trainer.max_stepz=3")


def test_a_value_of_the_wrong_place(told_by_train):
    assert "cardiac2d/vqgan" in told_by_train("experiment=cardiac2d/vqgan")


def test_an_option_that_the_data_module_lacks(told_by_train):
    assert "num_wrokers" in told_by_train(VQVAE, "+data.num_wrokers=3")


def test_data_root_not_given(capfd, tmp_path):
    line = told(
        capfd, "train", lambda: compose_config("train", *TINY, f"run_dir={tmp_path / 'run'}"), train.task
    )
    assert "data.root" in line and not (tmp_path / "run").exists()


def test_data_root_that_is_not_prepared(capfd, tmp_path):
    line = told(capfd, "train", lambda: train_config(tmp_path, tmp_path / "run", VQVAE), train.task)
    assert str(tmp_path) in line and "medldm prepare" in line and not (tmp_path / "run").exists()


def test_a_first_stage_that_is_not_given(told_by_train):
    assert "model.first_stage.checkpoint: not given" in told_by_train(LDM)


def test_a_first_stage_that_is_a_second(told_by_train, diffusion):
    line = told_by_train(LDM, f"model.first_stage.checkpoint={diffusion}")
    assert str(diffusion) in line and "takes an autoencoder" in line


def test_a_first_stage_that_is_not_there(told_by_train, tmp_path):
    line = told_by_train(LDM, f"model.first_stage.checkpoint={tmp_path / 'no.ckpt'}")
    assert f"{tmp_path / 'no.ckpt'}: no such checkpoint" in line


def test_a_run_folder_that_holds_a_run(told_by_train, first_stage):
    run_dir = first_stage.parents[1]
    before = {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}
    line = told_by_train(VQVAE, run_dir=run_dir)
    assert f"run_dir={run_dir}" in line and "resume=auto" in line
    assert before == {path: path.stat().st_mtime_ns for path in run_dir.rglob("*")}


def test_a_resume_path_that_is_not_there(told_by_train, tmp_path):
    line = told_by_train(VQVAE, f"resume={tmp_path / 'no.ckpt'}")
    assert f"resume={tmp_path / 'no.ckpt'}" in line and "resume=auto" in line


def test_a_resume_of_another_stage(told_by_train, diffusion):
    assert "holds a diffusion model" in told_by_train(VQVAE, f"resume={diffusion}")


def test_a_resume_with_another_network(told_by_train, first_stage):
    line = told_by_train(VQVAE, f"resume={first_stage}", "model.autoencoder.latent_channels=3")
    assert str(first_stage) in line and "model.autoencoder differs" in line


def test_lpips_weights_that_are_not_there(told_by_train, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    line = told_by_train(VQVAE, "tiny=false", f"paths.weights={tmp_path}")
    assert "vgg16-397923af.pth" in line and str(tmp_path) in line


@pytest.mark.parametrize(
    "override",
    [
        "trainer.precision=16-true",
        "trainer.precision=float8",
        "trainer.accelerator=gpu",
        "trainer.accelerator=tpu",
        "trainer.devices=0",
        "trainer.accumulate_grad_batches=0",
        "trainer.gradient_clip_val=-1",
        "channels_last=fast",
        "data.batch_size=0",
        "data.batch_size=2.5",
        "data.num_workers=-1",
        "model.warmup_steps=-1",
    ],
)
def test_a_number_or_a_device_that_there_is_not(told_by_train, override):
    assert override in told_by_train(VQVAE, override)


def test_images_that_do_not_divide_by_the_model_s_factors(capfd, phantom_raw, first_stage, tmp_path):
    root = tmp_path / "data"
    paths = (f"data.raw={phantom_raw}", f"data.root={root}", "data.image_size=100", "data.num_workers=0")
    prepare.task(compose_config("prepare", *paths))
    capfd.readouterr()

    def line_of(*overrides: str) -> str:
        line = told(capfd, "train", lambda: train_config(root, tmp_path / "run", *overrides), train.task)
        assert not (tmp_path / "run").exists()
        return line

    line = line_of(VQVAE)
    assert "[100, 100] do not divide by [8, 8]" in line
    assert "data.image_size=[104,104], or train with data.crop_size=[96,96]" in line
    stage = f"model.first_stage.checkpoint={first_stage}"
    assert "[100, 100] do not divide by [64, 64]" in line_of(LDM, stage)
    assert "data.crop_size=[64,64]" in line_of(LDM, stage, "data.crop_size=72")
    last = run_training(root, tmp_path / "cropped", VQVAE, "data.crop_size=[96,96]")
    assert last.is_file()


def test_images_that_are_too_small_for_a_discriminator(told_by_train):
    strides = "model.discriminators.image.strides=[2,2,2,2,2,2]"
    channels = "model.discriminators.image.channels=[4,4,4,4,4,4]"
    line = told_by_train(VQVAE, strides, channels)
    assert "[64, 64] are too small" in line and "[128, 128] at least" in line
    assert "data.image_size=[128,128]" in line and "model.discriminators.NAME.strides" in line


@pytest.mark.parametrize("override", ["device=cuda:9", "device=tpu", "precision=16-mixed"])
def test_sampling_on_a_device_that_there_is_not(told_by_sample, override, tmp_path):
    assert override in told_by_sample(override)
    assert not (tmp_path / "out").exists()


def test_a_monitor_that_is_not_logged(told_by_train):
    line = told_by_train(VQVAE, "callbacks.checkpoints.monitor=val/fid")
    assert "callbacks.checkpoints.monitor=val/fid" in line and "val/psnr" in line


def test_a_truncated_checkpoint(told_by_sample, diffusion, tmp_path):
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(diffusion.read_bytes()[:5000])
    assert str(cut) in told_by_sample(checkpoint=cut)
    assert not (tmp_path / "out").exists()


def test_a_sampler_option_that_does_not_exist(told_by_sample, tmp_path):
    assert "sampler.eta" in told_by_sample("sampler.kind=ancestral", "sampler.eta=0.5")
    assert "num_stepz" in told_by_sample("sampler.num_stepz=5")
    assert "sampler.kind=rk4" in told_by_sample("sampler.kind=rk4")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (("sampler.guidance_scale=2", "drop=[edges,mask,attributes]"), "sampler.guidance_scale=2"),
        (("sampler.guidance_rescale=0.5",), "sampler.guidance_rescale=0.5"),
        (("windows.overlap=0.25",), "windows.overlap"),
        (("windows.keep=1",), "windows.keep"),
        (("video_format=mp4",), "video_format=mp4"),
        (("video_format=webm", "trajectory=2"), "video_format=webm"),
        (("interpolate.time=0.7",), "interpolate.time"),
        (("interpolate.count=3", "num_samples=2"), "num_samples"),
        (("interpolate.count=3",), "max_slices"),
    ],
)
def test_a_setting_that_sampling_would_not_use(told_by_sample, tmp_path, overrides, key):
    assert key in told_by_sample(*overrides)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("override", ["num_samples=2", "drop=[edges]", "sampler.num_steps=3"])
def test_a_setting_of_samples_where_images_are_reconstructed(told_by_sample, first_stage, override):
    assert override.split("=")[0] in told_by_sample(override, checkpoint=first_stage)


def test_guidance_of_a_model_without_a_null_is_told_before_training(told_by_train, first_stage):
    stage = f"model.first_stage.checkpoint={first_stage}"
    line = told_by_train(LDM, stage, "model/conditioner=none", "model.sampler.guidance_scale=2")
    assert "sampler.guidance_scale=2" in line and "no condition" in line
    assert told_by_train(VQVAE, "model.perceptual=null", "model.perceptual_weight=1").count("perceptual") > 1


def test_a_split_that_does_not_exist(told_by_sample, tmp_path):
    assert "split" in told_by_sample("split=tset")
    assert not (tmp_path / "out").exists()


def test_a_condition_that_cannot_be_dropped(told_by_sample, tmp_path):
    assert "drop" in told_by_sample("drop=[edgse]")
    assert not (tmp_path / "out").exists()


def test_an_output_folder_of_other_settings(told_by_sample, prepared, diffusion, tmp_path):
    out = tmp_path / "out"
    options = (
        f"checkpoint={diffusion}",
        f"data.root={prepared}",
        f"output={out}",
        "max_slices=1",
        "png=false",
    )
    sample.task(compose_config("sample", *options))
    before = {path: path.read_bytes() for path in out.iterdir()}
    line = told_by_sample("seed=1")
    assert f"output={out}" in line and "seed" in line
    assert before == {path: path.read_bytes() for path in out.iterdir()}


def test_latents_of_a_model_that_has_none(capfd, prepared, diffusion):
    options = (f"checkpoint={diffusion}", f"data.root={prepared}")
    line = told(capfd, "encode", lambda: compose_config("encode", *options), encode.task)
    assert str(diffusion) in line and "takes an autoencoder of images" in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["trian"], ["trian", "train"]),
        (["train", VQVAE, "data.rot=x"], ["rot"]),
        (["train", VQVAE, "run_dir=run"], ["data.root"]),
        (["sample", "checkpoint=no.ckpt", "output=out", "data.root=x"], ["no.ckpt"]),
    ],
)
def test_mistakes_on_the_command_line(arguments, words, tmp_path):
    command = [sys.executable, "-m", "medldm", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    lines = finished.stderr.splitlines()
    assert finished.returncode == 2 and len(lines) == 1, finished.stderr
    assert all(word in lines[0] for word in words)
    assert not list(tmp_path.iterdir())


def test_a_failure_before_anything_was_written_leaves_no_empty_folder(told_by_sample, tmp_path):
    output = tmp_path / "deep" / "out"
    assert "interpolate.count=1" in told_by_sample("interpolate.count=1", "max_slices=null", output=output)
    assert not (tmp_path / "deep").exists()


def test_what_stood_in_a_folder_before_a_failure_stays(tmp_path):
    begun, empty = tmp_path / "begun", tmp_path / "empty"
    for folder in (begun, empty):
        folder.mkdir()
        with pytest.raises(KeyError), nothing_empty(folder):
            (folder / "provenance.json").write_text("{}")
            if folder == begun:
                (folder / "a.h5").write_text("")
            raise KeyError
    assert sorted(path.name for path in begun.iterdir()) == ["a.h5", "provenance.json"]
    assert list(empty.iterdir()) == []
