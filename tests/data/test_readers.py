"""Raw files with quirks: read rightly, or refused in one line that names the file and the mend."""

import gzip
import struct

import cv2
import nibabel
import numpy as np
import pytest
from PIL import Image as Picture

from medldm.data.hdf5 import open_hdf5
from medldm.data.loading.dataset import CaseDataset, Item
from medldm.data.preparation.casts import exact, finite, within
from medldm.data.preparation.labels import Labels, as_classes
from medldm.data.preparation.prepare import prepare_dataset
from medldm.data.prepared import load_index
from medldm.data.raw.readers import read_image, read_mask
from medldm.errors import InputError
from tests.data.conftest import settings

AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
AFFINE[:3, 3] = 5, 6, 7
ARRAY = np.arange(60, dtype=np.float32).reshape(3, 4, 5)
SFORM, QFORM, PIXDIM, UNITS = 254, 252, 80, 123  # places in the header of a NIfTI file


def write_header(path, *changes, array=ARRAY, packed=True) -> None:
    """A NIfTI file of `array` with both forms stated, and (place, format, values...) written over."""
    image = nibabel.Nifti1Image(array, AFFINE)
    image.set_qform(AFFINE, 1)
    data = bytearray(image.to_bytes())
    for place, form, *values in changes:
        struct.pack_into(form, data, place, *values)
    path.write_bytes(gzip.compress(bytes(data)) if packed else bytes(data))


EMPTY_SFORM = (280, "<12f", *[0] * 12)
NO_SIZE = (PIXDIM, "<3f", 0, 0, 0)
NO_FORM = ((SFORM, "<h", 0), (QFORM, "<h", 0))


@pytest.mark.parametrize(
    "changes, affine, said",
    [
        ((), AFFINE, ""),
        ((EMPTY_SFORM,), AFFINE, "its sform is empty; its qform is used"),
        ((NO_SIZE,), AFFINE, ""),  # the sform has sizes of its own
        (NO_FORM, None, "does not say how it lies"),
        (
            ((UNITS, "<b", 3),),
            np.diag([1e-3, 1e-3, 1e-3, 1]) @ AFFINE,
            "micrometres; they are converted to mm",
        ),
    ],
)
def test_a_header_places_voxels_by_what_is_valid_in_it(tmp_path, caplog, changes, affine, said):
    write_header(tmp_path / "a.nii.gz", *changes)
    image = read_image(tmp_path / "a.nii.gz")
    affine = nibabel.load(tmp_path / "a.nii.gz").affine if affine is None else affine
    np.testing.assert_allclose(image.affine, affine, atol=1e-6)
    np.testing.assert_allclose(image.spacing, np.linalg.norm(affine[:3, :3], axis=0), rtol=1e-6)
    assert said in caplog.text and (said or not caplog.text)


COLOURS = np.zeros((3, 4, 5), [("R", "u1"), ("G", "u1"), ("B", "u1")])


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ((EMPTY_SFORM, (QFORM, "<h", 0)), {}, "sform of no use, voxel sizes 2 x 3 x 4"),
        ((*NO_FORM, NO_SIZE), {}, "no size and place .*voxel sizes 0 x 0 x 0"),
        ((EMPTY_SFORM, NO_SIZE), {}, "voxel sizes 0 x 0 x 0"),
        ((), {"packed": False}, "is not compressed; rename it to '.*a.nii'"),
        ((), {"array": COLOURS}, "holds colours"),
        (None, {}, "not a complete NIfTI file"),
    ],
)
def test_a_nifti_file_that_says_too_little_is_refused(tmp_path, changes, options, message):
    if changes is None:
        (tmp_path / "a.nii.gz").touch()
    else:
        write_header(tmp_path / "a.nii.gz", *changes, **options)
    with pytest.raises(InputError, match=f"a.nii.gz: .*{message}") as error:
        read_image(tmp_path / "a.nii.gz")
    assert "\n" not in str(error.value)


def test_complex_numbers_become_magnitudes_with_a_word(tmp_path, caplog):
    write_header(tmp_path / "a.nii.gz", array=(ARRAY * np.exp(1j)).astype(np.complex64))
    np.testing.assert_allclose(read_image(tmp_path / "a.nii.gz").array, ARRAY, rtol=1e-5)
    assert "a.nii.gz: holds complex numbers; their magnitude is taken" in caplog.text


@pytest.mark.parametrize("shape", [(16, 20, 3), (16, 20, 4), (16, 20, 1), (2, 16, 20, 3)])
def test_colours_of_a_numpy_array_are_not_slices(tmp_path, shape):
    np.save(tmp_path / "a.npy", np.zeros(shape, np.uint8))
    with pytest.raises(InputError, match=r"a.npy: .*\(H, W\)"):
        read_image(tmp_path / "a.npy")


# ---- pictures ----


def write_stack(path):
    cv2.imwritemulti(str(path), [np.full((8, 9), k, np.uint16) for k in range(3)])


def write_jpeg(path):
    cv2.imwrite(str(path), np.eye(16, dtype=np.uint8) * 255)


def write_jpeg_as_png(path):
    path.write_bytes(cv2.imencode(".jpg", np.eye(16, dtype=np.uint8))[1].tobytes() + b"IEND")


def grey_palette(path):
    picture = Picture.fromarray(np.eye(16, dtype=np.uint8), "P")
    picture.putpalette([0, 0, 0, 255, 255, 255])
    picture.save(path)


@pytest.mark.parametrize(
    "name, write, message",
    [
        ("a.tif", write_stack, "holds 3 pages"),
        ("a.jpg", write_jpeg, "JPEG changes class numbers; save the mask as PNG"),
        ("a.png", write_jpeg_as_png, "JPEG changes class numbers"),
        ("a.png", grey_palette, "its palette gives other grey levels than its numbers"),
    ],
)
def test_a_picture_that_is_no_class_map_is_refused(tmp_path, name, write, message):
    write(tmp_path / name)
    with pytest.raises(InputError, match=f"{name}: {message}"):
        read_mask(tmp_path / name)


def test_the_numbers_of_a_palette_are_the_classes(tmp_path):
    classes = np.arange(256, dtype=np.uint8).reshape(16, 16) % 5
    picture = Picture.fromarray(classes, "P")
    picture.putpalette([0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0, 0, 0, 128])
    picture.save(tmp_path / "voc.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "voc.png").array, classes)
    assert read_image(tmp_path / "voc.png").array.max() > 4  # an image is what it looks like


# ---- numbers ----


@pytest.mark.parametrize("numbers", [[0, 3, 256], [0, 1000, 65535]])
@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_class_numbers_survive_preparation_and_batches(tmp_path, numbers, spatial_dims):
    """256 was 0 in 2D; beside an 8-bit map of its batch a 16-bit one was cut as well."""
    mask = np.random.default_rng(0).choice(numbers, (16, 16, 8)).astype(np.int32)
    small = np.minimum(mask, 1)
    for name, array in (("a", small), ("b", mask), ("c", small)):
        for folder in ("images", "masks"):
            (tmp_path / "raw" / folder).mkdir(parents=True, exist_ok=True)
            path = tmp_path / "raw" / folder / f"{name}.nii.gz"
            nibabel.save(nibabel.Nifti1Image(array, np.diag([-1.0, -1, 1, 1])), path)
    names = {"names": max(numbers) + 1, "mapping": None}
    options = settings(edges=None, labels=names) | {"spatial_dims": spatial_dims}
    options["image_size"] = (16, 16) if spatial_dims == 2 else None
    root = prepare_dataset(dataset="folder", raw=tmp_path / "raw", root=tmp_path / "out", **options)
    index = load_index(root)
    stored = open_hdf5(root / "cases/b.h5").read("semantic_maps" if spatial_dims == 2 else "mask")
    np.testing.assert_array_equal(np.unique(stored), numbers)
    assert index["cases"][1]["classes"] == numbers
    items = [Item(case, 0, -1, -1, -1, 0.5) for case in (0, 1, 2)]
    batch = CaseDataset(root, index, items, keys=("mask",)).__getitems__([0, 1, 2])
    assert batch["mask"][1].numpy().max() == numbers[-1]


def test_casts_change_no_value_or_say_which():
    np.testing.assert_array_equal(as_classes(np.array([0.0, 255]), "a"), np.array([0, 255], np.uint8))
    assert as_classes(np.array([0, 256]), "a").dtype == np.uint16
    for bad in ([-1, 0], [0, 65536], [0.5], [np.nan]):
        with pytest.raises(InputError, match="a: values from .* do not fit uint"):
            as_classes(np.array(bad), "a")
    with pytest.raises(InputError, match="label: .*40000 do not fit int16"):
        exact(np.array([40000]), np.int16, "label")
    assert within(np.array([3.0, -2.5], np.float32), "float16", "a").tolist() == [3.0, -2.5]
    with pytest.raises(InputError, match="a: values up to 70000 do not fit float16"):
        within(np.float32([70000]), "float16", "a")


def test_numbers_beyond_float32_are_counted(caplog):
    assert finite(np.array([1.0, 1e300]), "a").tolist() == [1, 1]
    assert "a: 1 values are not finite in float32" in caplog.text


@pytest.mark.parametrize(
    "values, message",
    [
        ([0, 1, np.nan], "holds 1 values that are no numbers"),
        ([0, 0.5], "whole class numbers"),
        ([0, -1], "label -1"),
        ([0, 70000], "label 70000"),
    ],
)
def test_labels_that_are_no_classes_are_refused(values, message):
    with pytest.raises(InputError, match=f"a.nii.gz: .*{message}"):
        Labels()(np.array(values), "a.nii.gz")


def test_labels_are_rounded_where_they_are_whole_but_for_their_slope():
    assert Labels()(np.float32([0, 0.9999, 2.0001]), "a").tolist() == [0, 1, 2]
    with pytest.raises(InputError, match="labels.mapping: -1 is no class"):
        Labels(mapping={0: 0, 1: -1})


def test_a_sform_that_disagrees_with_its_qform_is_told(tmp_path, caplog):
    """A registration that wrote the sform alone, say. Rounding of the quaternion is no disagreement."""
    image = nibabel.Nifti1Image(ARRAY, AFFINE)
    moved = AFFINE.copy()
    moved[0, 3] += 12
    image.set_qform(moved, 1)
    nibabel.save(image, tmp_path / "moved.nii.gz")
    np.testing.assert_allclose(read_image(tmp_path / "moved.nii.gz").affine, AFFINE)
    (line,) = caplog.messages
    assert "moved.nii.gz: its sform and qform disagree by up to 12 mm; the sform is used" in line
    caplog.clear()
    turn = np.deg2rad(33)
    oblique = AFFINE.copy()
    oblique[:2, :2] = 2 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    image = nibabel.Nifti1Image(ARRAY, oblique)
    image.set_qform(oblique, 1)
    nibabel.save(image, tmp_path / "oblique.nii.gz")
    read_image(tmp_path / "oblique.nii.gz")
    assert not caplog.messages


CORNERS = np.array([[10, 60, 110, 160], [20, 70, 120, 170], [30, 80, 130, 180]], np.uint8)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_their_exif_says(tmp_path, orientation, suffix):
    """As Pillow turns them, which follows the EXIF standard; cells are as large as JPEG's blocks."""
    from PIL import ImageOps

    stored = Picture.fromarray(np.kron(CORNERS, np.ones((16, 16), np.uint8)))
    exif = stored.getexif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    stored.save(path, exif=exif, **({} if suffix == ".png" else {"quality": 100}))
    with Picture.open(path) as picture:
        seen = np.asarray(ImageOps.exif_transpose(picture))
    got = read_image(path).array
    assert got.shape == seen.shape
    assert np.abs(got.astype(int) - seen).max() <= 1
    if suffix == ".png":
        np.testing.assert_array_equal(read_mask(path).array, seen)


def test_colours_that_become_grey_are_told_once_for_a_folder(tmp_path):
    (tmp_path / "raw" / "images").mkdir(parents=True)
    grey = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    colours = np.stack([grey, grey // 2, grey], -1)
    for name, picture in {"a": grey, "b": np.stack([grey] * 3, -1), "c": colours, "d": colours}.items():
        cv2.imwrite(str(tmp_path / "raw" / "images" / f"{name}.png"), picture)
    arguments = {"dataset": "folder", "raw": tmp_path / "raw", "root": tmp_path / "out"} | settings(
        edges=None
    )
    for _ in range(2):  # files that were kept tell it too
        notes = load_index(prepare_dataset(**arguments))["inventory"]["notes"]
        assert [note for note in notes if "colours" in note] == [
            "2 pictures hold colours, such as c; they were made grey by their luminance (ITU-R BT.601)"
        ]


def test_images_of_one_value_are_told(tmp_path):
    (tmp_path / "raw" / "images").mkdir(parents=True)
    varied = np.random.default_rng(0).integers(0, 255, (32, 32), np.uint8)
    for name, picture in {"a": varied, "b": np.full((32, 32), 90, np.uint8)}.items():
        cv2.imwrite(str(tmp_path / "raw" / "images" / f"{name}.png"), picture)
    arguments = {"dataset": "folder", "raw": tmp_path / "raw", "root": tmp_path / "out"}
    for _ in range(2):  # files that were kept tell it too
        notes = load_index(prepare_dataset(**arguments, **settings(edges=None)))["inventory"]["notes"]
        assert any(
            note.startswith("1 of 2 cases have one value throughout") and "b;" in note for note in notes
        )


def test_a_damaged_meta_image_is_told_in_our_line_alone(tmp_path, capfd):
    """MetaIO writes lines of its own to stderr."""
    simple_itk = pytest.importorskip("SimpleITK")
    image = simple_itk.GetImageFromArray(np.zeros((5, 6, 7), np.int16))
    for name, is_packed in (("raw.mha", False), ("packed.mha", True)):
        simple_itk.WriteImage(image, str(tmp_path / name), is_packed)
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-9])
        with pytest.raises(InputError, match=f"{name}: not a complete MetaImage"):
            read_image(tmp_path / name)
    assert capfd.readouterr().err == ""
