"""Surface distances against MONAI, in mm and by hand, and as measures of whether an image obeys its map."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from medldm.evaluation.measure import measure_dice
from medldm.evaluation.pairs import Pair
from medldm.evaluation.screen import obeys_lines
from medldm.evaluation.tools import Segmenter, Tools
from medldm.metrics.surface import surface_distances

CASES = [((60, 50), None), ((40, 64), (0.7, 1.9)), ((18, 26, 22), None), ((16, 20, 24), (3.0, 0.8, 1.25))]


def blobs(shape, seed: int) -> np.ndarray:
    """Three classes in smooth patches."""
    field = gaussian_filter(np.random.default_rng(seed).normal(size=shape), 3)
    return np.digitize(field, np.quantile(field, [0.5, 0.75, 0.9]))


@pytest.mark.parametrize(("shape", "spacing"), CASES)
def test_surface_distances_equal_monai(shape, spacing):
    from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
    from monai.networks import one_hot

    first = blobs(shape, 0)
    maps = [first, np.roll(first, 3, axis=1)]
    found, wanted = (one_hot(torch.from_numpy(m)[None, None], 4) for m in maps)
    options = {"include_background": False, "spacing": spacing}
    hd95 = compute_hausdorff_distance(found, wanted, percentile=95, **options)[0]
    there = compute_average_surface_distance(found, wanted, symmetric=True, **options)[0]
    got = surface_distances(*maps, 4, spacing)
    assert got.hd95.tolist() == pytest.approx(hd95.tolist(), rel=1e-6)
    assert got.mean.tolist() == pytest.approx(there.tolist(), rel=1e-6)


def test_a_square_moved_along_an_axis_lies_at_its_shift_in_mm():
    found, wanted = np.zeros((2, 30, 30), int)
    found[5:15, 5:15], wanted[5:15, 9:19] = 1, 1
    got = surface_distances(found, wanted, 2, (1.0, 0.5))
    assert got.hd95.item() == pytest.approx(4 * 0.5) and 0 < got.mean.item() < 4 * 0.5
    assert surface_distances(found, found, 2).hd95.item() == 0


def test_a_class_that_one_map_lacks_counts_as_the_diagonal_and_one_that_both_lack_as_nothing():
    found, wanted = np.zeros((2, 4, 5), int)
    found[1:3, 1:3] = 1
    hd95, mean = surface_distances(found, wanted, 3, (1.0, 1.0))
    assert hd95[0] == mean[0] == 5.0 and np.isnan([hd95[1], mean[1]]).all()  # (4 - 1, 5 - 1): 5


def test_the_measures_are_between_those_of_real_images_and_of_a_swapped_map():
    """A segmenter that reads the map off the image: classes are grey levels."""
    maps = [blobs((24, 28, 26), seed)[None] for seed in (0, 1)]
    images = [torch.from_numpy(m / 1.5 - 1).float() for m in maps]
    segmenter = Segmenter(lambda x: ((x + 1) * 1.5).round().long(), ["a", "b", "c"])
    tools = Tools({}, recipe=None, segmenter=segmenter)
    attributes = {"spacing": np.array([2.0, 1.0, 1.0])}
    pairs = [
        Pair(str(i), str(i), image.numpy(), [image.numpy()], None, None, mask, None, attributes)
        for i, (image, mask) in enumerate(zip(images, maps, strict=True))
    ]
    exact = measure_dice(torch.stack(images), pairs, tools)
    swapped = measure_dice(torch.stack(images[::-1]), pairs, tools)
    assert exact["dice_mean"].tolist() == [1, 1] and exact["hd95_b"].tolist() == [0, 0]
    expected = surface_distances(maps[1][0], maps[0][0], 4, (2.0, 1.0, 1.0))
    assert swapped["hd95_c"][0] == expected.hd95[2] > 2
    assert swapped["surface_distance_mean"][0] == pytest.approx(expected.mean.mean())
    facts = {"n": 2, "num_subjects": 2, "same_as_generated": True}
    rows = {
        row: {n: {"mean": float(v.mean()), "ci95": None, "n": 2} for n, v in values.items()}
        for row, values in (("generated", swapped), ("shuffled", swapped), ("real", exact))
    }
    (lines,) = obeys_lines({"rows": rows, "cases": {"rows": {"generated": facts}}})
    assert [row[0] for row in lines.rows][:2] == ["dice_mean (higher)", "dice_a (higher)"]
    assert lines.rows[0][1] == "1.00" and "hd95_c (lower)" in [row[0] for row in lines.rows]
    assert len(lines.rows) == 3 * 4
