"""A segmenter trained by `medldm train` as the yardstick of `medldm evaluate`, in 2D and 3D."""

import json

import pytest

from medldm.commands import evaluate
from medldm.errors import InputError
from tests.helpers import compose_config
from tests.training import run_training

EXPERIMENT = "experiment=medlsdm/folder_segmentation"


@pytest.mark.parametrize(("fixture", "more"), [("prepared_3d", ()), ("prepared", ("data.spatial_dims=2",))])
def test_a_trained_segmenter_reads_real_images_as_well_as_themselves(fixture, more, request, tmp_path):
    root = request.getfixturevalue(fixture)
    checkpoint = run_training(root, tmp_path / "run", EXPERIMENT, *more).with_name("best.ckpt")
    paths = (
        f"generated={root}",
        f"reference={root}",
        f"output={tmp_path / 'out'}",
        f"segmenter={checkpoint}",
    )
    evaluate.task(compose_config("evaluate", *paths, "metrics=segmentation", "panel_rows=0"))
    results = json.loads((tmp_path / "out" / "metrics.json").read_text())
    real, generated = results["rows"]["real"], results["rows"]["generated"]
    classes = [name for name in generated if name != "dice_mean"]
    families = {name.rpartition("_")[0] if name.endswith("_mean") else name for name in classes}
    assert {"hd95", "surface_distance"} <= families
    assert all(name.startswith(("dice_", "hd95_", "surface_distance_")) for name in classes)
    assert 0 < generated["dice_mean"]["mean"] < 1
    for name in classes:
        assert generated[name]["n"] > 0 and generated[name]["mean"] == real[name]["mean"]
    assert results["dice_ratio"]["dice_mean"]["mean"] == 1


def test_a_checkpoint_that_is_no_segmenter_is_named(first_stage):
    with pytest.raises(InputError, match="holds no segmenter; train one with model=segmentation"):
        evaluate.load_segmenter(str(first_stage), (1, 64, 64), "cpu", {})


def test_a_segmenter_of_volumes_refuses_slices(prepared_3d, tmp_path):
    checkpoint = run_training(prepared_3d, tmp_path / "run", EXPERIMENT)
    with pytest.raises(InputError, match="takes 1 channels in 3D, the images have 1 in 2D"):
        evaluate.load_segmenter(str(checkpoint), (1, 64, 64), "cpu", {})
