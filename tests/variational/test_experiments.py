"""Every experiment trains two steps, its checkpoint samples, and a resume goes on."""

import json

import pytest

from medldm.build import load_module
from medldm.checkpoints import read_checkpoint
from medldm.commands import sample
from medldm.data.phantoms.chest import write_chestxray
from tests.helpers import CONFIG_DIR, compose_config
from tests.training import run_training
from tests.variational.test_data import prepared

EXPERIMENTS = sorted(path.stem for path in (CONFIG_DIR / "experiment" / "medvdm").glob("*.yaml"))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chest")
    prepared("chestxray", write_chestxray(folder / "raw", num_subjects=10, image_size=40), folder / "data")
    return folder / "data"


def run(experiment, root, run_dir, *overrides, monkeypatch):
    monkeypatch.delenv("MEDLDM_RUN_DIR", raising=False)
    return run_training(root, run_dir, f"experiment=medvdm/{experiment}", *overrides)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_two_steps_a_checkpoint_and_pictures(experiment, root, tmp_path, monkeypatch):
    run(experiment, root, tmp_path / "run", monkeypatch=monkeypatch)
    content = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert content["global_step"] == 2 and ("ema" in content) == (experiment != "colab")
    assert load_module(tmp_path / "run" / "checkpoints" / "best.ckpt").facts["image_channels"] in (1, 2)
    pictures = {path.name.split("_")[0] for path in (tmp_path / "run" / "samples").iterdir()}
    assert pictures == ({"schedule", "points"} if experiment == "toy2d" else {"schedule", "noising", "step"})
    header = (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]
    assert {"train/bpd_recon", "val/bpd_diffusion", "val/entropy_floor", "val/gamma_0"} <= set(
        header.split(",")
    )


@pytest.mark.parametrize("experiment", ["chestxray", "chestxray_conv"])
def test_sample_writes_images_and_a_resume_goes_on(experiment, root, tmp_path, monkeypatch):
    run(experiment, root, tmp_path / "run", monkeypatch=monkeypatch)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    options = (
        f"checkpoint={checkpoint}",
        "data=chestxray",
        f"data.root={root}",
        f"output={tmp_path / 'out'}",
    )
    guided = ("sampler.guidance_scale=2",) if experiment == "chestxray_conv" else ()
    sample.task(compose_config("sample", *options, "split=test", "sampler.num_steps=2", *guided))
    assert len(list((tmp_path / "out" / "png").iterdir())) == 1
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["sampler"]["num_steps"] == 2
    run(experiment, root, tmp_path / "run", "resume=auto", "trainer.max_steps=4", monkeypatch=monkeypatch)
    assert read_checkpoint(checkpoint)["global_step"] == 4
