"""Where voxels lie: one orientation of 2D slices, maps on the grid of their image, pairs on one grid."""

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

from medldm.data import build_datamodule
from medldm.data.hdf5 import open_hdf5
from medldm.data.preparation.prepare import prepare_dataset
from medldm.data.prepared import load_index
from medldm.data.raw.grids import is_same_grid
from medldm.errors import InputError
from tests.data.conftest import settings

AFFINE = np.diag([1.0, 1.5, 2.0, 1.0])
AFFINE[:3, 3] = -10, -20, -30
SHAPE = (20, 16, 12)  # R, A, S


def head() -> tuple[np.ndarray, np.ndarray]:
    """(X, Y, Z) in RAS: an image that tells every direction apart, and a map of its brightest part."""
    x, y, z = np.indices(SHAPE)
    image = (100 + 4 * x + 30 * (y > 10) + 60 * (z > 8)).astype(np.int16)
    return image, ((x > 12) & (y > 10)).astype(np.uint8)


def stored(array, code, affine=AFFINE) -> nibabel.Nifti1Image:
    """The same volume with its axes in the order and direction of `code`."""
    image = nibabel.Nifti1Image(array, affine)
    return image.as_reoriented(ornt_transform(io_orientation(affine), axcodes2ornt(tuple(code))))


def write(path, image) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(image, path)


def prepare(raw, root, spatial_dims=2, **preprocess):
    size = (16, 24) if spatial_dims == 2 else None
    options = settings(**{"edges": None} | preprocess) | {"spatial_dims": spatial_dims, "image_size": size}
    return prepare_dataset(dataset="folder", raw=raw, root=root, **options)


def slices(root, name: str) -> tuple[np.ndarray, np.ndarray]:
    reader = open_hdf5(root / f"cases/{name}.h5")
    return np.asarray(reader.read("images"), np.float32), reader.read("semantic_maps")


# ---- 2D slices ----


@pytest.mark.parametrize("slice_axis, plane", [(2, "axial"), (1, "coronal"), (0, "sagittal")])
def test_slices_lie_alike_however_files_store_them(tmp_path, slice_axis, plane):
    image, mask = head()
    codes = ("RAS", "LPS", "LAS", "ASL", "SPR", "PIL")
    for code in codes:
        write(tmp_path / f"raw/images/{code}.nii.gz", stored(image, code))
        write(tmp_path / f"raw/masks/{code}.nii.gz", stored(mask, "RAS" if code == "LPS" else code))
    root = prepare(tmp_path / "raw", tmp_path / "out", slice_axis=slice_axis)
    first = slices(root, "RAS")
    for code in codes[1:]:
        for expected, found in zip(first, slices(root, code), strict=True):
            np.testing.assert_array_equal(found, expected)
    assert load_index(root)["cases"][0]["planes"] == [plane]


def test_slices_are_upright_as_radiologists_see_them(tmp_path):
    """Right is brighter, front is brighter, head is brighter: that is where they are looked for."""
    image, mask = head()
    write(tmp_path / "raw/images/a.nii.gz", stored(image, "RAS"))
    write(tmp_path / "raw/masks/a.nii.gz", stored(mask, "RAS"))
    expected = {  # (rows, columns, slices): whether values grow along them
        2: (False, False, True),  # axial: front above, right on the left side, from feet to head
        1: (False, False, True),  # coronal: head above, right on the left side, from back to front
        0: (False, False, False),  # sagittal: head above, front on the left side, from right to left
    }
    for slice_axis, grows in expected.items():
        root = prepare(tmp_path / "raw", tmp_path / f"out{slice_axis}", slice_axis=slice_axis)
        x, _ = slices(root, "a")
        ends = [(x[:, 0], x[:, -1]), (x[:, :, 0], x[:, :, -1]), (x[0], x[-1])]
        assert tuple(bool(b.mean() > a.mean()) for a, b in ends) == grows


def rotation(degrees: float, axis: int = 2) -> np.ndarray:
    c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
    i, j = [k for k in range(3) if k != axis]
    matrix = np.eye(4)
    matrix[i, i], matrix[i, j], matrix[j, i], matrix[j, j] = c, -s, s, c
    return matrix


def test_oblique_stacks_keep_their_acquired_slices_and_lie_alike(tmp_path):
    """A short-axis stack between all planes, stored as scanned and with its in-plane axes exchanged."""
    image, mask = head()
    affine = rotation(40) @ rotation(40, 0) @ np.diag([1, 1, 4, 1])
    for code in ("RAS", "ARS", "LPS", "SAR"):
        order = [("RL", "AP", "SI").index(next(p for p in ("RL", "AP", "SI") if c in p)) for c in code]
        flips = np.array([(order[i], 1 if c in "RAS" else -1) for i, c in enumerate(code)], float)
        inverse = np.array(
            [(np.flatnonzero(flips[:, 0] == i)[0], flips[flips[:, 0] == i][0, 1]) for i in range(3)]
        )
        for folder, array in (("images", image), ("masks", mask)):
            write(
                tmp_path / f"raw/{folder}/{code}.nii.gz",
                nibabel.Nifti1Image(array, affine).as_reoriented(inverse),
            )
    root = prepare(tmp_path / "raw", tmp_path / "out")
    first = slices(root, "RAS")
    assert len(first[0]) == SHAPE[2] and load_index(root)["cases"][0]["planes"] == ["oblique"]
    for code in ("ARS", "LPS", "SAR"):
        for expected, found in zip(first, slices(root, code), strict=True):
            np.testing.assert_array_equal(found, expected)


def test_stored_takes_slices_as_files_have_them(tmp_path):
    image, mask = head()
    for folder, array in (("images", image), ("masks", mask)):
        write(tmp_path / f"raw/{folder}/a.nii.gz", stored(array, "RAS"))
    body, as_stored = (
        prepare(tmp_path / "raw", tmp_path / name, slice_orientation=name) for name in ("body", "stored")
    )
    for upright, lying in zip(slices(body, "a"), slices(as_stored, "a"), strict=True):
        np.testing.assert_array_equal(lying[:, ::-1, ::-1], upright)
    hashes = {load_index(root)["preprocess_hash"] for root in (body, as_stored)}
    assert len(hashes) == 2


def test_a_single_slice_of_another_plane_is_refused(tmp_path):
    image, _ = head()
    write(tmp_path / "raw/images/a.nii.gz", nibabel.Nifti1Image(image[:, 5:6], AFFINE))
    with pytest.raises(
        InputError, match="a.nii.gz: is a single coronal slice, not axial; set .*slice_axis=1"
    ):
        prepare(tmp_path / "raw", tmp_path / "out")
    root = prepare(tmp_path / "raw", tmp_path / "out", slice_axis=1)
    assert load_index(root)["cases"][0]["num_slices"] == 1


def test_cutting_across_thick_slices_is_said(tmp_path, caplog):
    image, _ = head()
    write(tmp_path / "raw/images/a.nii.gz", nibabel.Nifti1Image(image, np.diag([4.0, 1, 1, 1])))
    prepare(tmp_path / "raw", tmp_path / "out")
    assert "acquired as sagittal slices 4 mm apart and cut across them" in caplog.text


# ---- maps ----


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_map_of_the_same_grid_is_turned_onto_its_image(tmp_path, spatial_dims):
    image, mask = head()
    for name, code in (("a", "RAS"), ("b", "PIR")):
        write(tmp_path / f"raw/images/{name}.nii.gz", stored(image, "RAS"))
        write(tmp_path / f"raw/masks/{name}.nii.gz", stored(mask, code))
    root = prepare(tmp_path / "raw", tmp_path / "out", spatial_dims)
    key = "semantic_maps" if spatial_dims == 2 else "mask"
    maps = [open_hdf5(root / f"cases/{name}.h5").read(key) for name in "ab"]
    assert maps[0].any()
    np.testing.assert_array_equal(*maps)


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize(
    "move, rule, message",
    [
        (345.0, "same", "lies on another grid than its image .345 mm apart.*mask_grid=resample"),
        (0.3, "same", "0.3 mm apart"),
        (345.0, "resample", "lies beside its image .no overlap, centres 345 mm apart"),
    ],
)
def test_a_map_that_lies_elsewhere_is_refused(tmp_path, spatial_dims, move, rule, message):
    image, mask = head()
    moved = AFFINE.copy()
    moved[2, 3] += move
    write(tmp_path / "raw/images/a.nii.gz", nibabel.Nifti1Image(image, AFFINE))
    write(tmp_path / "raw/masks/a.nii.gz", nibabel.Nifti1Image(mask, moved))
    with pytest.raises(InputError, match=f"masks/a.nii.gz: .*{message}"):
        prepare(tmp_path / "raw", tmp_path / "out", spatial_dims, mask_grid=rule)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_a_map_that_covers_a_part_is_brought_there_and_said(tmp_path, spatial_dims, caplog):
    image, mask = head()
    write(tmp_path / "raw/images/a.nii.gz", nibabel.Nifti1Image(image, AFFINE))
    write(tmp_path / "raw/masks/a.nii.gz", nibabel.Nifti1Image(mask, AFFINE).slicer[:, :, :6])
    root = prepare(tmp_path / "raw", tmp_path / "out", spatial_dims, mask_grid="resample")
    assert "masks/a.nii.gz: covers 50% of its image" in caplog.text
    found = open_hdf5(root / "cases/a.h5").read("semantic_maps" if spatial_dims == 2 else "mask")
    if spatial_dims == 2:
        assert found[:6].any(axis=(1, 2)).all() and not found[6:].any()
    else:
        assert found.sum() == mask[:, :, :6].sum()


def test_a_map_without_a_place_beside_an_image_with_one_is_refused(tmp_path):
    import cv2

    write(tmp_path / "raw/images/a.nii.gz", nibabel.Nifti1Image(np.ones((16, 16), np.int16), AFFINE))
    (tmp_path / "raw/masks").mkdir()
    cv2.imwrite(str(tmp_path / "raw/masks/a.png"), np.ones((16, 16), np.uint8))
    with pytest.raises(InputError, match="only one of image and map says"):
        prepare(tmp_path / "raw", tmp_path / "out")


def test_rounding_of_headers_is_no_other_grid():
    turned = rotation(17) @ rotation(31, 0) @ AFFINE
    header = nibabel.Nifti1Image(np.zeros(SHAPE, np.int8), turned).header
    header.set_qform(turned, 1)
    shape = (512, 512, 300)
    assert is_same_grid(shape, turned, shape, header.get_qform())
    assert is_same_grid(shape, turned, shape, turned.astype(np.float32))
    assert not is_same_grid(shape, turned, shape, turned @ np.diag([1.001, 1, 1, 1]))  # 0.5 mm at the far end
    assert not is_same_grid(shape, turned, (512, 300, 512), turned)


# ---- pairs ----


def write_pair(raw, second_affine, second=None) -> None:
    image, _ = head()
    rows = ["image,subject,label"]
    for subject in ("p0", "p1", "p2"):
        write(raw / f"{subject}_t1.nii.gz", nibabel.Nifti1Image(image, AFFINE))
        write(
            raw / f"{subject}_t2.nii.gz",
            nibabel.Nifti1Image(image if second is None else second, second_affine),
        )
        rows += [f"{subject}_{name}.nii.gz,{subject},{name}" for name in ("t1", "t2")]
    (raw / "manifest.csv").write_text("\n".join(rows) + "\n")


def setup_pairs(root):
    data = {"root": root, "batch_size": 1, "pairs": "all", "num_workers": 0}
    module = build_datamodule(data, keys=("image", "source"), seed=0)
    module.setup()
    return module


def moved(**changes) -> np.ndarray:
    affine = AFFINE.copy()
    affine[0, 3] += changes.get("by", 0)
    return affine @ np.diag([changes.get("scale", 1), 1, 1, 1])


@pytest.mark.parametrize("spatial_dims", [2, 3])
@pytest.mark.parametrize("second_affine", [moved(by=6), moved(scale=1.2), rotation(10) @ AFFINE])
def test_pairs_on_different_grids_are_refused(tmp_path, spatial_dims, second_affine):
    write_pair(tmp_path / "raw", second_affine)
    root = prepare(tmp_path / "raw", tmp_path / "out", spatial_dims)
    with pytest.raises(InputError, match="p[012].*t1.*t2.*are no pair.*ANTs, elastix"):
        setup_pairs(root)


@pytest.mark.parametrize("spatial_dims", [2, 3])
def test_pairs_of_one_grid_stored_in_two_ways_are_pairs(tmp_path, spatial_dims):
    image, _ = head()
    other = stored(image, "PSL")
    write_pair(tmp_path / "raw", other.affine, np.asarray(other.dataobj))
    module = setup_pairs(prepare(tmp_path / "raw", tmp_path / "out", spatial_dims))
    for batch in module.train_dataloader():
        np.testing.assert_array_equal(batch["image"], batch["source"])


def test_pairs_cut_to_boxes_of_their_own_are_refused(tmp_path):
    image, _ = head()
    x, y, z = np.indices(SHAPE)
    write_pair(tmp_path / "raw", AFFINE, image * (x > 6))
    root = prepare(tmp_path / "raw", tmp_path / "out", 3, crop_foreground=True)
    with pytest.raises(InputError, match="cropped to different boxes; name one file as `foreground`"):
        setup_pairs(root)


def test_slices_meet_the_slice_of_their_own_place(tmp_path):
    image, _ = head()
    write_pair(tmp_path / "raw", AFFINE)
    module = setup_pairs(prepare(tmp_path / "raw", tmp_path / "out"))
    dataset = module.dataset("train")
    assert len(dataset) == 2 * SHAPE[2] * len(module.subjects["train"])
    for i in range(len(dataset)):
        np.testing.assert_array_equal(dataset[i]["image"], dataset[i]["source"])
