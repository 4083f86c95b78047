"""A translator that is killed and resumed ends bit-equal; its latents are those of its autoencoder."""

import signal

import pytest

from medldm.build import load_first_stage, load_module
from medldm.checkpoints import latents_name
from medldm.commands import encode
from medldm.fingerprints import file_sha256
from tests.helpers import compose_config
from tests.training import first_difference, kill_self, load, read_metrics, run_training, train_in_child

LONGER = ("trainer.limit_train_batches=1.0", "trainer.max_steps=4", "callbacks.checkpoints.every_n_steps=2")
MSSPADE = ("experiment=aldm/brats_msspade", "model.adversarial.start=0", *LONGER)
JOINT = ("experiment=aldm/brats_joint", "model.adversarial.start=0", *LONGER)


@pytest.fixture(scope="module")
def cached(prepared_modalities, vqgan_modalities):
    options = (f"checkpoint={vqgan_modalities}", f"data.root={prepared_modalities}", "data=brats")
    encode.task(compose_config("encode", *options, "data.num_workers=0"))
    return "data.latents=auto"


@pytest.mark.parametrize("name", ["latent", "image"])
def test_a_translator_killed_and_resumed_ends_bit_equal(
    prepared_modalities, vqgan_modalities, translator, cached, tmp_path, name
):
    options = {
        "latent": (*MSSPADE, f"model.first_stage.checkpoint={vqgan_modalities}", cached),
        "image": (*JOINT, f"model.first_stage.checkpoint={translator}"),
    }[name]
    run_training(prepared_modalities, tmp_path / "whole", *options)
    status = train_in_child(prepared_modalities, tmp_path / "cut", *options, at_batch=3, act=kill_self)
    assert status == -signal.SIGKILL
    assert load(tmp_path / "cut/checkpoints/last.ckpt")["global_step"] == 2
    run_training(prepared_modalities, tmp_path / "cut", *options, "resume=auto")
    ends = [load(tmp_path / run / "checkpoints/last.ckpt") for run in ("whole", "cut")]
    for end in ends:
        end.pop("loops")
    assert first_difference(*ends) is None
    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "cut")


def test_a_translator_shares_the_latents_of_the_autoencoder_that_it_left_alone(vqgan_modalities, translator):
    assert latents_name(translator) == latents_name(vqgan_modalities) == file_sha256(vqgan_modalities)[:12]


def test_a_translators_stage_is_the_one_that_it_was_trained_on(translator, vqgan_modalities):
    stage, description = load_first_stage(translator)
    module = load_module(translator)
    assert description["sha256"] == file_sha256(translator)
    assert description["first_stage"]["sha256"] == file_sha256(vqgan_modalities)
    assert bool(stage.is_fitted) and not first_difference(stage.scale, module.first_stage.scale)
    autoencoder = load(vqgan_modalities)["state_dict"]
    for name, value in stage.autoencoder.state_dict().items():
        assert first_difference(value, autoencoder[f"autoencoder.{name}"]) is None
