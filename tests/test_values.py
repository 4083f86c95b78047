"""Values that cannot be meant end in one line before anything is done, whatever command they are given to."""

import logging
import re
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from medldm.commands import CONFIG_DIR, evaluate, prepare, sample, train
from medldm.errors import InputError
from medldm.values import check_values
from tests.helpers import compose_config

LDM = "experiment=cardiac2d/ldm"
WRONG = [
    ("model.optimizer.lr", float("nan"), "model.optimizer.lr=nan: give a finite number"),
    ("sampler.guidance_scale", float("nan"), "sampler.guidance_scale=nan: give a finite number"),
    ("trainer.gradient_clip_val", float("inf"), "trainer.gradient_clip_val=inf: give a finite number"),
    ("data.flip_prob", 2, "data.flip_prob=2: give a number from 0 to 1"),
    ("model.conditioner.drop_all_prob", -0.1, "drop_all_prob=-0.1: give a number from 0 to 1"),
    ("data.splits.val", 2, "data.splits.val=2: give a number from 0 to 1"),
    ("data.num_workers", -1, "data.num_workers=-1: give a whole number from 0 to 1024"),
    ("data.batch_size", 1.5, "data.batch_size=1.5: give a whole number from 1"),
    ("data.batch_size", "many", "data.batch_size=many: give a whole number from 1"),
    ("data.batch_size", True, "data.batch_size=True: give a whole number from 1"),
    ("data.preprocess.spacing", -1, "data.preprocess.spacing=-1: give a number from 0.0001"),
    ("model.autoencoder.channels", [16, -4], "model.autoencoder.channels=-4: give a whole number from 1"),
    ("sampler.num_steps", 0, "sampler.num_steps=0: give a whole number from 1"),
    ("sampler.num_steps", 10**9, "sampler.num_steps=1000000000: give a whole number from 1 to 100000"),
    ("num_samples", 10**9, "num_samples=1000000000: give a whole number from 1 to 100000"),
    ("interpolate.count", 10**9, "count=1000000000: give a whole number from 0 to 100000"),
    ("seed", -1, "seed=-1: give a whole number from 0"),
    ("sampler.num_steps", [5], "sampler.num_steps=[5]: give one value"),
    ("windows", True, "windows=True: has keys of its own; give those, as windows.KEY=VALUE"),
    ("generated", ["a", "b"], "generated=['a', 'b']: give one path"),
    ("data.latents", 3, "data.latents=3: give one text"),
    ("data.select.split", True, "data.select.split=True: give one text"),
    ("utility", 0.5, "utility=0.5: give one path"),
    ("evaluation", [-1], "evaluation=[-1]: give one path or a list of paths"),
    ("windows.size", 64, "windows.size=64: give a list, as windows.size=[A,B]"),
    ("metrics.image", 1e20, "metrics.image=1e+20: give a list"),
    ("drop", 0.5, "drop=0.5: give a list, as drop=[A,B]"),
    ("compile", "perhaps", "compile=perhaps: give true, false or auto"),
]
AT_ONCE = [  # words of a command line, also such as would take a day or all memory
    (train, (LDM, "model.network.num_res_blocks=1000000"), "num_res_blocks=1000000: give a whole number"),
    (prepare, ("data.preprocess.edges.clahe_tiles=0",), "clahe_tiles=0: give a whole number from 1 to 64"),
    (prepare, ("data.preprocess.edges.blur=1e6",), "edges.blur=1000000.0: give a number from 0 to 256"),
    (prepare, ("data.preprocess.labels.names=1e20",), "labels.names=1e+20: give a whole number from 1"),
    (train, (LDM, "model.cosine_steps=???"), "model.cosine_steps=???: stands for what is not given"),
    (sample, ("png=maybe",), "png=maybe: give true or false"),
    (evaluate, ("metrics.bootstrap.num_resamples=-5",), "num_resamples=-5: give a whole number from 1"),
]


@pytest.mark.parametrize(("key", "value", "line"), WRONG)
def test_a_value_that_cannot_be_meant_is_named(key, value, line):
    config = value
    for name in reversed(key.split(".")):
        config = {name: config}
    with pytest.raises(InputError, match=re.escape(line)):
        check_values(config)


@pytest.fixture(autouse=True)
def logging_as_before():
    """Hydra leaves a handler that writes to this test's own stdout."""
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers


@pytest.mark.parametrize(("command", "words", "line"), AT_ONCE, ids=[line for *_, line in AT_ONCE])
def test_it_is_told_in_one_line_and_nothing_is_written(command, words, line, tmp_path, monkeypatch, capsys):
    (tmp_path / "raw").mkdir()
    paths = {
        train: (f"data.root={tmp_path / 'data'}", f"run_dir={tmp_path / 'run'}"),
        prepare: (f"data.raw={tmp_path / 'raw'}", f"data.root={tmp_path / 'data'}"),
        sample: (f"checkpoint={tmp_path / 'a.ckpt'}", f"data.root={tmp_path}", f"output={tmp_path / 'out'}"),
        evaluate: (f"generated={tmp_path}", f"reference={tmp_path}", f"output={tmp_path / 'out'}"),
    }[command]
    monkeypatch.setattr(sys, "argv", [command.__name__, *paths, *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and line in told and told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.parametrize("folder", ["cardiac2d", "medlsdm", "aldm", "medvdm"])
def test_the_values_of_every_experiment_pass(folder):
    for path in sorted((Path(CONFIG_DIR) / "experiment" / folder).glob("*.yaml"))[:3]:
        check_values(OmegaConf.to_container(compose_config("train", f"experiment={folder}/{path.stem}")))


def test_parts_that_are_not_medldms_know_their_own_keys():
    check_values({"model": {"network": {"_target_": "mylab.Net", "clip": "hard", "num_heads": 10**9}}})
    with pytest.raises(InputError, match=r"model\.network\.clip=hard: give true or false"):
        check_values({"model": {"network": {"_target_": "medldm.Net", "clip": "hard"}}})


def test_what_is_open_or_follows_from_another_key_passes():
    check_values({"seed": "${other}", "lr": "???", "batch_size": None, "spacing": "trailing"})


def test_a_segmenter_is_a_path_for_an_evaluation_and_a_part_of_a_second_stage():
    check_values({"segmenter": "seg.ckpt", "model": {"segmenter": {"checkpoint": "seg.ckpt"}}})
    with pytest.raises(InputError, match="segmenter={'checkpoint': 'seg.ckpt'}: give one path"):
        check_values({"segmenter": {"checkpoint": "seg.ckpt"}})
