"""The 3D datasets through their readers: phantom -> prepare, and layouts that the phantoms do not write."""

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from medldm.commands import phantom, prepare
from medldm.data.datasets import (
    adni,
    autopet,
    brats,
    duke,
    ixi,
    lidc,
    mrnet,
    synthrad,
    totalsegmentator_mri,
)
from medldm.data.hdf5 import open_hdf5
from medldm.data.loading.datamodule import CaseDataModule
from medldm.data.prepared import load_index
from medldm.data.raw.readers import read_image
from medldm.data.records import read_images
from medldm.errors import InputError
from tests.helpers import compose_config

SIZE = (32, 32, 24)  # x, y, z
PLAIN = ("data.num_workers=0", "data.preprocess.min_size=null", "data.preprocess.in_plane_size=null")
GRID = {"brats": [32, 32, 32], "ixi": [32, 32, 32]}  # others: slices first


@pytest.fixture(scope="session")
def raw3d(tmp_path_factory):
    """name -> raw folder of three phantom subjects, drawn once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            options = (f"dataset={name}", f"root={made[name]}", "num_subjects=3", f"size={list(SIZE)}")
            phantom.task(compose_config("phantom", *options))
        return made[name]

    return get


def prepared(name: str, raw: Path, root: Path, *overrides: str) -> dict:
    size = f"data.image_size={GRID.get(name, [24, 32, 32])}"
    options = (f"data={name}", f"data.raw={raw}", f"data.root={root}", size, *PLAIN, *overrides)
    prepare.task(compose_config("prepare", *options))
    return load_index(root)


@pytest.mark.parametrize(
    ("name", "num_classes", "labels", "num_cases"),
    [
        ("autopet", 37, [], 3),
        ("synthrad", 31, ["mr"], 3),
        ("totalsegmentator_mri", 31, [], 3),
        ("duke", 3, [], 3),
        ("brats", 4, ["t1", "t1ce", "t2", "flair"], 12),
        ("ixi", None, ["t1", "t2", "pd"], 9),
    ],
)
def test_phantom_goes_through_the_dataset_s_own_reader(raw3d, tmp_path, name, num_classes, labels, num_cases):
    index = prepared(name, raw3d(name), tmp_path)
    assert (index["num_classes"], index["label_values"], len(index["cases"])) == (
        num_classes,
        labels,
        num_cases,
    )
    assert len({case["subject"] for case in index["cases"]}) == 3
    splits = json.loads((tmp_path / "splits.json").read_text())["default"]
    assert all(len(splits[subset]) == 1 for subset in ("train", "val", "test"))
    for record in read_images(tmp_path):
        assert record.image.std() > 0.1 and abs(record.image).max() <= 1
        assert num_classes is None or len(np.unique(record.mask)) > (1 if num_classes < 5 else 8)


def test_phantoms_are_functions_of_their_seed_and_differ(raw3d, tmp_path):
    options = ("dataset=brats", f"root={tmp_path}", "num_subjects=1", f"size={list(SIZE)}")
    phantom.task(compose_config("phantom", *options))
    name = "BraTS2021_00000/BraTS2021_00000_t2.nii.gz"
    assert (tmp_path / name).read_bytes() == (raw3d("brats") / name).read_bytes()
    other = raw3d("brats") / "BraTS2021_00001/BraTS2021_00001_t2.nii.gz"
    assert (tmp_path / name).read_bytes() != other.read_bytes()


def test_contrasts_are_functions_of_tissue(raw3d):
    """A voxel's T2 follows from its T1, T1ce and FLAIR by a lookup: translation can be learnt."""
    folder = raw3d("brats") / "BraTS2021_00000"
    images = [
        nibabel.load(folder / f"BraTS2021_00000_{key}.nii.gz").get_fdata() for key in ("t1", "flair", "t2")
    ]
    inside = images[0] > 0
    t1, flair, t2 = (x[inside] / x[inside].max() for x in images)
    bins = (t1 * 12).astype(int) * 20 + (flair * 12).astype(int)
    means = np.bincount(bins, t2) / np.maximum(np.bincount(bins), 1)
    assert ((t2 - means[bins]) ** 2).mean() < 0.25 * t2.var()


# ---- layouts ----


def copy_pair(image: Path, label: Path, root: Path, image_dir: str, label_dir: str, name: str) -> None:
    for source, folder in ((image, image_dir), (label, label_dir)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(source, root / folder / f"{name}.nii.gz")


@pytest.mark.parametrize(
    ("module", "folders", "names", "subjects"),
    [
        (autopet, ("ct", "label"), ["PETCT_0a_11_1", "PETCT_0a_12_3", "PETCT_0b_2_1"], 2),
        (synthrad, ("mr", "label"), ["1PA001_1", "1PA001_2", "1PC004_1"], 2),
        (totalsegmentator_mri, ("mr", "label"), ["s0001_1", "s0001_2", "s0002_1"], 2),
        (duke, ("final_labeled_mr", "final_label"), ["Breast_MRI_001_1", "Breast_MRI_001_4"], 1),
    ],
)
def test_med_lsdms_windows_belong_to_their_patients(raw3d, tmp_path, module, folders, names, subjects):
    folder = raw3d("duke")
    image, label = (next((folder / d).iterdir()) for d in ("final_labeled_mr", "final_label"))
    for name in names:
        copy_pair(image, label, tmp_path, *folders, name)
    cases = module.index(tmp_path)
    assert len(cases) == len(names) and len({case.subject for case in cases}) == subjects
    assert not any("split" in case.attributes for case in cases)
    if module is not duke:
        (tmp_path / "test").mkdir()
        for part in folders:
            shutil.copytree(tmp_path / part, tmp_path / "test" / part)
            shutil.rmtree(tmp_path / part)
        assert {case.attributes["split"] for case in module.index(tmp_path)} == {"test"}
    next(tmp_path.rglob(f"{folders[1]}/*")).unlink()
    with pytest.raises(InputError, match="missing, though"):
        module.index(tmp_path)


def save_nifti(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(array, np.eye(4) if affine is None else affine), path)


def touch(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


def test_brats_of_2018_and_2020_and_a_missing_modality(tmp_path):
    for key in brats.MODALITIES:
        touch(tmp_path / "MICCAI" / "HGG" / "BraTS20_001" / f"BraTS20_001_{key}.nii")
        if key != "t1":
            touch(tmp_path / "MICCAI" / "LGG" / "BraTS20_002" / f"BraTS20_002_{key}.nii.gz")
    cases = brats.index(tmp_path, ["t1", "flair"])
    assert [case.id for case in cases] == ["BraTS20_001_t1", "BraTS20_001_flair", "BraTS20_002_flair"]
    assert cases[1].paths["foreground"] == cases[0].paths["image"]
    assert cases[2].paths["foreground"] == cases[2].paths["image"]
    with pytest.raises(InputError, match="data.modalities"):
        brats.index(tmp_path, ["t1c"])


def test_splits_csv_is_kept_and_must_name_every_subject(raw3d, tmp_path):
    raw = Path(shutil.copytree(raw3d("brats"), tmp_path / "raw"))
    lines = ["id,split", "BraTS2021_00000,test", "BraTS2021_00001,train", "BraTS2021_00002,val"]
    (raw / "splits.csv").write_text("\n".join(lines))
    prepared("brats", raw, tmp_path / "out", "data.modalities=[t1]")
    split = json.loads((tmp_path / "out/splits.json").read_text())["default"]
    assert split == {"train": ["BraTS2021_00001"], "val": ["BraTS2021_00002"], "test": ["BraTS2021_00000"]}
    (raw / "splits.csv").write_text("\n".join(lines[:3]))
    with pytest.raises(InputError, match="BraTS2021_00002"):
        brats.index(raw)


def test_ixi_as_published_and_as_registered(raw3d, tmp_path):
    for name in ("T1", "T2"):
        touch(tmp_path / f"IXI-{name}" / f"IXI002-Guys-0828-{name}.nii.gz")
    cases = ixi.index(tmp_path)
    assert [case.id for case in cases] == ["IXI002-Guys-0828_t1", "IXI002-Guys-0828_t2"]
    assert {case.subject for case in cases} == {"IXI002-Guys-0828"} and "foreground" not in cases[0].paths
    registered = ixi.index(raw3d("ixi"))
    assert {case.attributes["split"] for case in registered} == {"train", "val", "test"}
    assert all(case.paths["foreground"].endswith("PD.nii.gz") for case in registered)


def save_array(path: Path, seed: int, shape=(20, 32, 32)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, shape).astype(np.uint8)
    np.save(path, values)


def test_mrnet_keeps_its_split_and_labels_and_arrays_their_axes(tmp_path):
    raw, exams = tmp_path / "raw", {"train": ["0000", "0001", "0002"], "valid": ["1130"]}
    for folder, names in exams.items():
        for name in names:
            save_array(raw / folder / "sagittal" / f"{name}.npy", int(name))
        (raw / f"{folder}-acl.csv").write_text("".join(f"{name},{int(name) % 2}\n" for name in names))
    cases = mrnet.index(raw)
    assert [(c.id, c.attributes["split"], c.attributes["label"]) for c in cases] == [
        ("0000", "train", "0"),
        ("0001", "train", "1"),
        ("0002", "train", "0"),
        ("1130", "val", "0"),
    ]
    options = (f"data.raw={raw}", f"data.root={tmp_path / 'out'}", "data.image_size=[24,32,32]")
    prepare.task(compose_config("prepare", "data=mrnet", "data.num_workers=0", *options))
    index = load_index(tmp_path / "out")
    assert index["label_values"] == ["0", "1"] and index["cases"][0]["spacing"] == [1, 1, 1]
    stored = np.load(raw / "train/sagittal/0000.npy").astype(np.float32)
    (record,) = read_images(tmp_path / "out", ids=["0000"])
    np.testing.assert_allclose(record.image[0, 2:22], stored / 127 - 1, atol=1e-3)  # padded by 2 at each end
    assert (record.image[0, :2] == -1).all() and (record.image[0, 22:] == -1).all()
    (raw / "train-acl.csv").write_text("0000,0\n0001,yes\n")
    with pytest.raises(InputError, match="train-acl.csv: line 2"):
        mrnet.index(raw)
    with pytest.raises(InputError, match="choose one plane"):
        mrnet.index(raw, ["oblique"])
    with pytest.raises(InputError, match="data.task=knee"):
        mrnet.index(raw, task="knee")


def test_a_cut_or_odd_array_is_named(tmp_path):
    save_array(tmp_path / "LIDC-IDRI-0001" / "a.npy", 0)
    save_array(tmp_path / "LIDC-IDRI-0001" / "b.npy", 1)
    save_array(tmp_path / "other.npy", 2, (4, 20, 32, 32))
    cases = lidc.index(tmp_path)
    assert [c.subject for c in cases] == ["LIDC-IDRI-0001", "LIDC-IDRI-0001", "other"]
    assert len({c.id for c in cases}) == 3
    with pytest.raises(InputError, match=r"other.npy: holds uint8 of shape \(4, 20, 32, 32\)"):
        read_image(cases[2].paths["image"])
    with open(tmp_path / "several.npy", "wb") as file:
        np.savez(file, a=np.zeros(3), b=np.zeros(4))
    with pytest.raises(InputError, match="several.npy: holds several arrays"):
        read_image(tmp_path / "several.npy")
    path = Path(cases[0].paths["image"])
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(InputError, match="a.npy: not a complete NumPy array"):
        read_image(path)


def test_visits_of_an_adni_subject_stay_together(tmp_path):
    touch(tmp_path / "002_S_0295" / "2006" / "ADNI_002_S_0295_MR_I1.nii")
    touch(tmp_path / "002_S_0295" / "2007" / "T1.nii.gz")
    touch(tmp_path / "011_S_0002" / "T1.nii.gz")
    cases = adni.index(tmp_path)
    assert [c.subject for c in cases] == ["002_S_0295", "002_S_0295", "011_S_0002"]
    assert len({c.id for c in cases}) == 3
    touch(tmp_path / "002_S_0295" / "2007" / "T1.nii")
    with pytest.raises(InputError, match="has the name '002_S_0295_2007_T1' like"):
        adni.index(tmp_path)
    touch(tmp_path / "stray.nii")
    with pytest.raises(InputError, match="stray.nii: neither its name nor its folders"):
        adni.index(tmp_path)


def test_totalsegmentators_organs_find_their_class():
    number = totalsegmentator_mri.class_of
    names = totalsegmentator_mri.CLASSES
    assert (
        number("kidney_left") == number("kidney") == 1 and number("aorta") == number("iliac_vena_left") == 2
    )
    assert number("vertebrae_L5") == 1 + names.index("vertebrae") and number("brain") is None
    assert number("lung_upper_lobe_left") == 1 + names.index("lung")


def test_all_modalities_of_a_subject_share_grid_and_side(raw3d, tmp_path):
    """Even where one of them is empty in places: the foreground of T1 decides."""
    raw = Path(shutil.copytree(raw3d("brats"), tmp_path / "raw"))
    half = next(raw.rglob("BraTS2021_00001_t2.nii.gz"))
    change(half, lambda a, m: (np.where(np.arange(len(a))[:, None, None] < 18, 0, a), m))
    index = prepared("brats", raw, tmp_path, "data.image_size=null")
    for subject in {case["subject"] for case in index["cases"]}:
        members = [case for case in index["cases"] if case["subject"] == subject]
        grids = {json.dumps([case["affine"], case["shape"]]) for case in members}
        assert len(members) == 4 and len(grids) == 1
    splits = json.loads((tmp_path / "splits.json").read_text())["default"]
    assert len(sum(splits.values(), [])) == len(set(sum(splits.values(), []))) == 3


@pytest.mark.parametrize("preset", ["brats_r1", "brats_r3"])
def test_published_presets_of_aldm_prepare(raw3d, tmp_path, preset):
    size = "data.image_size=null" if preset == "brats_r1" else "data.image_size=[32,32,32]"
    options = (
        f"data={preset}",
        f"data.raw={raw3d('brats')}",
        f"data.root={tmp_path}",
        size,
        "data.num_workers=0",
    )
    least = ["data.preprocess.min_size=[40,48,33]"] if preset == "brats_r1" else []
    prepare.task(compose_config("prepare", *options, *least, "data.modalities=[t1]"))
    index = load_index(tmp_path)
    assert index["orientation"] == ("RAI" if preset == "brats_r1" else "RAS")
    image = next(read_images(tmp_path)).image
    assert image.min() == -1 and image.max() > 1
    assert image.shape[1:] == ((48, 48, 48) if preset == "brats_r1" else (32, 32, 32))


def test_real_brains_and_shallow_scans_reach_the_box_that_training_cuts(raw3d, tmp_path):
    """The shipped presets unchanged: a brain smaller than ALDM's box, a CT of 20 slices for windows of 32."""
    save_nifti(tmp_path / "raw/ct/p0_0.nii.gz", np.zeros((64, 64, 20), np.float32))
    save_nifti(tmp_path / "raw/label/p0_0.nii.gz", np.zeros((64, 64, 20), np.uint8))
    presets = {"brats_r1": (raw3d("brats"), "data.modalities=[t1]"), "autopet": (tmp_path / "raw",)}
    for preset, (raw, *options) in presets.items():
        root = tmp_path / preset
        paths = (f"data.raw={raw}", f"data.root={root}", "data.num_workers=0")
        cfg = compose_config("prepare", f"data={preset}", *paths, *options)
        prepare.task(cfg)
        size = list(cfg.data.crop_size)
        assert all(case["shape"] == size for case in load_index(root)["cases"])
        data = CaseDataModule(root, batch_size=1, keys=["image"], crop_size=size)
        assert next(iter(data.train_dataloader()))["image"].shape == (1, 1, *size)


# ---- bad input ----


def change(path: Path, make) -> None:
    image = nibabel.load(path)
    array, affine = make(np.array(image.dataobj), image.affine.copy())
    nibabel.save(nibabel.Nifti1Image(array, affine), path)


def flipped(array, affine):
    affine[0, 0] *= -1
    return array, affine


@pytest.fixture
def duke_raw(raw3d, tmp_path):
    return Path(shutil.copytree(raw3d("duke"), tmp_path / "raw"))


@pytest.mark.parametrize(
    ("file", "make", "message"),
    [
        ("final_label", lambda a, m: (a + 5 * (a == 2).astype(a.dtype), m), "label 7"),
        ("final_label", lambda a, m: (a[:-2], m), "its shape is"),
        ("final_label", flipped, "mm apart"),
        ("final_labeled_mr", lambda a, m: (np.full(a.shape, np.nan, np.float32), m), "no finite value"),
        ("final_labeled_mr", lambda a, m: (a[..., None].repeat(2, -1), m), "no 3D volume"),
    ],
)
def test_bad_volumes_are_one_line_and_lose_nothing(duke_raw, tmp_path, file, make, message):
    change(duke_raw / file / "Breast_MRI_003_0.nii.gz", make)
    with pytest.raises(InputError, match=message) as error:
        prepared("duke", duke_raw, tmp_path / "out", "data.preprocess.mask_grid=same")
    assert "Breast_MRI_003_0.nii.gz" in str(error.value) and "\n" not in str(error.value)
    assert sorted(p.name[:14] for p in (tmp_path / "out/cases").iterdir()) == [
        "Breast_MRI_001",
        "Breast_MRI_002",
    ]


def test_a_map_on_another_grid_is_brought_to_its_image_or_trusted(duke_raw, tmp_path):
    label = duke_raw / "final_label" / "Breast_MRI_001_0.nii.gz"
    reference = prepared("duke", duke_raw, tmp_path / "a")
    mirrored = nibabel.load(label)
    turned = nibabel.as_closest_canonical(mirrored)  # the same map with its axes mirrored
    assert not np.allclose(turned.affine, mirrored.affine)
    nibabel.save(turned, label)
    prepared("duke", duke_raw, tmp_path / "b")
    first, second = (next(read_images(tmp_path / d)).mask for d in "ab")
    assert np.array_equal(first, second) and reference["num_classes"] == 3
    prepared("duke", duke_raw, tmp_path / "c", "data.preprocess.mask_grid=trust")
    assert not np.array_equal(next(read_images(tmp_path / "c")).mask, first)


def test_values_that_are_not_finite_are_counted_and_replaced(duke_raw, tmp_path, caplog):
    def spoil(array, affine):
        array = array.astype(np.float32)
        array[:3, 0, 0] = np.nan
        return array, affine

    change(duke_raw / "final_labeled_mr" / "Breast_MRI_001_0.nii.gz", spoil)
    prepared("duke", duke_raw, tmp_path / "out")
    assert "Breast_MRI_001_0.nii.gz: 3 values are not finite" in caplog.text


def test_options_that_a_dataset_lacks_are_input_errors(raw3d, tmp_path):
    with pytest.raises(InputError, match="data.modalities"):
        prepared("duke", raw3d("duke"), tmp_path, "data.modalities=[t1]")
    with pytest.raises(InputError, match="image_size"):
        options = ("dataset=brats", f"root={tmp_path}", "image_size=64")
        phantom.task(compose_config("phantom", *options))


def test_mask_out_leaves_the_body_alone(raw3d, tmp_path):
    plain = prepared("synthrad", raw3d("synthrad"), tmp_path / "a")
    prepared("synthrad", raw3d("synthrad"), tmp_path / "b", "data.preprocess.mask_out=true")
    first, second = (next(read_images(tmp_path / d)).image for d in "ab")
    outside = first[0, :, 0, 0]  # a corner of every slice is air, with noise
    assert outside.max() > -1 and (second[0, :, 0, 0] == -1).all() and plain["cases"][0]["shape"]
    assert np.mean(np.abs(first - second) < 0.05) > 0.9
    reader = open_hdf5(next((tmp_path / "b").glob("cases/*.h5")))  # images of others are emptied by it too
    body = reader.read("body")
    assert body.dtype == bool and body.shape == tuple(reader.attributes["original_shape"])
    assert 0 < body.mean() < 1 and reader.dataset("body").attrs["outside"] == 0  # the least of the MR
