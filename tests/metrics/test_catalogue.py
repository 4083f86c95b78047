"""One table of metrics: every name that a result has finds its row, and the README shows the rows."""

from pathlib import Path

import pytest

from medldm.evaluation.screen import main_table
from medldm.metrics.catalogue import METRICS, better, define, find_metric, markdown_table, select_metrics
from medldm.networks.features import FEATURE_SETS

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readme_shows_the_table():
    assert markdown_table() in README.read_text()


@pytest.mark.parametrize(
    ("name", "row", "direction", "said"),
    [
        ("psnr_brain", "psnr", "higher", "where the source is not background"),
        ("nmse_energy_tumour", "nmse_energy", "lower", "where the map of the target is not 0"),
        ("ssim_slices", "ssim_slices", "higher", "axial slices"),
        ("lpips_slices", "lpips", "lower", "Zhang"),
        ("edge_f1_2px", "edge_f1", "higher", "conditioning edges, matched within 2 px"),
        ("edge_f1_real_1px", "edge_f1_real", "higher", "edges of the real image, matched within 1 px"),
        ("dice_left ventricle", "dice", "higher", "Dice of left ventricle"),
        ("hd95_left ventricle", "hd95", "lower", "Hausdorff distance of left ventricle"),
        ("surface_distance_mean", "surface_distance", "lower", "between the surfaces"),
        ("dice_mean", "dice", "higher", "mean over the foreground classes"),
        ("nearest_train_rmse", "nearest_train_rmse", "as real", "nearest training image"),
        ("fid_192_slices", "fid", "lower", "Inception"),
        ("recall_3d", "recall", "higher", "real images within"),
    ],
)
def test_names_of_families_find_their_row(name, row, direction, said):
    assert find_metric(name) is METRICS[row]
    assert better(name) == direction and said in define(name)


def test_every_set_of_features_has_rows_of_its_distances():
    for entry in FEATURE_SETS.values():
        assert better(entry.frechet_name) == better(entry.kernel_name or entry.frechet_name) == "lower"


@pytest.mark.parametrize("name", ["ssim_of_something", "psnr2", "fid_100", "dice_", "nmse_var_brain"])
def test_a_direction_is_never_guessed_from_the_beginning_of_a_name(name):
    with pytest.raises(KeyError, match=name):
        better(name)


def test_tables_show_the_direction_of_the_catalogue():
    score = {"mean": 0.5, "ci95": None, "std": None, "n": 3, "num_subjects": 3, "num_excluded": 0}
    scores = {"rmse": score, "dice_liver": score, "nearest_train_rmse": score}
    facts = {"n": 3, "num_subjects": 3, "same_as_generated": True}
    results = {
        "n": {"images": 3, "subjects": 3},
        "cases": {"rows": {"generated": facts}},
        "rows": {"generated": scores},
    }
    names = list(main_table(results).columns[0].cells)
    assert names[1:] == ["rmse (lower)", "dice_liver (higher)", "nearest_train_rmse (as real)"]


def test_only_metrics_of_image_pairs_can_be_selected():
    assert list(select_metrics(["psnr", "ssim_slices"])) == ["psnr", "ssim_slices"]
