"""`medldm evaluate` on volumes: slices along the body, memory, segmentation, translation."""

import csv
import json

import cv2
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from synthetic_folders import smooth_volumes, write_prepared_volumes, write_sample
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from medldm.commands import evaluate
from medldm.evaluation import slices
from medldm.evaluation.baselines import make_rows
from medldm.evaluation.diversity import draw_pairs
from medldm.evaluation.measure import measure_dice
from medldm.evaluation.pairs import make_pairs
from medldm.evaluation.panels import in_lines, upright
from medldm.evaluation.regions import region_masks
from medldm.evaluation.screen import brief, deviation_cell
from medldm.evaluation.slices import SliceFeatures, axial_axis, fold
from medldm.evaluation.stored import StoredImage, load
from medldm.evaluation.tools import Segmenter, Tools
from medldm.metrics.bootstrap import bootstrap_ratio
from medldm.networks.features import MedicalNetFeatures

SHAPE = (22, 26, 24)
QUICK = ("metrics.bootstrap.num_resamples=200", "panel_rows=1", "paths.weights=null")


def run(call, folder, *more):
    paths = (f"generated={folder}/samples", f"reference={folder}/data", f"output={folder}/evaluation")
    status, out, err = call(evaluate, *paths, *QUICK, *more)
    assert status == 0, err
    return json.loads((folder / "evaluation" / "metrics.json").read_text()), out


@pytest.fixture
def volumes(tmp_path):
    """Five prepared volumes whose second axis runs along the body, and noisy copies of four."""
    images = smooth_volumes(5, SHAPE, seed=0).astype(np.float16).astype(np.float32)
    cases = {f"v{i}": (image, image > 0.2) for i, image in enumerate(images)}
    write_prepared_volumes(tmp_path / "data", cases, orientation="PSL")
    rng = np.random.default_rng(1)
    for i in range(4):
        noisy = np.clip(images[i] + 0.1 * rng.normal(size=(1, *SHAPE)), -1, 1).astype(np.float32)
        write_sample(tmp_path / "samples", f"v{i}", noisy)
    return tmp_path


def test_volumes_are_compared_whole_and_by_axial_slice(call, volumes, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(volumes / "nowhere"))
    results, out = run(call, volumes, "metrics=synthesis_3d")
    rows, pairs = results["rows"], make_pairs(volumes / "samples", volumes / "data", None)
    assert list(rows) == ["generated", "mean_image", "random_real", "shuffled"]
    assert rows["generated"]["rmse"]["mean"] < rows["mean_image"]["rmse"]["mean"]
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    x, y = ((load(image)[0].astype(float) + 1) / 2 for image in (pairs[0].real, pairs[0].generated[0]))
    by_slice = [structural_similarity(x[:, i], y[:, i], **settings) for i in range(SHAPE[1])]
    with open(volumes / "evaluation" / "per_case.csv") as file:
        first = next(csv.DictReader(file))
    assert float(first["ssim_slices"]) == pytest.approx(np.mean(by_slice), abs=1e-6)
    assert float(first["ssim_gaussian"]) == pytest.approx(structural_similarity(x, y, **settings), abs=1e-6)
    assert results["axial_axis"] == 1 and results["image_shape"] == [1, *SHAPE]
    for name in ("fid_3d", "kid_3d"):
        assert "resnet_50" in results["networks"][name]["missing"]
    assert "pt_inception" in results["networks"]["fid_slices"]["missing"]
    assert "vgg16" in results["networks"]["lpips_slices"]["missing"]
    assert results["distribution"]["generated"]["frechet_random_conv"]["n"] == 4
    diversity = results["diversity"]
    assert diversity["num_scales"] == 2 and diversity["ms_ssim"]["generated"]["n_pairs"] == 6
    assert diversity["ms_ssim"]["generated"]["mean"] < diversity["ms_ssim"]["real"]["mean"] < 1
    assert out.count("fid_3d, kid_3d, precision_3d, recall_3d, density_3d and coverage_3d left out") == 1


def test_identical_volumes_score_perfectly(call, volumes):
    results, _ = run(call, volumes, f"generated={volumes}/data", "metrics=synthesis_3d")
    scores = results["rows"]["generated"]
    assert scores["ssim_gaussian"]["mean"] == scores["ssim_slices"]["mean"] == pytest.approx(1)
    assert scores["rmse"]["mean"] == 0 and scores["psnr"]["mean"] == "inf"
    assert results["distribution"]["generated"]["frechet_random_conv"]["value"] < 1e-6


def test_an_evaluation_of_volumes_holds_none_of_them(volumes):
    pairs = make_pairs(volumes / "samples", volumes / "data", None)
    rows = make_rows(pairs, ("mean_image", "random_real", "shuffled"), training=None, seed=0)
    assert all(isinstance(image, StoredImage) for images in rows.images.values() for image in images)
    assert all(isinstance(pair.real, StoredImage) and isinstance(pair.mask, StoredImage) for pair in pairs)


def test_the_mean_volume_leaves_the_judged_subject_out(volumes):
    pairs = make_pairs(volumes / "samples", volumes / "data", None)
    rows = make_rows(pairs, ("mean_image",), training=None, seed=0)
    others = np.mean([load(pair.real) for pair in pairs[1:]], 0)
    assert np.allclose(load(rows.images["mean_image"][0]), others, atol=1e-6)


@pytest.mark.parametrize(("code", "axis"), [("SPL", 0), ("PSL", 1), ("RAS", 2), ("RAI", 2)])
def test_the_axial_axis_follows_from_the_orientation(code, axis):
    assert axial_axis({"preprocess": {"orientation": code}}, {}) == axis


def test_the_axial_axis_of_a_nifti_follows_from_its_affine():
    affine = np.eye(4)[[2, 1, 0, 3]]  # the first array axis is the world's z
    assert axial_axis({}, {"affine": affine}) == 0 and axial_axis({}, {}) == 0
    assert axial_axis({}, {"affine": np.eye(4)}) == 2


class Mean(nn.Module):
    sha256, num_features = "0", 2

    def forward(self, x):
        return torch.stack([x.flatten(1).mean(1), x.flatten(1).amax(1)], 1)


def test_slice_features_are_those_of_evenly_spread_slices():
    x = torch.arange(7.0).view(1, 1, 1, 7, 1).expand(2, 1, 3, 7, 4)
    features = SliceFeatures(Mean(), axis=1, num_slices=3)(x)
    assert features.shape == (2, 3, 2) and features[0, :, 0].tolist() == [0, 3, 6]
    assert fold(x, 1).shape == (14, 1, 3, 4)


class Largest(TorchDispatchMode):
    """Remembers the elements of the largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_networks_see_few_slices_of_a_volume_at_a_time(monkeypatch):
    """The maps of a network hold many channels: those of all slices at once would take 64 times
    the volume.
    """
    monkeypatch.setattr(slices, "PIECE_ELEMENTS", 4 * 16 * 16)
    x, y = torch.rand(2, 2, 1, 40, 16, 16)
    weight = torch.rand(64, 1, 3, 3)

    def distance(a, b):
        maps = (F.conv2d(stack, weight, padding=1) for stack in (a, b))
        return (next(maps) - next(maps)).square().flatten(1).mean(1)

    with Largest() as made:
        values = slices.slicewise(distance, 0)(x, y)
    assert made.elements <= 4 * 64 * 16 * 16
    whole = distance(fold(x, 0), fold(y, 0)).double().view(2, -1).mean(1)
    assert torch.allclose(values, whole, rtol=1e-6)
    features = SliceFeatures(Mean(), axis=0, num_slices=40)(x)
    assert torch.equal(features[:, :, 1], x[:, 0].flatten(2).amax(2))


def test_medicalnet_sees_the_unit_range_and_is_averaged():
    network = nn.Identity()
    network.num_features, network.sha256 = 1, "0"
    x = torch.tensor([-1.0, 0.0, 1.0, 5.0]).view(1, 1, 4, 1, 1)
    assert float(MedicalNetFeatures(network)(x)) == pytest.approx((0 + 0.5 + 1 + 1) / 4)


# ---- diversity ----


def test_a_generator_that_repeats_itself_has_an_ms_ssim_of_one(call, volumes):
    same = smooth_volumes(1, SHAPE, seed=9)[0]
    for i in range(4):
        (volumes / "samples" / f"v{i}.h5").unlink()
        write_sample(volumes / "samples", f"v{i}", same)
    results, _ = run(call, volumes, "metrics=synthesis_3d", "metrics.baselines=[]")
    assert results["diversity"]["ms_ssim"]["generated"]["mean"] == pytest.approx(1)
    assert results["diversity"]["ms_ssim"]["real"]["mean"] < 0.9


def test_pairs_for_diversity_are_of_two_subjects_and_different(volumes):
    pairs = make_pairs(volumes / "samples", volumes / "data", None)
    drawn = draw_pairs(pairs, 100, seed=0)
    assert sorted(drawn) == [(i, j) for i in range(4) for j in range(i + 1, 4)]
    assert len(draw_pairs(pairs, 3, seed=0)) == 3


# ---- segmentation ----


def test_dice_of_a_threshold_that_finds_the_map(volumes):
    pairs = make_pairs(volumes / "samples", volumes / "data", None)
    images = torch.from_numpy(np.stack([load(pair.real) for pair in pairs]))
    tools = Tools({}, None, segmenter=Segmenter(lambda x: (x > 0.2).long(), ["bright"]))
    assert measure_dice(images, pairs, tools)["dice_bright"].tolist() == [1, 1, 1, 1]
    shuffled = measure_dice(images.roll(1, 0), pairs, tools)
    assert shuffled["dice_mean"].max() < 0.9 and np.array_equal(
        shuffled["dice_mean"], shuffled["dice_bright"]
    )


def test_a_segmenter_reads_generated_and_real_volumes(call, volumes, monkeypatch):
    found = Segmenter(lambda x: (x > 0.2).long(), ["bright"])
    monkeypatch.setattr(evaluate, "load_segmenter", lambda *_: found)
    monkeypatch.setattr(evaluate, "check_origins", lambda *_: [])  # reads the segmenter's checkpoint
    results, _ = run(call, volumes, "metrics=segmentation", "segmenter=unused")
    rows = results["rows"]
    assert rows["real"]["dice_bright"]["mean"] == 1 and rows["real"]["dice_bright"]["n"] == 4
    assert rows["shuffled"]["dice_mean"]["mean"] < rows["generated"]["dice_mean"]["mean"] < 1
    ratio = results["dice_ratio"]["dice_bright"]
    assert ratio["mean"] == pytest.approx(rows["generated"]["dice_bright"]["mean"])
    assert ratio["ci95"][0] <= ratio["mean"] <= ratio["ci95"][1]


def test_a_ratio_is_of_means_and_leaves_out_what_lacks_a_value():
    over, under = np.array([1.0, 2.0, np.nan, 4.0]), np.array([2.0, 2.0, 5.0, 4.0])
    ratio = bootstrap_ratio(over, under, ["a", "a", "b", "c"])
    assert ratio.mean == pytest.approx(7 / 8) and (ratio.num_images, ratio.num_excluded) == (3, 1)
    assert ratio.low == pytest.approx(0.75) and ratio.high == pytest.approx(1)


# ---- translation ----


@pytest.fixture
def translations(tmp_path):
    """Three subjects with t1 (flat 0 inside, background outside), t2 (flat 0.5 inside); two have a tumour."""
    cases, subjects = {}, {}
    for i in range(3):
        inside = np.zeros((1, *SHAPE), bool)
        inside[:, 4:-4, 4:-4, 4:-4] = True
        tumour = np.zeros_like(inside)
        tumour[:, 8:12, 8:12, 8:12] = i > 0
        for label, value in (("t1", 0.0), ("t2", 0.5)):
            image = np.where(inside, value, -1.0)
            cases[f"s{i}_{label}"], subjects[f"s{i}_{label}"] = (image, tumour), f"s{i}"
            made = np.where(inside, value + 0.125 * (i + 1), -1.0).astype(np.float32)
            other = "t2" if label == "t1" else "t1"
            write_sample(tmp_path / "samples", f"s{i}_{other}_to_{label}", made)
            write_sample(tmp_path / "ceiling", f"s{i}_{label}", image.astype(np.float32))
        write_sample(tmp_path / "unet", f"s{i}_t1_to_t2", image.astype(np.float32))
    write_prepared_volumes(tmp_path / "data", cases, subjects=subjects)
    return tmp_path


def test_translations_are_judged_by_pair_and_region(call, translations):
    folders = (f"reconstruction={translations}/ceiling", f"regression={translations}/unet")
    results, out = run(call, translations, "metrics=translation", *folders)
    assert results["n"]["images"] == 6 and results["n"]["subjects"] == 3
    assert list(results["rows"]) == ["generated", "reconstruction", "regression", "identity"]
    pair = results["groups"]["pair"]["t1 to t2"]
    generated, identity = pair["generated"], pair["identity"]
    share = np.prod([side - 8 for side in SHAPE]) / np.prod(SHAPE)
    errors = 0.0625 * np.arange(1, 4)  # on [0, 1]
    psnr = -20 * np.log10(errors)
    assert generated["psnr_brain"]["mean"] == pytest.approx(psnr.mean())
    assert generated["psnr_brain"]["std"] == pytest.approx(psnr.std(ddof=1))
    assert generated["psnr"]["mean"] == pytest.approx((psnr - 10 * np.log10(share)).mean())
    assert generated["psnr_tumour"]["mean"] == pytest.approx(psnr[1:].mean())
    assert (generated["psnr_tumour"]["n"], generated["psnr_tumour"]["num_excluded"]) == (2, 1)
    assert generated["nmse_energy"]["mean"] == pytest.approx((errors**2 / 0.75**2).mean())
    assert identity["nmse_energy_brain"]["mean"] == pytest.approx((0.25 / 0.75) ** 2)
    assert identity["psnr_tumour"]["mean"] == pytest.approx(-20 * np.log10(0.25))
    assert pair["reconstruction"]["nmse_energy"]["mean"] == pair["regression"]["nmse_energy"]["mean"] == 0
    assert results["cases"]["rows"]["regression"] == {
        "n": 3,
        "num_subjects": 3,
        "same_as_generated": False,
        "without": ["s0_t2_to_t1", "s1_t2_to_t1", "s2_t2_to_t1"],
    }
    assert results["generated_beside"]["regression"]["nmse_energy"] == generated["nmse_energy"]
    assert "3 (3) *" in out and "regression is on 3 of 6 images" in out
    back = results["groups"]["pair"]["t2 to t1"]
    assert back["regression"]["psnr"]["n"] == 0
    assert back["identity"]["nmse_energy"]["mean"] == pytest.approx(0.25)
    assert identity["ssim_gaussian_brain"]["mean"] < 0.99 < pair["reconstruction"]["ssim_gaussian"]["mean"]
    assert "t1 to t2" in out
    assert results["definitions"]["psnr_tumour"].endswith("not 0; left out where there is none")
    with open(translations / "evaluation" / "per_case.csv") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 6 + 6 + 3 + 6 and {line["pair"] for line in lines} == {"t1 to t2", "t2 to t1"}


def test_the_ceiling_may_be_named_like_the_translations(call, translations):
    """As `medldm sample stage=autoencoder` writes it."""
    for path in (translations / "ceiling").glob("*_t2.h5"):
        path.rename(path.with_name(path.name.replace("_t2", "_t1_to_t2")))
    results, _ = run(call, translations, "metrics=translation", f"reconstruction={translations}/ceiling")
    pairs = results["groups"]["pair"]
    assert pairs["t1 to t2"]["reconstruction"]["nmse_energy"]["mean"] == 0
    assert [pairs[name]["reconstruction"]["psnr"]["n"] for name in ("t1 to t2", "t2 to t1")] == [3, 3]


@pytest.mark.parametrize("row", ["reconstruction", "spade", "regression"])
def test_a_folder_of_other_cases_is_named(call, translations, row):
    write_sample(translations / "elsewhere", "s9_t1_to_t2", np.zeros((1, *SHAPE), np.float32))
    paths = (f"generated={translations}/samples", f"reference={translations}/data")
    row = f"{row}={translations}/elsewhere"
    status, _, err = call(evaluate, *paths, f"output={translations}/e", "metrics=translation", row)
    assert status == 2 and f"{translations}/elsewhere: no image is named like one of" in err


def test_a_file_that_is_no_translation_is_named(call, translations):
    write_sample(translations / "samples", "s0_t9_to_t1", np.zeros((1, *SHAPE), np.float32))
    paths = (f"generated={translations}/samples", f"reference={translations}/data")
    status, _, err = call(evaluate, *paths, f"output={translations}/evaluation", "metrics=translation")
    assert status == 2 and "s0_t9_to_t1: not named <subject>_<source>_to_<target>" in err
    assert len(err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("metrics.regions=[skull]", "no region 'skull'; choose from brain, tumour"),
        ("metrics.image=[nmse_var]", "nmse_var is not defined in a region"),
    ],
)
def test_unknown_regions_and_unfit_metrics_are_named(call, translations, option, said):
    paths = (f"generated={translations}/samples", f"reference={translations}/data")
    status, _, err = call(evaluate, *paths, f"output={translations}/e", "metrics=translation", option)
    assert status == 2 and said in err


# ---- pages and tables ----


def test_the_page_shows_three_planes_and_the_pairs(call, translations):
    from medldm.commands import report

    results, _ = run(call, translations, "metrics=translation")
    run_dir = translations / "run"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text("experiment_name: aldm/brats_ldm\n")
    status, out, err = call(report, f"run={run_dir}", f"evaluation={translations}/evaluation")
    assert status == 0, err
    text = (translations / "evaluation" / "report.html").read_text()
    assert "source (line) to target (column)" in text and "t1 to t2" in text
    value = results["groups"]["pair"]["t1 to t2"]["generated"]["psnr"]
    assert deviation_cell(value) in text and value["std"] > 0
    assert "worst by psnr" in text and "Sets of images" not in text
    picture = cv2.imread(str(translations / "evaluation" / "panels" / "best.png"))
    assert picture.shape[0] > 3 * 200  # one volume, three planes


def test_upright_volumes_run_down_back_and_left():
    volume = np.zeros((3, 4, 5))
    volume[2, 0, 4] = 1  # RAS: right, back, top
    turned = upright(volume, "RAS")
    assert turned.shape == (5, 4, 3) and turned[0, 3, 0] == 1


def test_the_results_table_names_models_and_says_why_numbers_are_missing(call, volumes, monkeypatch):
    from medldm.commands import report

    monkeypatch.setenv("TORCH_HOME", str(volumes / "nowhere"))
    facts = {"decoder": "spade", "condition_channels": 64}
    (volumes / "samples" / "provenance.json").write_text(json.dumps(facts))
    results, _ = run(call, volumes, "metrics=synthesis_3d", "metrics.ms_ssim_pairs=0")
    folder = volumes / "evaluation"
    arguments = ("table=medlsdm", f"evaluation=[{folder},{folder}]", f"output={volumes}/table.md")
    status, out, err = call(report, *arguments)
    assert status == 0, err
    lines = (volumes / "table.md").read_text().splitlines()
    assert lines[0] == ("| Dataset | Decoder | #channels | n | FID | 3D-FID | LPIPS | SSIM | RMSE | PSNR |")
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    scores = results["rows"]["generated"]
    assert cells[:7] == ["folder", "spade", "64", "4", "missing", "missing", "missing"]
    for cell, name in zip(cells[7:], ("ssim_gaussian", "rmse", "psnr"), strict=True):
        assert cell.startswith(brief(scores[name]["mean"]) + " [")
    assert lines[3] == lines[2]
    notes = [line for line in lines if line.startswith("- ")]
    assert any(line.startswith("- 3D-FID missing: resnet_50") for line in notes)
    assert "twice that on [-1, 1]" in notes[0]
    page = (volumes / "table.html").read_text()
    assert ">3D-FID</th>" in page and "resnet_50" in page and str(volumes / "table.html") in out


def test_a_table_of_nothing_is_named(call):
    from medldm.commands import report

    status, _, err = call(report, "table=medlsdm")
    assert status == 2 and "name the evaluations as evaluation=[DIR1,DIR2]" in err
    status, _, err = call(report)
    assert status == 2 and "run: not given" in err


def test_the_brain_is_where_the_source_is_not_background(volumes):
    pairs = make_pairs(volumes / "samples", volumes / "data", None)[:2]
    for pair in pairs:
        pair.source = np.full((1, *SHAPE), -1.0, np.float32)
        pair.source[:, 3] = -0.98
    brain = region_masks("brain", pairs, torch.zeros(2, 1, *SHAPE))
    assert brain.shape == (2, 1, *SHAPE) and int(brain.sum()) == 2 * SHAPE[1] * SHAPE[2]
    assert brain[:, :, 3].all()
    tumour = region_masks("tumour", pairs, torch.zeros(2, 1, *SHAPE))
    assert np.array_equal(tumour[0].numpy(), load(pairs[0].mask) > 0)


def test_long_names_are_folded_beside_their_picture():
    name = "PETCT_00000007_01-01-2003-NA-PET-CT"
    assert in_lines(f"{name}\naxial") == "PETCT_00000007_01-01-2003-\nNA-PET-CT\naxial"
    assert in_lines("BraTS2021_00026_t1ce_to_flair") == "BraTS2021_00026_t1ce_to_\nflair"
    assert in_lines("x" * 30) == "x" * 26 + "\nxxxx"
