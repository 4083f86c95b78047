from dataclasses import replace

import cv2
import numpy as np
import pytest

from medldm.data.preparation.edges import EdgeDegrade, EdgeRecipe, detect_edges, label_contours
from medldm.data.records import read_images
from medldm.errors import InputError


@pytest.fixture(scope="module")
def slices(mnms2):
    return list(read_images(mnms2))


def by_hand(image):
    """The eight steps as the specification lists them."""
    grey = ((image - image.min()) * (255 / (image.max() - image.min()))).astype(np.uint8)
    enhanced = cv2.createCLAHE(1.5, (8, 8)).apply(cv2.bilateralFilter(grey, 11, 100, 100))
    mask = enhanced > 10
    median = np.median(enhanced[mask])
    return (cv2.Canny(enhanced, max(0, 0.62 * median), min(255, 1.38 * median)) * mask / 255).astype(np.uint8)


def test_default_recipe_is_the_published_one(slices):
    for record in slices[:4]:
        assert np.array_equal(detect_edges(record.image[0], EdgeRecipe()), by_hand(record.image[0]))


def test_edges_are_binary_and_absent_where_dark(slices):
    edges = np.stack([record.edges for record in slices])
    assert set(np.unique(edges)) == {0, 1}
    for record in slices[:4]:
        grey = ((record.image[0] + 1) * 127.5).astype(np.uint8)
        enhanced = cv2.createCLAHE(1.5, (8, 8)).apply(cv2.bilateralFilter(grey, 11, 100, 100))
        assert not record.edges[0][enhanced <= 8].any()


@pytest.mark.parametrize("value", [-1.0, 0.0, 7.0])
def test_constant_image_has_no_edges(value):
    assert not detect_edges(np.full((32, 32), value, np.float32), EdgeRecipe()).any()


def test_wholly_dark_image_has_no_edges():
    image = np.zeros((64, 64), np.float32)
    image[0, 0] = 1
    assert not detect_edges(image, EdgeRecipe(dark_threshold=255)).any()


def test_switches_change_the_edges(slices):
    image, mask = slices[3].image[0], slices[3].mask[0]
    plain = EdgeRecipe()(image, mask)
    long = EdgeRecipe(min_length=12)(image, mask)
    _, _, stats, _ = cv2.connectedComponentsWithStats(long, connectivity=8)
    assert (stats[1:, cv2.CC_STAT_AREA] >= 12).all() and (long <= plain).all() and long.sum() < plain.sum()
    assert np.array_equal(EdgeRecipe(source="labels")(image, mask), label_contours(mask))
    assert np.array_equal(EdgeRecipe(source="both")(image, mask), plain | label_contours(mask))
    changed = [{"l2_gradient": True}, {"thresholds": (20, 60)}, {"body_mask": True}, {"sigma": 0.2}]
    assert all(not np.array_equal(EdgeRecipe(**change)(image), plain) for change in changed)
    assert np.array_equal(EdgeRecipe(per_view={"LA": {"sigma": 0.2}}).for_view("SA")(image), plain)
    assert not np.array_equal(EdgeRecipe(per_view={"LA": {"sigma": 0.2}}).for_view("LA")(image), plain)


def test_unknown_edge_source_is_an_input_error():
    with pytest.raises(InputError, match="edges.source"):
        EdgeRecipe(source="sobel")


def test_degrade_at_level_zero_is_the_identity(slices):
    for seed, record in enumerate(slices):
        out = EdgeDegrade()(
            record.edges[0], 0.0, np.random.default_rng(seed), record.image[0], record.mask[0]
        )
        assert np.array_equal(out, record.edges[0])


def test_degrade_keeps_ever_fewer_of_the_true_edges(slices):
    degrade = EdgeDegrade()
    kept = []
    for level in (0, 0.25, 0.5, 0.75, 1.0):
        pairs = [
            (record.edges[0], degrade(record.edges[0], level, np.random.default_rng(seed), record.image[0]))
            for seed in range(4)
            for record in slices
        ]
        assert all(out.dtype == np.uint8 and out.max() <= 1 for _, out in pairs)
        kept.append((sum(out.sum() for _, out in pairs), sum((edges & out).sum() for edges, out in pairs)))
    counts, true_counts = zip(*kept, strict=True)
    assert all(a > b for a, b in zip(counts, counts[1:], strict=False))
    assert all(a > b for a, b in zip(true_counts, true_counts[1:], strict=False))


def test_degrade_is_a_function_of_its_generator(slices):
    record = slices[5]
    first, again, other = (
        EdgeDegrade()(record.edges[0], 0.7, np.random.default_rng(seed), record.image[0])
        for seed in (1, 1, 2)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)


def test_stored_levels_stand_in_for_the_detector(slices):
    recipe = EdgeRecipe(levels=({"blur": 1.0}, {"blur": 2.0, "min_length": 20}))
    record = slices[5]
    levels = recipe.pyramid(record.image[0])
    smooth = cv2.GaussianBlur(record.image[0], (0, 0), 2.0)
    assert levels.shape == (2, *record.edges[0].shape)
    assert np.array_equal(levels[1], detect_edges(smooth, EdgeRecipe(min_length=20)))
    alone = {name: 0 for name in ("full_drop_prob", "contours_only_prob", "drop_components", "num_gaps")}
    alone |= {
        "keep_longest_prob": 0,
        "simplify_epsilon": 0,
        "max_shift": 0,
        "num_strokes": 0,
        "morphology_prob": 0,
    }
    degrade = EdgeDegrade(redetect_prob=1, max_thickness=1, **alone)
    seen = {
        degrade(record.edges[0], 1.0, np.random.default_rng(seed), stored=levels).tobytes()
        for seed in range(12)
    }
    expected = {degrade.redraw(x, 0.0, np.random.default_rng(0)).tobytes() for x in levels}
    assert seen == expected
    fine = degrade(record.edges[0], 0.2, np.random.default_rng(3), stored=np.stack([levels[0]] * 2))
    assert fine.any() and np.array_equal(levels, recipe.pyramid(record.image[0]))  # left as they were


@pytest.mark.parametrize("levels", [({"sigmaa": 0.3},), ({},), ({"per_view": {}},), None, [1], {"blur": 1}])
def test_a_level_of_unknown_keys_is_an_input_error(levels):
    with pytest.raises(InputError, match="edges.levels"):
        EdgeRecipe(levels=levels)
    with pytest.raises(InputError, match="the same for every view"):
        EdgeRecipe(per_view={"SA": {"levels": [{"blur": 1.0}]}})


def test_degrade_can_leave_contours_or_nothing(slices):
    record, generator = slices[5], np.random.default_rng(0)
    nothing = EdgeDegrade(full_drop_prob=1)(record.edges[0], 1.0, generator)
    contours = EdgeDegrade(full_drop_prob=0, contours_only_prob=1)(
        record.edges[0], 1.0, generator, mask=record.mask[0]
    )
    assert not nothing.any() and np.array_equal(contours, label_contours(record.mask[0]))


REDETECTED = EdgeDegrade(redetect_prob=1, full_drop_prob=0, contours_only_prob=0)


def test_edges_are_detected_again_as_they_were_prepared(slices):
    """The detector is that of their view, and the contours are taken where they were taken before."""
    record = slices[5]
    image, mask = record.image[0], record.mask[0]
    recipe = EdgeRecipe(per_view={"LA": {"dark_threshold": 255}})
    plain, long_axis = (EdgeDegrade(recipe=recipe).for_view(view) for view in (None, "LA"))
    draw = np.random.default_rng
    assert plain.redetect(image, 0.2, draw(0)).any() and not long_axis.redetect(image, 0.2, draw(0)).any()
    both = EdgeDegrade(recipe=EdgeRecipe(source="both")).redetect(image, 0.2, draw(0), mask)
    assert np.array_equal(both, plain.redetect(image, 0.2, draw(0)) | label_contours(mask))


def test_contours_are_not_replaced_by_the_edges_of_the_image(slices):
    record = slices[5]
    degrade = replace(REDETECTED, recipe=EdgeRecipe(source="labels"))
    edges = label_contours(record.mask[0])
    with_image = degrade(edges, 0.01, np.random.default_rng(0), record.image[0], record.mask[0])
    assert np.array_equal(with_image, degrade(edges, 0.01, np.random.default_rng(0)))
