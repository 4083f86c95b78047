"""The Frechet radiomic distance equals that of the package frd-score, on features that it wrote and on its
images where pyradiomics is installed.
"""

import importlib.util
import logging
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from radiomics_reference import SETS, images_of

from medldm.errors import InputError
from medldm.evaluation.distances import FeatureSets, compare_sets
from medldm.evaluation.measure import Measured
from medldm.evaluation.notes import warn_incomplete, warn_small
from medldm.evaluation.results import ESTIMATORS
from medldm.evaluation.run import common_spacing
from medldm.metrics.radiomic import radiomic_distance
from medldm.networks.features import build_features
from medldm.networks.radiomics import import_library, mute_library

KERNEL = {"num_subsets": 2, "subset_size": 4}


class Spaced:
    def __init__(self, *spacing: float) -> None:
        self.attributes = {"spacing": spacing} if spacing else {}


@pytest.fixture(scope="module")
def stored():
    with np.load(Path(__file__).with_name("radiomics_reference.npz")) as file:
        return {name: file[name] for name in file.files}


@pytest.mark.parametrize("dims", [2, 3])
def test_the_distance_of_the_packages_features_is_the_packages(stored, dims):
    reference, generated = (torch.from_numpy(stored[f"{name}_{dims}d"]).double() for name in SETS)
    assert radiomic_distance(generated, reference) == pytest.approx(float(stored[f"frd_{dims}d"]), rel=1e-4)


@pytest.mark.parametrize("dims", [2, 3])
def test_features_and_distance_of_images_are_the_packages_or_the_way_to_install_it_is_told(stored, dims):
    if importlib.util.find_spec("radiomics") is None:
        with pytest.raises(InputError, match="pip install --no-build-isolation --no-deps pyradiomics==3.0.1"):
            build_features("radiomics", spatial_dims=dims)
        return
    network, found = build_features("radiomics", spatial_dims=dims), []
    order = [name.replace("original_", "", 1) for name in network.names]
    for name in SETS:
        images = torch.from_numpy(np.stack(images_of(name, dims))[:, None]).float() / 127.5 - 1
        found.append(network(images))
        expected = dict(zip(stored[f"names_{dims}d"], stored[f"{name}_{dims}d"].T, strict=True))
        for column, key in zip(found[-1].T, order, strict=True):
            if key in expected:
                np.testing.assert_allclose(column, expected[key], rtol=1e-3, atol=1e-3, err_msg=key)
    assert network.num_features == len(expected)
    value = radiomic_distance(found[1], found[0])
    assert value == pytest.approx(float(stored[f"frd_{dims}d"]), rel=1e-4)


def test_a_missing_library_is_told_with_the_way_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "radiomics.featureextractor", None)
    monkeypatch.setitem(sys.modules, "radiomics", None)
    said = r"pyradiomics, which cannot be imported \(.*radiomics.*\); its build .* `pip install setuptools"
    with pytest.raises(InputError, match=said):
        build_features("radiomics", spatial_dims=2)


def test_a_library_below_pyradiomics_that_is_missing_is_named(monkeypatch):
    def broken(name):
        raise ModuleNotFoundError("No module named 'six'")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(InputError, match=r"cannot be imported \(No module named 'six'\)"):
        import_library("radiomics.featureextractor")


def test_what_pyradiomics_logs_of_every_image_reaches_no_handler(caplog):
    names = ("radiomics", "radiomics.featureextractor", "radiomics.imageoperations")
    before = logging.getLogger("radiomics").level
    try:
        mute_library()
        with caplog.at_level(logging.INFO):
            for name in names:
                logging.getLogger(name).info("Computing glcm")
                logging.getLogger(name).warning("Image too small")
    finally:
        logging.getLogger("radiomics").setLevel(before)
    assert not caplog.records


def test_equal_sets_are_at_minus_infinity_and_a_shift_of_all_features_adds_its_square():
    """Two deviations in each of 5 features, covariances equal: log(5 * 4)."""
    x = torch.randn(40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert radiomic_distance(x, x) < math.log(1e-9)
    moved = x + 2 * x.float().std(0, correction=0).double()
    assert radiomic_distance(moved, x) == pytest.approx(math.log(20), rel=1e-5)


def test_an_image_without_features_takes_no_part_and_n_says_so():
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = x + 1
    y[3, 2] = math.nan
    scores = compare_sets(FeatureSets(y, x, [str(i) for i in range(12)]), "radiomics", KERNEL, seed=0)
    assert list(scores) == ["frd"]
    assert (scores["frd"]["n"], scores["frd"]["n_reference"]) == (11, 12) and math.isfinite(
        scores["frd"]["value"]
    )


def test_real_images_that_are_all_equal_leave_no_feature_to_compare():
    x = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert math.isnan(radiomic_distance(x, x[:1].expand(4, -1)))


def test_images_whose_features_cannot_be_taken_are_counted_in_a_line():
    """Where there are none left, the distance is missing, and only this line says why."""
    x = torch.zeros(12, 5, dtype=torch.float64)
    y = x.clone()
    y[3:, 2] = math.nan
    lines = warn_incomplete(Measured({}, {"random_conv": {"real": x}, "radiomics": {"real": x}}, {}, {}))
    assert lines == []
    features = {"radiomics": {"generated": torch.full_like(x, math.nan), "real": y}}
    (line,) = warn_incomplete(Measured({}, features, {}, {}))
    assert line.startswith("frd: 12 of 12 generated images and 9 of 12 real images take no part: ")


def test_fewer_images_than_radiomic_features_are_said_to_be_singular():
    """There is no kernel distance beside this one that could be read."""
    networks = {"frd": {"num_features": 464, "estimator": ESTIMATORS["frd"]}}
    (line,) = warn_small({"generated": {"frd": {"n": 42, "n_reference": 42}}}, networks)
    assert line.startswith("frd: n = 42 is below the 464 features") and line.endswith("only at equal n")


def test_volumes_of_several_voxel_sizes_are_not_taken_for_one():
    assert common_spacing([Spaced(1, 1, 2), Spaced(1, 1, 2)]) == [1, 1, 2]
    assert common_spacing([Spaced(), Spaced()]) is None
    with pytest.raises(InputError, match="one voxel size"):
        build_features(
            "radiomics", spatial_dims=3, spacing=common_spacing([Spaced(1, 1, 2), Spaced(1, 1, 3)])
        )
