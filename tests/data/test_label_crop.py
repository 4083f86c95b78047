"""Slices cut to the square about their labels."""

import numpy as np
import pytest

from medldm.data.case import Case
from medldm.data.hdf5 import open_hdf5
from medldm.data.preparation.slices import cut_box, label_box
from medldm.data.prepared import load_index
from medldm.data.raw.readers import read_image
from medldm.errors import InputError
from tests.data.test_prepare import prepare

CASE = Case("a", "a", {"image": "a.png"})


def test_the_box_is_square_in_millimetres_about_the_labels_of_all_slices():
    classes = np.zeros((2, 40, 60), np.uint8)
    classes[0, 10:18, 20:24] = 1
    classes[1, 12:14, 24:30] = 2  # together rows 10..17, columns 20..29
    assert label_box(classes, (2.0, 1.0), 0.0, CASE) == ((10, 18), (17, 33))  # 16 mm x 16 mm
    assert label_box(classes, (2.0, 1.0), 0.25, CASE) == ((8, 20), (13, 37))  # 24 mm x 24 mm


def test_what_lies_beyond_the_slice_is_filled():
    x = np.arange(12.0).reshape(1, 3, 4)
    got = cut_box(x, ((-1, 2), (3, 6)), -5.0)
    assert got.tolist() == [[[-5, -5, -5], [3, -5, -5], [7, -5, -5]]]


def test_a_slice_without_labels_is_named():
    with pytest.raises(InputError, match=r"a\.png: nothing is labelled.*crop_label_margin=null"):
        label_box(np.zeros((1, 4, 4), np.uint8), (1, 1), 0.1, CASE)


def test_a_cropped_heart_fills_the_picture(raw_mnms2, tmp_path):
    whole, cropped = (
        prepare(raw_mnms2, tmp_path / "whole"),
        prepare(raw_mnms2, tmp_path / "cropped", crop_label_margin=0.1),
    )
    for case in load_index(whole)["cases"]:
        before, after = (open_hdf5(root / case["file"]).read("semantic_maps") for root in (whole, cropped))
        assert (after > 0).mean() > 2 * (before > 0).mean()
        assert set(np.unique(after)) == set(np.unique(before))
        assert not after[:, [0, -1]].any() and not after[:, :, [0, -1]].any()
    raw = read_image(raw_mnms2 / "dataset/001/001_SA_ED.nii.gz")
    assert open_hdf5(cropped / "cases/001.h5").read("spacing").min() < raw.spacing[0]


def test_a_negative_margin_is_refused(raw_mnms2, tmp_path):
    with pytest.raises(InputError, match="crop_label_margin=-1"):
        prepare(raw_mnms2, tmp_path / "out", crop_label_margin=-1)
