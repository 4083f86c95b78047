"""Batches run on from case to case, and change nothing."""

import json
import shutil

import h5py
import numpy as np
import pytest

from medldm import outputs
from medldm.commands import sample
from medldm.diffusion.conditioner import SpatialConditioner
from medldm.sampling import batches_of_items
from tests.helpers import compose_config


def test_batches_are_full_across_cases_of_one_size():
    jobs = [(0, [0, 1, 2]), (1, [3]), (2, [4, 5]), (3, [6])]
    sizes = {0: (8, 8), 1: (8, 8), 2: (16, 8), 3: (16, 8)}
    got = list(batches_of_items(jobs, sizes.get, 2))
    assert got == [[(0, 0), (0, 1)], [(0, 2), (1, 3)], [(2, 4), (2, 5)], [(3, 6)]]


@pytest.mark.parametrize("checkpoint", ["first_stage", "diffusion"])
def test_a_sample_is_the_same_in_every_batch_size(prepared, checkpoint, request, tmp_path):
    paths = (f"data.root={prepared}", f"checkpoint={request.getfixturevalue(checkpoint)}")
    options = (*paths, "split=all", "max_slices=3", "png=false")
    options += ("num_samples=2",) if checkpoint == "diffusion" else ()
    sizes = {"one": 1, "many": 5}
    for name, size in sizes.items():
        overrides = [*options, f"data.batch_size={size}", f"output={tmp_path / name}"]
        sample.task(compose_config("sample", *overrides))
    files = sorted((tmp_path / "one").glob("*.h5"))
    assert len(files) == 4
    for file in files:
        with h5py.File(file) as one, h5py.File(tmp_path / "many" / file.name) as many:
            assert one.keys() == many.keys() and list(one["row"]) == list(many["row"])
            for key in (key for key in one if key.startswith("images")):
                np.testing.assert_allclose(one[key], many[key], atol=1e-4)
            for key in (key for key in ("edges", "semantic_maps") if key in one):
                assert np.array_equal(one[key], many[key])


def test_views_in_another_order_reach_the_model_as_its_own(prepared, diffusion, tmp_path, monkeypatch):
    shutil.copytree(prepared, tmp_path / "other")
    index = json.loads((prepared / "index.json").read_text())
    assert index["view_names"] == ["SA", "LA"]
    index["view_names"] = ["LA", "SA"]
    for case in index["cases"]:
        case["slices"]["view"] = [1 - view for view in case["slices"]["view"]]
    (tmp_path / "other" / "index.json").write_text(json.dumps(index))
    seen: list[list[int]] = []
    embed = SpatialConditioner.embed

    def recorded(self, batch, drop):
        seen[-1] += batch["view"].tolist()
        return embed(self, batch, drop)

    monkeypatch.setattr(SpatialConditioner, "embed", recorded)
    for name, root in (("one", prepared), ("two", tmp_path / "other")):
        seen.append([])
        paths = (f"data.root={root}", f"checkpoint={diffusion}", f"output={tmp_path / name}")
        sample.task(compose_config("sample", *paths, "split=test", "max_slices=4", "png=false"))
    assert set(seen[0]) == {0, 1} and seen[0] == seen[1]


def test_a_run_cut_between_pictures_and_arrays_leaves_a_case_to_be_made(
    prepared, first_stage, tmp_path, monkeypatch
):
    """The HDF5 file tells that a case is finished, so a kill before its last picture must come before it."""
    options = (f"data.root={prepared}", f"checkpoint={first_stage}", "split=val", "max_slices=3")
    cfg = compose_config("sample", *options, f"output={tmp_path / 'out'}")
    written = []

    def cut(path, picture):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(outputs, "save_png", cut)
        sample.task(cfg)
    assert len(written) == 2 and not list((tmp_path / "out").glob("*.h5"))
    sample.task(cfg)
    assert len(list((tmp_path / "out" / "png").glob("*.png"))) == 3
    assert len(list((tmp_path / "out").glob("*.h5"))) == 1
