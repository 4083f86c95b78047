"""Images of other programs: brought to their reference, or refused in one line; never dropped or guessed."""

import json

import cv2
import h5py
import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform
from scipy.ndimage import gaussian_filter
from tests.data.conftest import settings

from medldm.commands import evaluate
from medldm.data.preparation.recipe import make_recipe
from medldm.data.preparation.volume_transforms import prepare_volume
from medldm.errors import InputError
from medldm.evaluation.foreign import Reading
from medldm.evaluation.pairs import make_pairs
from medldm.evaluation.run import read_inputs
from medldm.evaluation.stored import load

SHAPE = (14, 18, 12)
AFFINE = np.array([[-1.5, 0, 0, 20], [0, 1.5, 0, -31], [0, 0, 2.0, 7], [0, 0, 0, 1]])  # LAS
HU = {"mode": "window", "window": [-1000, 1000]}
RECIPES = {
    "moved": {"intensity": HU, "crop_foreground": True, "divisible_by": 8},
    "resampled": {"intensity": HU, "spacing": [2.0, 2.0, 2.0]},
    "squared": {"intensity": HU, "in_plane_size": 16, "interpolation": "bspline"},
    "percentiles": {"crop_foreground": True},
    "box": {
        "intensity": {"mode": "volume_percentile", "region": "box", "clip": False},
        "spacing": [2.0, 2.0, 2.0],
        "crop_foreground": True,
    },
}


def raw_volume(seed: int) -> np.ndarray:
    """CT-like: air of -1024 around an object of -200 to 1400."""
    x = gaussian_filter(np.random.default_rng(seed).normal(size=SHAPE), 1.5)
    x = (x - x.min()) / np.ptp(x) * 1600 - 200
    x[:2] = x[-3:] = x[:, :3] = x[:, -2:] = x[..., :2] = x[..., -1:] = -1024
    return np.rint(x).astype(np.int16)


def prepare(root, recipe, volumes: dict[str, np.ndarray], body: np.ndarray | None = None) -> None:
    (root / "cases").mkdir(parents=True)
    cases = []
    for name, raw in volumes.items():
        volume = prepare_volume(raw.astype(np.float32), None, AFFINE, recipe, body=body)
        with h5py.File(root / "cases" / f"{name}.h5", "w") as file:
            file["image"] = volume.image.astype(recipe.dtype)
            if volume.body is not None:
                file["body"] = volume.body
                file["body"].attrs["outside"] = volume.outside
            file.attrs.update({key: np.asarray(value) for key, value in volume.record().items()})
            file.attrs["spatial_dims"] = 3
        cases.append({"id": name, "subject": name, "file": f"cases/{name}.h5"} | volume.record())
    index = {"schema_version": 1, "dataset": "folder", "spatial_dims": 3, "num_classes": 2, "cases": cases}
    index |= {"preprocess": recipe.as_dict(), "image_channels": 1}
    (root / "index.json").write_text(json.dumps(index))


@pytest.fixture(params=RECIPES)
def prepared(request, tmp_path):
    """Two real volumes, prepared by one of the recipes."""
    recipe = make_recipe(3, None, settings(**RECIPES[request.param])["preprocess"])
    volumes = {f"v{i}": raw_volume(i) for i in range(2)}
    root = tmp_path / request.param
    prepare(root / "data", recipe, volumes)
    return root, volumes


def save(folder, volumes: dict, affine=AFFINE, code: str | None = None) -> None:
    """As NIfTI, turned to the axes of `code`."""
    folder.mkdir(exist_ok=True)
    for name, array in volumes.items():
        image = nibabel.Nifti1Image(array, affine)
        if code:
            turn = ornt_transform(io_orientation(image.affine), axcodes2ornt(code))
            image = image.as_reoriented(turn)
        image.to_filename(folder / f"{name}.nii.gz")


def largest_errors(root, **reading) -> list[float]:
    pairs = make_pairs(root / "made", root / "data", None, Reading(**reading))
    images = [(load(pair.real).clip(-1, 1), load(pair.generated[0]).clip(-1, 1)) for pair in pairs]
    return [float(np.abs(real - made).max()) for real, made in images]


def unit(raw: np.ndarray, root, name: str) -> np.ndarray:
    low, high = h5py.File(root / "data" / "cases" / f"{name}.h5").attrs["intensity_range"]
    return ((raw.astype(np.float64) - low) / (high - low)).clip(0, 1).astype(np.float32)


# ---- volumes: the real ones, handed in as generated ----


@pytest.mark.parametrize("code", ["RAS", "LPS", "SPL", "PIR"])
def test_real_volumes_are_themselves_in_any_orientation(prepared, code):
    root, volumes = prepared
    save(root / "made", volumes, code=code)
    assert largest_errors(root) == [0, 0]


def test_real_volumes_are_themselves_in_any_range(prepared):
    root, volumes = prepared
    units = {name: unit(raw, root, name) for name, raw in volumes.items()}
    for scale, shift in ((1, 0), (2, -1), (255, 0)):
        save(root / "made", {name: x * scale + shift for name, x in units.items()}, code="RAS")
        errors = largest_errors(root, generated_range=[shift, scale + shift])
        assert max(errors) < 0.05, (scale, shift)  # a range that clips before interpolation
        assert max(errors) < 2e-3 or "box" in str(root)
    save(root / "made", units)
    assert largest_errors(root) == largest_errors(root, generated_range="unit")


def make_real(root):
    return make_pairs(root / "data", root / "data", None)[0].real


def test_mirrored_volumes_are_not_the_real_ones(prepared):
    root, volumes = prepared
    save(root / "made", {name: raw[::-1] for name, raw in volumes.items()})
    assert min(largest_errors(root)) > 0.5


def test_a_crop_of_the_source_grid_is_enough_where_the_rest_is_background(prepared):
    """A spline rings into the background, so there a crop is refused."""
    root, volumes = prepared
    affine = AFFINE.copy()
    affine[:3, 3] = AFFINE[:3] @ [1, 1, 1, 1]
    save(root / "made", {name: raw[1:-1, 1:-1, 1:] for name, raw in volumes.items()}, affine)
    if "squared" in str(root):
        with pytest.raises(InputError, match="has no voxels for"):
            largest_errors(root)
    else:
        assert max(largest_errors(root)) < 2e-3
    affine[:3, 3] = AFFINE[:3] @ [6, 0, 0, 1]
    save(root / "made", {name: raw[6:] for name, raw in volumes.items()}, affine)
    with pytest.raises(InputError, match=r"v0.nii.gz: has no voxels for .*% of its reference"):
        largest_errors(root)


def test_the_prepared_grid_itself_is_accepted_in_any_axes(prepared):
    root, _ = prepared
    cases = {name: h5py.File(root / "data" / "cases" / f"{name}.h5") for name in ("v0", "v1")}
    arrays = {name: file["image"][0].astype(np.float32) for name, file in cases.items()}
    for name, array in arrays.items():
        save(root / "made", {name: array}, cases[name].attrs["affine"], code="LPS")
    assert max(largest_errors(root, generated_range="symmetric")) == 0


def test_another_grid_is_refused_and_taken_as_it_lies_on_request(prepared):
    root, _ = prepared
    shape = make_real(root).shape[1:]
    arrays = {name: load(make_real(root))[0].clip(-1, 1) for name in ("v0", "v1")}
    save(root / "made", arrays, np.diag([1.1, 1.1, 1.1, 1]))
    with pytest.raises(InputError, match=r"v0.nii.gz: lies on another grid than its reference \("):
        largest_errors(root)
    reading = {"grid": "array", "generated_range": "symmetric"}
    assert largest_errors(root, **reading)[0] < 1 and largest_errors(root, **reading)[1] > 0.1
    save(root / "made", {name: np.zeros([n + 1 for n in shape], np.float32) for name in arrays})
    with pytest.raises(InputError, match=r"has shape .* and its reference"):
        largest_errors(root, **reading)


def test_what_cleaning_took_from_the_reference_is_taken_from_the_same_image_of_others_too(tmp_path):
    recipe = make_recipe(
        3, None, settings(intensity=HU, spacing=[2.0, 2.0, 2.0], remove_artifacts=True)["preprocess"]
    )
    raw = np.full((24, 40, 12), -1024, np.int16)
    raw[6:18, 3:15, 2:10] = np.random.default_rng(0).integers(-100, 1400, (12, 12, 8))  # a patient
    raw[4:20, 37:] = 1000  # on a table
    prepare(tmp_path / "data", recipe, {"v0": raw})
    save(tmp_path / "made", {"v0": raw}, code="RAS")
    real = load(make_real(tmp_path))
    assert real.max() > 0.5 and real[:, :, :6].max() == -1  # of the 30 voxels of 2 mm, the table is the last
    assert largest_errors(tmp_path)[0] < 2e-3


@pytest.mark.parametrize("spacing", [None, [2.0, 2.0, 2.0]])
def test_what_was_emptied_outside_the_body_of_the_reference_is_emptied_in_others_too(tmp_path, spacing):
    options = settings(intensity=HU, spacing=spacing, mask_out=True)["preprocess"]
    raw = np.random.default_rng(0).integers(-900, 900, SHAPE).astype(np.int16)
    body = np.zeros(SHAPE, np.uint8)
    body[3:10, 4:12, 2:9] = 1
    prepare(tmp_path / "data", make_recipe(3, None, options), {"v0": raw}, body)
    for code in ("RAS", "SPL"):
        save(tmp_path / "made", {"v0": raw}, code=code)
        assert largest_errors(tmp_path)[0] < 2e-3
    assert not any("body mask" in note for note in notes_on(tmp_path))
    prepare(tmp_path / "old" / "data", make_recipe(3, None, options), {"v0": raw})  # without the body
    save(tmp_path / "old" / "made", {"v0": raw})
    assert any("1 of 1 references do not hold the body mask" in note for note in notes_on(tmp_path / "old"))


@pytest.mark.parametrize("place", ["samples", "data/cases"])
def test_files_that_a_mac_left_beside_the_others_are_none_of_them(call, folders, place):
    (folders / place / "._001.h5").write_bytes(b"\x00\x05\x16\x07")
    paths = (f"generated={folders}/samples", f"reference={folders}/data", f"output={folders}/evaluation")
    quick = ("metrics.features=[]", "metrics.lpips=null", "metrics.image=[psnr]", "metrics.baselines=[]")
    status, out, err = call(evaluate, *paths, *quick, "paths.weights=null")
    assert status == 0, err
    results = json.loads((folders / "evaluation" / "metrics.json").read_text())
    assert results["n"]["images"] == 24


# ---- range ----


@pytest.fixture
def hounsfield(tmp_path):
    recipe = make_recipe(3, None, settings(intensity=HU)["preprocess"])
    prepare(tmp_path / "data", recipe, {f"v{i}": raw_volume(i) for i in range(2)})
    return tmp_path


@pytest.mark.parametrize(
    ("low", "high", "decided"),
    [
        (0.0, 1.0, "[0, 1] (by their extremes)"),
        (-1.0, 1.0, "[-1, 1] (by their extremes)"),
        (0.0, 255.0, "[0, 255] (by their extremes)"),
        (-1024.0, 3000.0, "in the units of the reference (by their extremes)"),
        (-3.0, 4.0, None),
        (0.0, 12.0, None),
        (-1.2, 1.1, None),
        (0.0, 0.0, None),
    ],
)
def test_auto_says_what_it_decided_or_refuses(hounsfield, low, high, decided):
    ramp = np.linspace(low, high, int(np.prod(SHAPE)), dtype=np.float32).reshape(SHAPE)
    save(hounsfield / "made", {"v0": ramp, "v1": ramp})
    reading = Reading()
    if decided is None:
        with pytest.raises(InputError, match="fit no range that is known; set generated_range to unit, sym"):
            make_pairs(hounsfield / "made", hounsfield / "data", None, reading)
        return
    make_pairs(hounsfield / "made", hounsfield / "data", None, reading)
    assert any(line.startswith("generated ") and line.endswith(decided) for line in reading.notes)


def test_values_that_may_be_bytes_or_raw_are_refused(tmp_path):
    """An MR whose own units end near 255."""
    recipe = make_recipe(3, None, settings()["preprocess"])
    raw = ((raw_volume(0).clip(-200) + 200) / 8).astype(np.int16)
    prepare(tmp_path / "data", recipe, {"v0": raw})
    save(tmp_path / "made", {"v0": raw})
    with pytest.raises(InputError, match=r"may be \[0,255\] or raw; set generated_range to"):
        largest_errors(tmp_path)
    assert largest_errors(tmp_path, generated_range="raw") == [0]
    assert largest_errors(tmp_path, generated_range=[0, 255]) != [0]


@pytest.mark.parametrize("stated", ["bytes", [1, 0], [1], None, 3])
def test_a_range_that_makes_no_sense_is_named(stated):
    with pytest.raises(InputError, match=r"generated_range=.*choose auto, unit, symmetric, raw or \[low"):
        Reading(generated_range=stated)


def test_images_of_medldm_need_no_range(hounsfield):
    with pytest.raises(InputError, match=r"generated_range=unit: .* was written by medldm"):
        make_pairs(hounsfield / "data", hounsfield / "data", None, Reading(generated_range="unit"))


def test_hdf5_of_others_is_read_by_its_range_too(hounsfield):
    (hounsfield / "made").mkdir()
    real = [load(pair.real) for pair in make_pairs(hounsfield / "data", hounsfield / "data", None)]
    for i, image in enumerate(real):
        with h5py.File(hounsfield / "made" / f"v{i}.h5", "w") as file:
            file["images"], file.attrs["spatial_dims"] = (image + 1) * 127.5, 3
    assert max(largest_errors(hounsfield)) < 1e-6


def test_volumes_of_a_plain_folder_share_the_units_of_their_reference(tmp_path):
    """Each scaled by its own percentiles would hide a wrong contrast."""
    volumes = {f"v{i}": raw_volume(i) for i in range(2)}
    save(tmp_path / "data", volumes)
    save(tmp_path / "made", volumes, code="SPL")
    assert largest_errors(tmp_path) == [0, 0]
    save(tmp_path / "made", {name: raw // 2 for name, raw in volumes.items()}, code="SPL")
    assert min(largest_errors(tmp_path)) > 0.3


# ---- pictures ----


def write_pictures(folder, arrays: dict) -> None:
    folder.mkdir(exist_ok=True, parents=True)
    for name, array in arrays.items():
        path = folder / name
        np.save(path, array) if path.suffix == ".npy" else cv2.imwrite(str(path), array)


def grey(seed: int, dtype=np.uint8, top: int = 255) -> np.ndarray:
    x = gaussian_filter(np.random.default_rng(seed).random((24, 24)), 2)
    return np.rint((x - x.min()) / np.ptp(x) * top).astype(dtype)


def pictures(root, made: dict, **reading) -> list[float]:
    write_pictures(root / "data", {f"p{i}.png": grey(i) for i in range(3)})
    write_pictures(root / "made", made)
    return largest_errors(root, **reading)


def test_equal_pictures_of_any_type_are_equal(tmp_path):
    assert pictures(tmp_path / "a", {f"p{i}.png": grey(i) for i in range(3)}) == [0, 0, 0]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("png16", lambda i: (f"p{i}.png", grey(i).astype(np.uint16) * 257)),
        ("rgb", lambda i: (f"p{i}.png", np.repeat(grey(i)[..., None], 3, -1))),
        ("npy01", lambda i: (f"p{i}.npy", grey(i) / 255)),
        ("npy11", lambda i: (f"p{i}.npy", grey(i) / 127.5 - 1)),
        ("npy255", lambda i: (f"p{i}.npy", grey(i).astype(np.float32))),
        ("npy8", lambda i: (f"p{i}.npy", grey(i))),
        ("tiff", lambda i: (f"p{i}.tif", grey(i))),
    ],
)
def test_equal_pictures_are_equal_whatever_their_type(tmp_path, name, make):
    (tmp_path / name).mkdir()
    assert max(pictures(tmp_path / name, dict(make(i) for i in range(3)))) < 1e-6


def test_the_depth_of_dark_16_bit_pictures_is_asked_for(tmp_path):
    made = {f"p{i}.png": grey(i, np.uint16, 4095) for i in range(3)}
    with pytest.raises(InputError, match=r"16 bits with values up to 4095: .*generated_range=\[0,4095\]"):
        pictures(tmp_path, made)
    assert max(largest_errors(tmp_path, generated_range=[0, 4095])) < 0.01


def test_all_unusable_files_are_listed(tmp_path):
    made = {f"p{i}.npy": grey(i) / 255 for i in range(3)}
    made["p1.npy"][3, 3] = np.nan
    made["p2.npy"] = np.zeros((4, 4, 4, 4))
    with pytest.raises(InputError) as error:
        pictures(tmp_path, made)
    message = str(error.value)
    assert "2 of 3 files cannot be used" in message and "\n" not in message
    assert (
        "p1.npy: holds values that are not finite" in message
        and "p2.npy: holds float64 of shape (4, 4, 4, 4)" in message
    )


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ({"p0.png": grey(0)[:20]}, "p0.png: has shape (20, 24) and its reference (24, 24)"),
        ({"q0.png": grey(0)}, "no image has a name in common"),
        ({"p0.png": grey(0), "p9.png": grey(0)}, "'p9' has no image of that name"),
        ({"p0.png": grey(0), "p0.tif": grey(0)}, "two images are named p0"),
        ({"p0.png": grey(0), "p1.png": grey(0).astype(np.uint16)}, "pictures of 8 and 16 bits"),
        ({}, "holds no images that fit"),
    ],
)
def test_folders_that_do_not_fit_are_told(tmp_path, made, said):
    with pytest.raises(InputError) as error:
        pictures(tmp_path, made)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_every_name_without_a_real_image_is_listed(tmp_path):
    with pytest.raises(InputError, match=r"'q0' has no image .* \(2 of 3 missing: q0, q1\)"):
        pictures(tmp_path, {"p0.png": grey(0), "q0.png": grey(1), "q1.png": grey(2)})


def test_a_file_that_was_cut_off_is_named_among_many(tmp_path):
    for folder in ("data", "made"):
        (tmp_path / folder).mkdir()
        for i in range(12):
            cv2.imwrite(str(tmp_path / folder / f"p{i}.png"), grey(i))
    for i in (3, 7):
        path = tmp_path / "made" / f"p{i}.png"
        path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(InputError) as error:
        make_pairs(tmp_path / "made", tmp_path / "data", None, Reading())
    said = str(error.value)
    assert "2 of 12 files cannot be used" in said and "p3.png" in said and "p7.png" in said


def test_faults_of_both_folders_are_told_at_once(tmp_path):
    write_pictures(tmp_path / "data", {f"p{i}.png": grey(i) for i in range(5)})
    write_pictures(tmp_path / "made", {f"p{i}.png": grey(i) for i in (0, 1, 2, 3, 9)})
    for name in ("made/p1.png", "data/p2.png", "data/p4.png"):  # p4 is not asked for
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:40])
    for fault in ("generated", "reference"):
        with pytest.raises(InputError) as error:
            make_pairs(tmp_path / "made", tmp_path / "data", None, Reading())
        said = str(error.value)
        assert "\n" not in said and "p4.png" not in said
        assert ("made/p1.png: " in said) == (fault == "generated")
        assert "data/p2.png: " in said and "'p9' has no image of that name" in said
        cv2.imwrite(str(tmp_path / "made/p1.png"), grey(1))


def test_a_damaged_index_of_the_reference_does_not_hide_damaged_images(tmp_path):
    write_pictures(tmp_path / "made", {f"p{i}.png": grey(i) for i in range(3)})
    (tmp_path / "made" / "p1.png").write_bytes(b"no picture")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "index.json").write_text("{}")
    folders = dict.fromkeys(("reconstruction", "spade", "regression", "train", "output"))
    folders |= {"generated": tmp_path / "made", "reference": tmp_path / "data"}
    with pytest.raises(InputError) as error:
        read_inputs(folders, {"translation": False}, Reading())
    assert "index.json: " in str(error.value) and "made/p1.png: " in str(error.value)


def test_every_damaged_file_of_samples_is_named(tmp_path):
    for name in ("made", "data"):
        (tmp_path / name).mkdir()
        for i in range(4):
            with h5py.File(tmp_path / name / f"p{i}.h5", "w") as file:
                file["images"] = np.zeros((2, 24, 24), np.float32)
    for name in ("made/p1.h5", "made/p2.h5", "data/p3.h5"):
        (tmp_path / name).write_bytes(b"cut off")
    with pytest.raises(InputError) as error:
        make_pairs(tmp_path / "made", tmp_path / "data", None, Reading())
    said = str(error.value)
    assert "2 of 4 files cannot be used" in said
    assert all(name in said for name in ("made/p1.h5", "made/p2.h5", "data/p3.h5"))


def coloured(i: int, dtype=np.uint8) -> np.ndarray:
    """Blue, green and red of one luminance order and three scales."""
    top = np.iinfo(dtype).max
    return np.stack([grey(i, np.uint32, top) // part for part in (3, 2, 1)], -1).astype(dtype)


def notes_on(root, generated: str = "made", **reading) -> list[str]:
    reading = Reading(**reading)
    make_pairs(root / generated, root / "data", None, reading)
    return reading.notes


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_colours_that_become_grey_are_counted_and_said_once(tmp_path, dtype):
    scale = np.iinfo(dtype).max // 255
    write_pictures(tmp_path / "data", {f"p{i}.png": grey(i) for i in range(3)})
    same = np.repeat(grey(2)[..., None], 3, -1).astype(dtype) * scale
    made = {"p0.png": coloured(0, dtype), "p1.png": coloured(1, dtype), "p2.png": same}
    write_pictures(tmp_path / "made", made)
    said = [line for line in notes_on(tmp_path) if "hold colours" in line]
    assert len(said) == 1
    assert said[0].startswith(
        f"generated {tmp_path}/made: 2 of 3 images hold colours (p0.png, p1.png); taken"
    )
    write_pictures(tmp_path / "data", {"p2.png": coloured(2)})
    said = [line for line in notes_on(tmp_path) if "hold colours" in line]
    assert [line.split()[0] for line in said] == ["reference", "generated"]


def test_rounding_of_grey_stored_as_colours_is_no_colour(tmp_path):
    rng = np.random.default_rng(0)
    write_pictures(tmp_path / "data", {"p0.png": grey(0), "p1.png": grey(1)})
    near = grey(0)[..., None].clip(3, 252) + rng.integers(-1, 2, (24, 24, 3))
    write_pictures(tmp_path / "made", {"p0.png": near.astype(np.uint8)})
    write_pictures(tmp_path / "made", {"p1.jpg": np.repeat(grey(1)[..., None], 3, -1)})
    assert not any("hold colours" in line for line in notes_on(tmp_path))


def test_slices_of_volumes_in_colours_are_refused(hounsfield):
    shape = load(make_real(hounsfield)).shape[1:]
    slices = {
        f"v{i}_{k:03d}.png": np.zeros((*shape[1:], 3), np.uint8) for i in range(2) for k in range(shape[0])
    }
    write_pictures(hounsfield / "made", slices)
    make_pairs(hounsfield / "made", hounsfield / "data", None)
    slices["v0_000.png"][2, 2] = 0, 0, 255
    write_pictures(hounsfield / "made", slices)
    with pytest.raises(
        InputError, match=r"v0_000.png: slices of volumes are grey pictures, this holds colours"
    ):
        make_pairs(hounsfield / "made", hounsfield / "data", None)


def test_images_that_others_go_before_are_counted_and_said(tmp_path):
    """Pictures beside volumes, and what lies below them; in folders of samples as well."""
    volumes = {f"v{i}": raw_volume(i) for i in range(2)}
    for folder in ("data", "made"):
        save(tmp_path / folder, volumes)
    assert not any("images take no part" in line for line in notes_on(tmp_path))
    write_pictures(tmp_path / "made", {"v0.png": grey(0), "preview.jpg": grey(1)})
    write_pictures(tmp_path / "made" / "old", {"v0.png": grey(0)})
    save(tmp_path / "made" / "older", {"v1": raw_volume(3)})
    write_pictures(tmp_path / "data", {"v0.png": grey(0)})
    said = [line for line in notes_on(tmp_path) if "images take no part" in line]
    assert len(said) == 2
    assert (
        f"reference {tmp_path}/data: 1 images take no part (v0.png); HDF5 and volumes at the top" in said[0]
    )
    found = "4 images take no part (preview.jpg, v0.png, old/v0.png, ...)"
    assert f"generated {tmp_path}/made: {found}" in said[1]


def test_images_beside_folders_of_samples_are_counted_and_said(tmp_path):
    write_pictures(tmp_path / "data", {f"p{i}.png": grey(i) for i in range(2)})
    for k in (1, 2):
        write_pictures(tmp_path / "made" / f"sample_{k}", {f"p{i}.png": grey(i + k) for i in range(2)})
    assert not any("images take no part" in line for line in notes_on(tmp_path))
    write_pictures(tmp_path / "made", {"overview.png": grey(0)})
    said = [line for line in notes_on(tmp_path) if "images take no part" in line]
    assert len(said) == 1 and "1 images take no part (overview.png)" in said[0]


def test_the_command_says_what_it_decided_and_what_takes_no_part(call, tmp_path):
    write_pictures(tmp_path / "data", {f"p{i}.png": grey(i) for i in range(4)})
    write_pictures(
        tmp_path / "made", {f"p{i}.npy": grey(i) / 255 for i in range(3)} | {"p2.npy": grey(2) * 0.0}
    )
    arguments = [f"generated={tmp_path}/made", f"reference={tmp_path}/data", f"output={tmp_path}/out"]
    quick = (
        "metrics.bootstrap.num_resamples=20",
        "panel_rows=0",
        "metrics.features=[]",
        "metrics.lpips=null",
    )
    status, out, err = call(evaluate, *arguments, *quick)
    assert status == 0, err
    for said in (
        "values taken as [0, 1] (by their extremes)",
        "values taken as [0, 255] (by their type)",
        f"3 of the 4 images of {tmp_path}/data have a generated one",
        "1 generated images are constant: p2",
    ):
        assert said in out
    status, _, err = call(evaluate, *arguments, *quick, "generated_range=[3,2]")
    assert status == 2 and "generated_range=[3, 2]: choose auto" in err and len(err.splitlines()) == 1
