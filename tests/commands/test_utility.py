"""Is it useful: segmenters trained on real and on synthetic images, tested on real ones, and kept."""

import json
import shutil

import numpy as np
import pytest
import yaml

from medldm.commands import utility
from medldm.errors import InputError
from medldm.evaluation.utility import HeldOutScores, TrainedOn, summarise_trials, utility_lines
from medldm.metrics.summary import Bootstrap
from tests.helpers import CONFIG_DIR, compose_config

TRAINING = "training=['debug=tiny','data.spatial_dims=2','trainer.enable_progress_bar=false']"


@pytest.fixture
def synthetic(prepared, tmp_path):
    """The training cases themselves as if a model had made them."""
    import h5py

    folder = tmp_path / "synthetic"
    folder.mkdir()
    split = json.loads((prepared / "splits.json").read_text())["default"]
    for case in json.loads((prepared / "index.json").read_text())["cases"]:
        if case["subject"] in split["train"]:
            shutil.copy(prepared / case["file"], folder)
            with h5py.File(folder / f"{case['id']}.h5", "a") as file:
                file["row"] = np.arange(len(file["images"]))
    provenance = {"checkpoint_sha256": "0", "training_subjects": split["train"]}
    (folder / "provenance.json").write_text(json.dumps(provenance))
    return folder


def test_a_learning_curve_is_one_command_that_goes_on(prepared, synthetic, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("MEDLDM_RUN_DIR", raising=False)
    options = (f"reference={prepared}", f"generated={synthetic}", f"output={tmp_path / 'out'}", TRAINING)
    options += ("train_on=[real,synthetic]", "bootstrap.num_resamples=20")
    utility.task(compose_config("utility", *options, "fractions=[0.5]", "seeds=[0]"))
    first = json.loads((tmp_path / "out" / "utility.json").read_text())
    names = [(point["train_on"], point["fraction"], point["num_seeds"]) for point in first["points"]]
    assert names == [("real", 0.5, 1), ("synthetic", 0.5, 1)] and first["n"]["subjects"] == 1
    # The synthetic images are the real ones here: the same seed trains the same segmenter.
    assert first["points"][1]["minus_real"]["mean"] == 0
    assert 0 < first["points"][0]["scores"]["dice_mean"]["mean"] < 1
    trained = []
    monkeypatch.setattr(utility, "run_here", lambda command, overrides: trained.append(overrides))
    with pytest.raises(InputError, match="best.ckpt"):
        utility.task(compose_config("utility", *options, "fractions=[0.5]", "seeds=[0,1]"))
    assert [f"run_dir={tmp_path / 'out'}/runs/real_0.5_1" in overrides for overrides in trained] == [True]
    assert "minus real" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("generated=null",), "generated: not given, and train_on=synthetic needs it"),
        (("fractions=[0]",), "shares of the subjects lie in"),
        (("seeds=[1,1]",), "each once"),
        (("train_on=[fake]",), "no choice 'fake'; choose from real, synthetic, both"),
    ],
)
def test_what_cannot_be_trained_is_told_before_anything_is(options, said, tmp_path):
    given = ("reference=r", "generated=g", f"output={tmp_path / 'out'}", *options)
    with pytest.raises(InputError, match=said):
        utility.task(compose_config("utility", *given))
    assert not (tmp_path / "out").exists()


def test_the_experiment_of_every_training_can_be_chosen(tmp_path):
    """And no key of a command has the name of a group, which Hydra would take it for on a command line."""
    given = ("reference=r", f"output={tmp_path}", "segmenter_experiment=cardiac2d/segmentation")
    first = next(utility.trainings_of(compose_config("utility", *given)))
    assert first.overrides[0] == "experiment=cardiac2d/segmentation"
    for path in CONFIG_DIR.glob("*.yaml"):
        values = {k: v for k, v in yaml.safe_load(path.read_text()).items() if not isinstance(v, dict)}
        assert not [key for key in values if key != "defaults" and (CONFIG_DIR / key).is_dir()], path


def test_a_mistake_in_a_training_names_the_training(prepared, tmp_path):
    given = (f"reference={prepared}", f"output={tmp_path / 'out'}", "train_on=[real]", "fractions=[1]")
    said = r"real_1_0, with the overrides of training=\[...\]: data.spatial_dims=3: .* in 2D; set it to 2"
    with pytest.raises(InputError, match=said):
        utility.task(compose_config("utility", *given, "training=['debug=tiny']"))


def test_points_are_means_over_seeds_and_differences_are_paired():
    subjects = ["a", "a", "b"]

    def tested(train_on, seed, *scores):
        return HeldOutScores(
            TrainedOn(train_on, 1.0, seed), ["a1", "a2", "b1"], subjects, {"dice_mean": np.array(scores)}
        )

    tests = [tested("real", 0, 0.5, 0.5, 0.8), tested("real", 1, 0.7, 0.7, np.nan)]
    tests += [tested("both", 0, 0.6, 0.6, 0.9), tested("both", 1, 0.8, 0.8, 0.9)]
    results = summarise_trials(tests, Bootstrap(num_resamples=200))
    real, both = results["points"]
    assert real["scores"]["dice_mean"]["mean"] == pytest.approx((1.0 + 0.8 + 1.4) / 5)
    assert real["scores"]["dice_mean"]["std_over_seeds"] == pytest.approx(np.std([0.6, 0.7], ddof=1))
    assert real["minus_real"] is None and both["minus_real"]["mean"] == pytest.approx(0.1)
    assert both["minus_real"]["n"] == 5 and both["minus_real"]["num_subjects"] == 2
    (lines,) = utility_lines(results)
    assert [row[:3] for row in lines.rows] == [["real", "1", "2"], ["both", "1", "2"]]
    assert "2 test subjects are rough" in results["warnings"][0]
    tests[0] = tests[0]._replace(ids=["other"])
    with pytest.raises(InputError, match="different images"):
        summarise_trials(tests, Bootstrap())
