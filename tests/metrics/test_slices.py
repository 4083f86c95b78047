"""`medldm export`, and volumes put together again from slices."""

import json
import shutil

import cv2
import numpy as np
import pytest
from synthetic_folders import smooth_volumes, write_prepared_volumes

from medldm.commands import evaluate, export
from medldm.errors import InputError
from medldm.evaluation.pairs import make_pairs
from medldm.evaluation.stacks import read_stacks

SHAPE = (18, 26, 24)


@pytest.fixture
def volumes(tmp_path):
    images = smooth_volumes(3, SHAPE, seed=0).astype(np.float16).astype(np.float32)
    cases = {f"v{i}_1": (image, image > 0.2) for i, image in enumerate(images)}
    write_prepared_volumes(tmp_path / "data", cases, orientation="PSL")
    index = json.loads((tmp_path / "data" / "index.json").read_text()) | {"orientation": "PSL"}
    (tmp_path / "data" / "index.json").write_text(json.dumps(index))
    splits = {"default": {"train": ["v0_1"], "val": [], "test": ["v1_1", "v2_1"]}}
    (tmp_path / "data" / "splits.json").write_text(json.dumps(splits))
    return tmp_path


def test_exported_slices_make_the_volumes_again(call, volumes):
    status, _, err = call(export, f"root={volumes / 'data'}", f"output={volumes / 'png'}")
    assert status == 0, err
    names = sorted(path.name for path in (volumes / "png/images/test").iterdir())
    assert names[0] == "v1_1_000.png" and len(names) == 2 * SHAPE[1]  # the second axis runs along the body
    for pair in make_pairs(volumes / "png/images/test", volumes / "data", None):
        pair = pair.loaded()
        np.testing.assert_allclose(pair.generated[0], pair.real, atol=1.01 / 255)
        drawn = cv2.imread(str(volumes / f"png/masks/all/test/{pair.id}_007.png"), cv2.IMREAD_UNCHANGED)
        assert np.array_equal(drawn, pair.mask[0][:, 7])


def test_slices_of_a_2d_model_are_evaluated_as_volumes(call, volumes):
    call(export, f"root={volumes / 'data'}", f"output={volumes / 'png'}")
    made = volumes / "made"
    made.mkdir()
    for path in (volumes / "png/images/test").iterdir():  # as segmentation-guided diffusion names them
        case, number = path.stem.rsplit("_", 1)
        shutil.copy(path, made / f"condon_{case}_slice_{int(number)}.png")
    paths = (f"generated={made}", f"reference={volumes / 'data'}", f"output={volumes / 'out'}")
    quick = ("metrics=synthesis_3d", "metrics.bootstrap.num_resamples=50", "panel_rows=1")
    status, _, err = call(evaluate, *paths, *quick, "paths.weights=null")
    assert status == 0, err
    rows = json.loads((volumes / "out" / "metrics.json").read_text())["rows"]
    assert rows["generated"]["rmse"]["mean"] < 0.003 and rows["generated"]["rmse"]["n"] == 2


def test_a_missing_slice_and_a_picture_without_a_number_are_named(call, volumes):
    call(export, f"root={volumes / 'data'}", f"output={volumes / 'png'}")
    folder = volumes / "png/images/test"
    (folder / "v1_1_004.png").unlink()
    with pytest.raises(InputError, match="slice 4 of 'v1_1' is missing"):
        read_stacks(folder, 1)
    (folder / "v2_1_000.png").rename(folder / "overview.png")
    with pytest.raises(InputError, match="overview.png: the reference holds volumes"):
        read_stacks(folder, 1)


def test_export_continues_and_refuses_a_folder_of_other_settings(call, mnms2_like):
    out = mnms2_like.parent / "png"

    def run(output) -> dict:
        status, _, err = call(export, f"root={mnms2_like}", f"output={output}")
        assert status == 0, err
        return {path: path.stat().st_mtime_ns for path in output.rglob("*.png")}

    first = run(out)
    assert len(first) == 2 * 32  # images and maps
    lost = min(first)
    lost.unlink()
    again = run(out)
    lost_mask = out / "masks" / "all" / lost.relative_to(out / "images")  # written before its image
    for path in (lost, lost_mask):
        assert again.pop(path) > first.pop(path)
    assert again == first
    (mnms2_like / "splits.json").write_text(json.dumps({"default": {"train": [], "test": ["004"]}}))
    status, _, err = call(export, f"root={mnms2_like}", f"output={out}")
    assert status == 2 and "holds images of another subjects" in err
    assert len(run(out.parent / "other")) == 2 * 8


def test_masks_among_the_images_are_refused(call, volumes):
    call(export, f"root={volumes / 'data'}", f"output={volumes / 'png'}")
    with pytest.raises(InputError, match="slice 0 of 'v._1' is there twice"):
        read_stacks(volumes / "png", 1)


@pytest.fixture
def mnms2_like(folders):
    root = folders / "data"
    index = json.loads((root / "index.json").read_text()) | {"num_classes": 2}
    (root / "index.json").write_text(json.dumps(index))
    return root
