"""Two evaluations of the same images: paired differences, their test, and what cannot be compared."""

import csv
import json

import numpy as np
import pytest
from synthetic_folders import smooth_images, write_case

from medldm.commands import evaluate
from medldm.metrics.bootstrap import bootstrap_mean

QUICK = (
    "metrics.features=[]",
    "metrics.lpips=null",
    "metrics.image=[psnr,rmse]",
    "metrics.baselines=[]",
    "panel_rows=0",
)


@pytest.fixture
def evaluated(call, folders):
    """Two evaluations of three subjects: the samples of the second have twice the noise."""
    rng = np.random.default_rng(1)
    for i, subject in enumerate(["001", "002", "003"]):
        images = smooth_images(8, 32, seed=i)
        noisy = np.clip(images + 0.2 * rng.normal(size=images.shape), -1, 1).astype(np.float32)
        write_case(folders / "worse" / f"{subject}.h5", noisy)
    for name in ("samples", "worse"):
        paths = (f"generated={folders}/{name}", f"reference={folders}/data", f"output={folders}/of_{name}")
        status, _, err = call(evaluate, *paths, *QUICK)
        assert status == 0, err
    return folders


def by_image(folder, metric):
    with open(folder / "per_case.csv") as file:
        return {
            line["id"]: float(line[metric]) for line in csv.DictReader(file) if line["row"] == "generated"
        }


def test_a_comparison_pairs_images_and_resamples_subjects(call, evaluated):
    runs = f"[{evaluated}/of_samples,{evaluated}/of_worse]"
    status, out, err = call(evaluate, f"compare={runs}", f"output={evaluated}/comparison", "seed=5")
    assert status == 0, err
    found = json.loads((evaluated / "comparison" / "comparison.json").read_text())
    assert found["n"] == {"images": 24, "subjects": 3}
    first, second = (by_image(evaluated / name, "rmse") for name in ("of_samples", "of_worse"))
    gaps = np.array([first[name] - second[name] for name in sorted(first)])
    expected = bootstrap_mean(gaps, [name.partition("_")[0] for name in sorted(first)], seed=5).as_dict()
    scores = found["metrics"]["rmse"]
    assert scores["difference"]["mean"] == pytest.approx(expected["mean"], rel=1e-6)
    assert scores["difference"]["ci95"] == pytest.approx(expected["ci95"], rel=1e-6)
    assert scores["difference"]["ci95"][1] < 0 < found["metrics"]["psnr"]["difference"]["ci95"][0]
    assert scores["p_value"] == pytest.approx(0.25, abs=0.03)  # 2 of the 8 orders of three subjects
    assert scores["difference"]["n"] == 24 and scores["difference"]["num_subjects"] == 3
    assert "rmse (lower)" in out and "fewer than 6 subjects" in out


def test_images_of_one_run_alone_are_said_to_take_no_part(call, evaluated):
    (evaluated / "worse" / "003.h5").unlink()
    paths = (f"generated={evaluated}/worse", f"reference={evaluated}/data", f"output={evaluated}/of_worse")
    assert call(evaluate, *paths, *QUICK)[0] == 0
    runs = f"[{evaluated}/of_worse,{evaluated}/of_samples]"
    status, out, err = call(evaluate, f"compare={runs}", f"output={evaluated}/comparison")
    assert status == 0, err
    found = json.loads((evaluated / "comparison" / "comparison.json").read_text())
    assert found["n"] == {"images": 16, "subjects": 2}
    assert found["warnings"][0].startswith(f"8 images of {evaluated}/of_samples are not in")


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ("[{0}/of_samples]", "name two folders"),
        ("[{0}/of_samples,{0}/nowhere]", "run `medldm evaluate"),
        (
            "[{0}/of_samples,{0}/broken]",
            "broken/metrics.json: schema_version: Field required; run `medldm evaluate` again",
        ),
    ],
)
def test_what_cannot_be_compared_is_told_in_a_line(call, evaluated, runs, said):
    (evaluated / "broken").mkdir()
    (evaluated / "broken" / "metrics.json").write_text("{}")
    (evaluated / "broken" / "per_case.csv").write_text("row,id\n")
    status, _, err = call(evaluate, f"compare={runs.format(evaluated)}", f"output={evaluated}/comparison")
    assert status == 2 and said in err and err.count("\n") == 1
    assert not (evaluated / "comparison").exists()
