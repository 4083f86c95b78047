"""The 3D grid: what goes in comes out again, whatever the source's axes."""

import nibabel
import numpy as np
import pytest
from scipy import ndimage

from medldm.data.case import Case
from medldm.data.preparation.recipe import make_recipe, recipe_of
from medldm.data.preparation.volume_transforms import prepare_volume, restore_volume
from medldm.data.preparation.volumes import prepare_case
from medldm.data.raw.grids import body_axis
from medldm.errors import InputError
from tests.data.conftest import settings

SHAPE = (20, 24, 18)
CODES = ("RAS", "LPS", "LAS", "PIR", "SAL", "IPR")


def recipe(image_size=None, **changes):
    return make_recipe(3, image_size, settings(**changes)["preprocess"])


def affine_of(code: str, spacing=(1.0, 1.5, 2.5), angle: float = 0.0) -> np.ndarray:
    """An affine whose voxel axes run along `code`, oblique by `angle` radians about z."""
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt(code), nibabel.orientations.axcodes2ornt("RAS")
    )
    matrix = nibabel.orientations.inv_ornt_aff(
        nibabel.orientations.ornt_transform(nibabel.orientations.axcodes2ornt("RAS"), turn), SHAPE
    )[:3, :3]
    c, s = np.cos(angle), np.sin(angle)
    affine = np.eye(4)
    affine[:3, :3] = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ matrix @ np.diag(spacing)
    affine[:3, 3] = (-31, 12.5, 7)
    assert "".join(nibabel.aff2axcodes(affine)) == code
    return affine


def blob(seed: int = 0) -> np.ndarray:
    """A smooth object in the middle of an empty volume, raw values 0..1000."""
    x = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 2)
    x = (x - x.min()) / (x.max() - x.min()) * 950 + 50
    x[:3] = x[-4:] = x[:, :5] = x[:, -2:] = x[..., :2] = x[..., -3:] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("angle", [0.0, 0.2])
@pytest.mark.parametrize("orientation", ["SPL", "RAI"])
def test_restoring_undoes_turning_cropping_and_padding_exactly(code, angle, orientation):
    raw, affine = blob(), affine_of(code, angle=angle)
    rule = recipe(
        [24, 32, 16], orientation=orientation, crop_foreground=True,
        intensity={"mode": "volume_percentile", "percentiles": [0, 100]},
    )  # fmt: skip
    volume = prepare_volume(raw, None, affine, rule)
    assert "".join(nibabel.aff2axcodes(volume.affine)) == orientation
    assert volume.image.shape == (1, 24, 32, 16)
    restored, back = restore_volume(volume.image, volume.record())
    np.testing.assert_array_equal(back, affine)
    kept = np.zeros_like(raw, bool)
    centre = restore_volume(np.ones_like(volume.image), volume.record())[0] > 0.999 * raw.max()  # the box
    kept[centre] = True
    assert kept.sum() > 0.5 * (raw > 0).sum()
    np.testing.assert_allclose(restored[kept], raw[kept], atol=1e-3)
    assert (restored[~kept] == raw.min()).all()


@pytest.mark.parametrize("code", ["RAS", "PIR"])
@pytest.mark.parametrize("region", ["volume", "box"])
def test_axes_without_a_size_are_padded_about_the_centre_to_their_least(code, region):
    raw, affine = blob(), affine_of(code)
    intensity = {"mode": "volume_percentile", "percentiles": [0, 100], "region": region}
    rule = recipe([None, 16, None], divisible_by=4, min_size=[30, 99, None], intensity=intensity)
    volume = prepare_volume(raw, (raw > 400).astype(np.uint8), affine, rule)
    plain = prepare_volume(raw, None, affine, recipe([None, 16, None], divisible_by=1, intensity=intensity))
    depth, width = plain.image.shape[1], plain.image.shape[3]
    assert volume.image.shape == volume.mask.shape == (1, 32, 16, -(-width // 4) * 4)
    before = (30 - depth) // 2 + 1  # half of what is missing, then half of the multiple's two
    assert (volume.image[0, :before] == -1).all() and not volume.mask[0, :before].any()
    assert volume.box[0][0] == -before
    restored, back = restore_volume(volume.image, volume.record())
    expected, _ = restore_volume(plain.image, plain.record())
    np.testing.assert_array_equal(back, affine)
    np.testing.assert_allclose(restored, expected, atol=1e-3)


@pytest.mark.parametrize("code", ["RAS", "PIR"])
@pytest.mark.parametrize(
    "change", [{"spacing": 1.2}, {"in_plane_size": 40}, {"in_plane_size": 40, "interpolation": "bspline"}]
)
def test_restoring_a_resampled_volume_is_right_within_interpolation(code, change):
    raw, affine = blob(), affine_of(code, angle=0.1)
    raw = ndimage.gaussian_filter(raw, 1.5)
    rule = recipe(intensity={"mode": "volume_percentile", "percentiles": [0, 100]}, **change)
    volume = prepare_volume(raw, None, affine, rule)
    restored, _ = restore_volume(volume.image, volume.record())
    error = restored - raw
    assert np.abs(error).mean() < 0.01 * np.ptp(raw) and np.abs(error).max() < 0.12 * np.ptp(raw)
    if "in_plane_size" in change:
        assert volume.image.shape[2:] == (40, 40)


@pytest.mark.parametrize("factor", [2, 3])
def test_a_grid_of_whole_fractions_of_the_voxel_is_restored_in_place(factor):
    """Every source voxel is a prepared one then, but not its neighbour's neighbour."""
    raw = blob()
    rule = recipe(
        spacing=[2.0 / factor] * 3,
        orientation="RAS",
        intensity={"mode": "window", "window": [0, 1001]},
        divisible_by=1,
    )
    volume = prepare_volume(raw, None, np.diag([2.0, 2.0, 2.0, 1.0]), rule)
    np.testing.assert_allclose(restore_volume(volume.image, volume.record())[0], raw, atol=0.01)


def test_a_resampled_volume_keeps_its_place_in_the_scanner():
    """The centre of mass in mm, before and after: an affine half a voxel off would show."""
    axes, affine = np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), affine_of("LAS")
    raw = 1000 * np.exp(-sum((x - m) ** 2 / 12 for x, m in zip(axes, (9.3, 12.1, 8.2), strict=True)))

    def centre(x, affine):
        return nibabel.affines.apply_affine(affine, ndimage.center_of_mass(x - x.min()))

    for change in ({"spacing": [2.0, 1.0, 1.0]}, {"in_plane_size": 64}, {"in_plane_size": 16}):
        rule = recipe(intensity={"mode": "window", "window": [0, 1001]}, **change)
        volume = prepare_volume(raw.astype(np.float32), None, affine, rule)
        np.testing.assert_allclose(centre(volume.image[0], volume.affine), centre(raw, affine), atol=0.02)


def test_the_default_puts_axial_slices_first_and_upright():
    raw, affine = np.zeros(SHAPE, np.float32), affine_of("RAS")
    raw[2, 20, 15] = 1000  # on the left, in front, high
    volume = prepare_volume(raw, None, affine, recipe(divisible_by=1))
    assert volume.image.shape == (1, 18, 24, 20)
    place = np.unravel_index(volume.image.argmax(), volume.image.shape)[1:]
    assert place == (15, 24 - 1 - 20, 20 - 1 - 2)  # rows run to the back: front is up
    np.testing.assert_allclose(volume.spacing, (2.5, 1.5, 1.0))
    assert body_axis("SPL") == 0 and body_axis("RAI") == 2 and body_axis("ASL") == 1


def test_percentiles_of_the_box_are_taken_after_cropping_and_may_stay_unclipped():
    """ALDM: background exactly -1, half a per cent of the voxels above 1."""
    raw = blob()
    intensity = {"mode": "volume_percentile", "percentiles": [0.5, 99.5], "region": "box", "clip": False}
    volume = prepare_volume(
        raw, None, affine_of("RAS"), recipe([32] * 3, crop_foreground=True, intensity=intensity)
    )
    assert volume.image.min() == -1 and volume.image[0, 0, 0, 0] == -1
    assert 0.004 < (volume.image > 1).mean() < 0.006
    raw_box = restore_volume(volume.image, volume.record())[0]
    np.testing.assert_allclose(raw_box[raw > 0], raw[raw > 0], rtol=1e-4, atol=1e-2)


def test_the_foreground_file_decides_the_box_of_every_modality():
    first, second = blob(0), blob(1)
    second[:10] = 0
    rule = recipe(crop_foreground=True, divisible_by=1)
    alone = prepare_volume(second, None, affine_of("RAS"), rule)
    common = [prepare_volume(x, None, affine_of("RAS"), rule, foreground=first) for x in (first, second)]
    np.testing.assert_array_equal(common[0].affine, common[1].affine)
    assert common[0].image.shape == common[1].image.shape != alone.image.shape


@pytest.mark.parametrize("background", [-1.7, 0.0])
@pytest.mark.parametrize("above", [None, "background"])
@pytest.mark.parametrize("region", ["volume", "box"])
def test_z_scored_volumes_are_cropped_and_their_background_stays_background(background, above, region):
    """Background below all values, or 0 in the midst of them, as programs write it."""
    brain = np.zeros((40, 40, 40), bool)
    brain[8:30, 10:34, 6:26] = True
    values = np.random.default_rng(0).normal(size=brain.shape).clip(-1.6, 3)
    raw = np.where(brain, values, background).astype(np.float32)
    intensity = {"mode": "volume_percentile", "percentiles": [0.5, 99.5], "region": region}
    rule = recipe(
        [24] * 3, crop_foreground=True, foreground_above=above, intensity=intensity, orientation="RAS"
    )
    volume = prepare_volume(raw, brain.astype(np.uint8), np.eye(4), rule)
    assert volume.mask.sum() == brain.sum() and volume.box == ([7, 10, 4], [31, 34, 28])
    assert (volume.image[volume.mask == 0] == -1).all()
    assert volume.image[volume.mask == 1].max() > 0.9 and np.median(volume.image[volume.mask == 1]) > -0.8


@pytest.mark.parametrize(
    "intensity",
    [{"mode": "volume_percentile"}, {"mode": "window", "window": [-1000, 1000]}, {"mode": "bit_depth"}],
)
def test_the_labels_decide_the_box_of_a_map_without_an_image(tmp_path, intensity):
    labels = np.zeros((30, 28, 26), np.uint8)
    labels[4:20, 6:22, 8:16] = 1
    labels[10:12, 10:12, 10:12] = 2
    image = nibabel.Nifti1Image(labels, np.diag([-1.0, -1.0, 1.0, 1.0]))  # x to the left, y to the back
    image.to_filename(tmp_path / "map.nii.gz")
    case = Case("map", "map", {"mask": str(tmp_path / "map.nii.gz")})
    volume = prepare_case(case, recipe(crop_foreground=True, intensity=intensity))
    assert np.array_equal(volume.mask[0], labels[4:20, 6:22, 8:16].transpose(2, 1, 0))
    assert volume.box == ([8, 6, 4], [16, 22, 20])


def test_artifacts_outside_the_patient_become_air():
    x = np.full((60, 60, 40), -1000, np.float32)
    x[15:45, 15:45] = 40
    x[28:32, 55:57, 5:15] = 300  # a piece of the table
    image = prepare_volume(
        x, None, affine_of("RAS"),
        recipe(remove_artifacts=True, intensity={"mode": "window", "window": [-1000, 1000]}),
    ).image  # fmt: skip
    assert image.max() < 0.1 and (image > 0).sum() == 30 * 30 * 40


def test_an_open_axis_keeps_its_length():
    volume = prepare_volume(blob(), None, affine_of("RAS"), recipe([None, 16, 16], divisible_by=4))
    assert volume.image.shape == (1, 20, 16, 16)


@pytest.mark.parametrize(
    ("size", "change", "message"),
    [
        (None, {"orientation": "SSL"}, "orientation=SSL"),
        (None, {"interpolation": "cubic"}, "interpolation=cubic"),
        (None, {"mask_grid": "any"}, "mask_grid=any"),
        ([4, 32, 32], {}, "image_size"),
        ([32, 32], {}, "image_size"),
        (None, {"min_size": [32, 32]}, "preprocess.min_size"),
        (None, {"foreground_above": "zero"}, "foreground_above=zero"),
    ],
)
def test_settings_that_make_no_sense_are_input_errors(size, change, message):
    with pytest.raises(InputError, match=message):
        recipe(size, **change)


def test_the_recipe_comes_back_from_the_index():
    rule = recipe([None, 16, 16], spacing=2.0, intensity={"mode": "window", "window": [-1000, 1000]})
    assert recipe_of({"preprocess": rule.as_dict()}) == rule
