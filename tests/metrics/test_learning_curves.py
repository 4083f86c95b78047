"""Learning curves of `medldm utility` in the page and as a picture."""

import cv2
import numpy as np
import pytest

from medldm.commands import report
from medldm.errors import InputError
from medldm.evaluation.results import jsonable
from medldm.evaluation.utility import HeldOutScores, TrainedOn, summarise_trials
from medldm.files import write_json
from medldm.metrics.summary import Bootstrap
from medldm.reporting.learning_curves import curves_of, learning_figure, read_utility, write_learning_curves
from medldm.reporting.run_page import compose_utility

LEVELS = {"real": 0.6, "synthetic": 0.4, "both": 0.7}


@pytest.fixture(scope="module")
def results():
    """Dice that grows by 0.1 from a share of 0.1 to one of 1, for 16 images of 8 subjects and two seeds."""
    tests = []
    for fraction, gain in ((0.1, 0.0), (1.0, 0.1)):
        for choice, level in LEVELS.items():
            for seed in (0, 1):
                noise = 0.02 * np.random.default_rng(seed).normal(size=16)
                ids = [f"<b>{i}" for i in range(16)]
                scores = {"dice_mean": level + gain + noise - noise.mean()}
                subjects = [str(i // 2) for i in range(16)]
                tests.append(HeldOutScores(TrainedOn(choice, fraction, seed), ids, subjects, scores))
    found = summarise_trials(tests, Bootstrap(num_resamples=200, level=0.95, seed=0))
    return found | {"command": "medldm utility <script>"}


def test_every_choice_has_a_curve_with_its_means_and_intervals(results):
    curves = curves_of(results, "dice_mean")
    assert list(curves) == ["real", "synthetic", "both"]
    for choice, points in curves.items():
        assert [fraction for fraction, *_ in points] == [0.1, 1.0]
        assert [mean for _, mean, *_ in points] == pytest.approx([LEVELS[choice], LEVELS[choice] + 0.1])
        assert all(low < mean < high for _, mean, low, high in points)


def test_the_chart_shows_points_bars_and_words(results):
    axis = learning_figure(results).axes[0]
    lines = {line.get_label(): line for line in axis.get_lines() if not line.get_label().startswith("_")}
    assert list(lines) == ["real only", "synthetic only", "real and synthetic"]
    assert lines["synthetic only"].get_ydata() == pytest.approx([0.4, 0.5])
    bars = [line for line in axis.get_lines() if line.get_label().startswith("_")]
    assert len(bars) == 6
    assert [label.get_text() for label in axis.get_xticklabels()] == ["0.1", "1"]
    assert axis.get_title("left") == "mean Dice on 16 real images of 8 held-out subjects"


def test_a_choice_without_any_score_leaves_a_gap(results):
    point = {**results["points"][0], "scores": {"dice_mean": {"mean": None, "ci95": None}}}
    axis = learning_figure({**results, "points": [point, *results["points"][1:]]}).axes[0]
    assert np.isnan(axis.get_lines()[0].get_ydata()[0])


def test_the_picture_and_the_page_are_written(results, tmp_path):
    write_learning_curves(tmp_path / "utility.png", results)
    picture = cv2.imread(str(tmp_path / "utility.png"))
    assert picture.shape == (510, 840, 3) and (picture[0, 0] == 255).all() and picture.std() > 5
    text = compose_utility(results, "medldm report utility=u")
    assert (
        text.count("<svg") == 1
        and "real and synthetic" in text
        and "<script>" not in text.split("utility &lt;")[1][:12]
    )
    assert "medldm utility &lt;script&gt;" in text


def test_folders_without_learning_curves_are_told(tmp_path):
    with pytest.raises(InputError, match="run `medldm utility"):
        read_utility(tmp_path)
    write_json(tmp_path / "utility.json", {"points": []})
    with pytest.raises(InputError, match="not written by this version"):
        read_utility(tmp_path)


def test_the_report_makes_a_page_of_the_folder_of_a_utility(call, results, tmp_path):
    write_json(tmp_path / "utility.json", jsonable(results))
    status, out, err = call(report, f"utility={tmp_path}")
    assert status == 0, err
    assert str(tmp_path / "report.html") in out
    text = (tmp_path / "report.html").read_text()
    assert "Use as training data" in text and "real and synthetic" in text
    status, _, err = call(report, f"utility={tmp_path / 'nowhere'}")
    assert status != 0 and "run `medldm utility" in err
