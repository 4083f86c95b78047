import csv
import json
import re

import cv2
import numpy as np
import pytest

from medldm.commands import evaluate, report
from medldm.evaluation.origins import changes_since, images_digest
from medldm.evaluation.screen import brief
from medldm.fingerprints import file_sha256
from medldm.reporting.charts import Curve, curve_chart, smooth
from medldm.reporting.edge_levels import short_names
from medldm.reporting.page import element, table
from medldm.reporting.sections import chosen_pictures, curve_groups


@pytest.fixture
def run_dir(tmp_path):
    """A run folder: config, metrics with empty cells, three sample grids."""
    folder = tmp_path / "runs" / "vqvae"
    (folder / "samples").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        "experiment_name: cardiac2d/vqvae\nseed: 7\ntrainer: {max_steps: 40}\n"
    )
    with open(folder / "metrics.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "train/loss", "val/loss", "train/perplexity"])
        writer.writerows([i, 1 / (i + 1), "", 10 + i] for i in range(40))
        writer.writerow([39, "", 0.125, ""])
    for step in (10, 20, 30):
        cv2.imwrite(str(folder / "samples" / f"step_{step:07d}.png"), np.full((8, 16), step, np.uint8))
    return folder


def test_the_page_holds_numbers_pictures_and_curves_and_loads_nothing(call, folders, run_dir):
    arguments = [
        f"{name}={folders}/{part}" for name, part in (("generated", "samples"), ("reference", "data"))
    ]
    output = folders / "evaluation"
    assert call(evaluate, *arguments, f"output={output}", "panel_rows=1")[0] == 0
    status, out, err = call(report, f"run=[{run_dir}]", f"evaluation={output}")
    assert status == 0, err
    assert out.strip().splitlines()[-1] == str(output / "report.html")
    text = (output / "report.html").read_text()
    rows = json.loads((output / "metrics.json").read_text())["rows"]
    for row in ("generated", "mean_image", "random_real", "shuffled"):
        assert brief(rows[row]["ssim"]["mean"]) in text
        assert brief(rows[row]["nmse_var"]["ci95"][0]) in text
    assert text.count("data:image/png;base64,") == 3 + 3 + 4  # panels, sample grids, browser
    assert text.count("<svg") == 1 + 2  # scores, loss, perplexity
    assert "pt_inception-2015-12-05-6726825d.pth" in text and "very test image" not in text
    assert not re.search(r'(src|href)="(?!data:|#)', text) and "@import" not in text


def test_a_page_says_what_changed_since_its_evaluation(tmp_path, run_dir):
    samples, checkpoint = tmp_path / "samples", run_dir / "checkpoints" / "best.ckpt"
    for path in (samples / "p0.png", checkpoint):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"one")
    made = {"checkpoint": str(checkpoint), "checkpoint_sha256": file_sha256(checkpoint)}
    results = {"inputs": {"generated": images_digest(samples)}, "folders": {"generated": str(samples)}}
    results |= {"provenance": {"generated": made}}
    assert not list(changes_since(results, [str(run_dir)])) and not list(changes_since({}, [str(run_dir)]))
    (samples / "p0.png").write_bytes(b"other")
    checkpoint.write_bytes(b"two")
    changed, trained = changes_since(results, [str(run_dir)])
    assert "changed since these numbers" in changed and "trained on since" in trained
    assert len(list(changes_since(results, [str(tmp_path / "other run")]))) == 1


def test_a_run_without_an_evaluation_has_a_page(call, run_dir):
    status, out, _ = call(report, f"run={run_dir}")
    text = (run_dir / "report.html").read_text()
    assert status == 0 and str(run_dir / "report.html") in out
    assert "cardiac2d/vqvae" in text and "step 30" in text


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("run={tmp}/none",), "none: no such folder"),
        (("run={tmp}",), "holds neither config.yaml nor metrics.csv"),
        (("run={run}", "evaluation={tmp}/none"), "metrics.json: not found; run `medldm evaluate"),
    ],
)
def test_a_folder_that_is_none_is_named(call, tmp_path, run_dir, arguments, said):
    status, _, err = call(report, *(a.format(tmp=tmp_path, run=run_dir) for a in arguments))
    assert status == 2 and said in err and len(err.strip().splitlines()) == 1


def test_training_and_validation_share_a_chart():
    curve = Curve(np.arange(3), np.ones(3))
    groups = curve_groups({"train/loss": curve, "val/loss": curve, "epoch": curve, "lr": curve})
    assert {name: list(parts) for name, parts in groups.items()} == {"loss": ["train", "val"], "lr": [""]}


def test_a_chart_follows_the_ink_of_the_page():
    svg = curve_chart("loss", {"train": Curve(np.arange(100), np.linspace(5, 1, 100))})
    assert svg.startswith("<svg") and "currentColor" in svg and "#010203" not in svg
    assert not re.search(r"<svg[^>]* (width|height)=", svg)


def test_the_running_mean_keeps_a_line_straight():
    assert np.allclose(smooth(np.arange(50.0), 9)[4:-4], np.arange(50.0)[4:-4])


def test_the_first_and_the_newest_picture_are_among_the_chosen():
    chosen = chosen_pictures([f"step_{i:07d}" for i in range(100)])["step"]
    assert len(chosen) == 7 and chosen[0] == "step_0000000" and chosen[-1] == "step_0000099"


def test_markup_in_names_is_escaped():
    assert element("p", "x", title='a"<b>') == '<p title="a&#34;&lt;b&gt;">x</p>'
    assert "&lt;metric&gt;" in table(["<metric>"], [])


def test_checkpoints_are_named_by_what_tells_them_apart():
    paths = ["/a/runs/plain/checkpoints/best.ckpt", "/a/runs/rough/checkpoints/best.ckpt"]
    assert list(short_names(paths).values()) == ["plain", "rough"]
    assert list(short_names(["x/one.ckpt", "x/two.ckpt"]).values()) == ["one.ckpt", "two.ckpt"]
    assert short_names(["/a/best.ckpt"]) == {"/a/best.ckpt": "/a/best.ckpt"}
    assert len(set(short_names(["/a/b/best.ckpt", "/a/best.ckpt"]).values())) == 2


def test_scores_over_the_roughness_of_edges(call, folders):
    """One evaluation a level and model; contours, which is no number, comes last."""
    made = {}
    for model, level in (("a.ckpt", 0.5), ("a.ckpt", "contours"), ("a.ckpt", None), ("b.ckpt", 0.5)):
        made[model, level] = folder = folders / f"{model}_{level}"
        facts = {"checkpoint": model, "edge_level": level}
        (folders / "samples" / "provenance.json").write_text(json.dumps(facts))
        paths = (f"generated={folders}/samples", f"reference={folders}/data", f"output={folder}")
        status, _, err = call(evaluate, *paths, "panel_rows=0", "metrics.bootstrap.num_resamples=50")
        assert status == 0, err
    names = f"[{','.join(str(folder) for folder in made.values())}]"
    status, _, err = call(report, "table=edge_levels", f"evaluation={names}", f"output={folders}/levels")
    assert status == 0, err
    lines = (folders / "levels.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[:6]]
    assert cells[0][:4] == ["checkpoint", "level", "images (subjects)", "ssim"] and "edge_f1_1px" in cells[0]
    levels = [["a.ckpt", "0.00"], ["a.ckpt", "0.500"], ["a.ckpt", "contours"], ["b.ckpt", "0.500"]]
    assert [line[:2] for line in cells[2:]] == levels and all("[" in line[3] for line in cells[2:])
    assert {line[2] for line in cells[2:]} == {"24 (3)"}
    page = (folders / "levels.html").read_text()
    assert page.count("<svg") == len(cells[0]) - 3 and "contours" in page
    twice = f"[{made['b.ckpt', 0.5]},{made['b.ckpt', 0.5]}]"
    status, _, err = call(report, "table=edge_levels", f"evaluation={twice}", f"output={folders}/levels")
    assert status == 2 and "b.ckpt at edge_level=0.5" in err
    (folders / "samples" / "provenance.json").unlink()
    unknown = folders / "unknown"
    paths = (f"generated={folders}/samples", f"reference={folders}/data", f"output={unknown}")
    assert call(evaluate, *paths, "panel_rows=0", "metrics.bootstrap.num_resamples=50")[0] == 0
    status, _, err = call(report, "table=edge_levels", f"evaluation={unknown}", f"output={folders}/levels")
    assert status == 2 and "have no provenance.json" in err
