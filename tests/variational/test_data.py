import json

import cv2
import numpy as np
import pytest
from omegaconf import OmegaConf

from medldm.commands import prepare
from medldm.conditions import number_as_trained
from medldm.data import build_datamodule
from medldm.data.datasets import class_folders, nih_cxr14
from medldm.data.hdf5 import open_hdf5
from medldm.data.phantoms.chest import draw_radiograph, write_chestxray, write_nih_cxr14
from medldm.data.phantoms.swirl import SwirlDataModule, distance_to_swirl, swirl, to_grid
from medldm.data.preparation.intensity import full_scale, looks_inverted
from medldm.data.preparation.jobs import make_tables
from medldm.data.preparation.recipe import make_recipe
from medldm.data.preparation.slices import prepare_slices
from medldm.data.splits import read_splits
from medldm.errors import InputError
from tests.helpers import compose_config


def prepared(data, raw, root, *overrides):
    size = ("data.image_size=32", "data.num_workers=0")
    prepare.task(
        compose_config("prepare", f"data={data}", f"data.raw={raw}", f"data.root={root}", *size, *overrides)
    )
    return json.loads((root / "index.json").read_text())


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), array)


def as_prepared(path, tmp_path, **attributes):
    """One picture through the chest X-ray recipe -> (H, W) in [-1, 1]."""
    from medldm.data.case import Case

    cfg = OmegaConf.to_container(
        compose_config("prepare", "data=chestxray", "data.raw=x", "data.root=y").data
    )
    preprocess = cfg["preprocess"] | {"invert": attributes.pop("invert", "declared")}
    case = Case("a", "a", {"image": str(path)}, attributes)
    return prepare_slices(case, make_recipe(2, 32, preprocess), make_tables([case])).arrays["images"][0]


def ramp(top, dtype):
    return np.tile(np.linspace(0, top, 64), (64, 1)).astype(dtype)


def test_class_folders_become_labels_and_kermanys_names_patients(tmp_path):
    raw = write_chestxray(tmp_path / "raw", num_subjects=8, image_size=40)
    write(raw / "PNEUMONIA" / "person2_virus_9.jpeg", ramp(255, np.uint8))
    index = prepared("chestxray", raw, tmp_path / "out")
    assert index["label_values"] == ["NORMAL", "PNEUMONIA"] and index["num_labels"] == 2
    assert not index["has_edges"] and index["num_classes"] is None
    cases = {case["id"]: case for case in index["cases"]}
    assert cases["person2"]["num_slices"] == 2 and cases["IM-0001"]["slices"]["label"] == [0]


def test_published_split_folders_are_kept_apart(tmp_path):
    for split in ("train", "val", "test"):
        write(tmp_path / split / "NORMAL" / "IM-0001-0001.png", ramp(255, np.uint8))
        write(tmp_path / split / "PNEUMONIA" / "person1_virus_1.png", ramp(255, np.uint8))
    index = prepared("chestxray", tmp_path, tmp_path / "out")
    assert {case["subject"] for case in index["cases"]} >= {"train-person1", "test-person1"}
    assert read_splits(tmp_path / "out" / "splits.json")["default"]["test"] == [
        "test-IM-0001",
        "test-person1",
    ]


def test_nih_is_split_by_patient_with_findings_and_views(tmp_path):
    raw = write_nih_cxr14(tmp_path / "raw", num_subjects=8, image_size=40)
    index = prepared("nih_cxr14", raw, tmp_path / "out")
    assert len(index["cases"]) == 8 and index["view_names"] == ["AP", "PA"]
    assert set(index["label_values"]) <= {"No Finding", "Pneumonia"}
    split = read_splits(tmp_path / "out" / "splits.json")["default"]
    assert sorted(sum(split.values(), [])) == [f"{i:08d}" for i in range(1, 9)]


def test_nih_works_without_its_table_and_names_what_contradicts_it(tmp_path):
    raw = write_nih_cxr14(tmp_path, num_subjects=2, image_size=40)
    table = raw / "Data_Entry_2017.csv"
    text = table.read_text()
    table.write_text(text.replace("No Finding", "Effusion|Mass").replace("Pneumonia", "Effusion|Mass"))
    assert {case.attributes["label"] for case in nih_cxr14.index(raw)} == {nih_cxr14.SEVERAL}
    table.write_text(text.replace(",1,", ",7,"))
    with pytest.raises(InputError, match="patient 7"):
        nih_cxr14.index(raw)
    table.unlink()
    assert {case.subject for case in nih_cxr14.index(raw)} == {"00000001", "00000002"}


def test_a_selection_by_class_and_number(tmp_path):
    raw = write_chestxray(tmp_path / "raw", num_subjects=10, image_size=40)
    index = prepared("kermany_normal", raw, tmp_path / "out", "data.select.max_images=3")
    assert index["label_values"] == ["NORMAL"] and len(index["cases"]) == 3
    with pytest.raises(InputError, match="no image has the label COVID"):
        prepared("kermany_normal", raw, tmp_path / "other", "data.select.classes=[COVID]")


def test_kermanys_normal_pictures_are_those_of_train_with_validation_of_their_own(tmp_path):
    for split, count in {"train": 12, "val": 1, "test": 3}.items():
        for i in range(count):
            write(tmp_path / "raw" / split / "NORMAL" / f"IM-{i:04d}-0001.png", ramp(255, np.uint8))
            write(tmp_path / "raw" / split / "PNEUMONIA" / f"person{i}_virus_1.png", ramp(255, np.uint8))
    index = prepared("kermany_normal", tmp_path / "raw", tmp_path / "out")
    assert [case["id"] for case in index["cases"]] == [f"train-IM-{i:04d}" for i in range(12)]
    split = read_splits(tmp_path / "out" / "splits.json")["default"]
    assert {part: len(names) for part, names in split.items()} == {"train": 10, "val": 1, "test": 1}
    with pytest.raises(InputError, match="data.select.split=dev: no image is in this part; the data state"):
        (tmp_path / "raw" / "val").rename(tmp_path / "val")
        prepared("kermany_normal", tmp_path / "raw", tmp_path / "other", "data.select.split=dev")


@pytest.mark.parametrize(("top", "dtype"), [(255, np.uint8), (4095, np.uint16), (65535, np.uint16)])
def test_bit_depths_arrive_as_the_same_picture(tmp_path, top, dtype):
    write(tmp_path / "a.png", ramp(top, dtype))
    expected = np.tile(np.linspace(-1, 1, 64).reshape(32, 2).mean(1), (32, 1))
    np.testing.assert_allclose(as_prepared(tmp_path / "a.png", tmp_path), expected, atol=0.01)


def test_grey_levels_are_divided_by_255_and_not_stretched(tmp_path):
    write(tmp_path / "a.png", np.full((32, 32), 102, np.uint8))
    np.testing.assert_allclose(as_prepared(tmp_path / "a.png", tmp_path), 2 * 102 / 255 - 1, atol=1e-6)
    assert [full_scale(np.array([0.0, v])) for v in (200, 256, 5000)] == [255, 1023, 16383]


def test_colour_becomes_grey(tmp_path):
    write(tmp_path / "a.png", np.stack([ramp(255, np.uint8)] * 3, -1))
    write(tmp_path / "b.png", ramp(255, np.uint8))
    np.testing.assert_array_equal(
        as_prepared(tmp_path / "a.png", tmp_path), as_prepared(tmp_path / "b.png", tmp_path)
    )
    tinted = np.stack([ramp(255, np.uint8), ramp(200, np.uint8), ramp(180, np.uint8)], -1)
    write(tmp_path / "c.png", tinted)
    assert as_prepared(tmp_path / "c.png", tmp_path).shape == (32, 32)


def test_an_inverted_picture_is_turned_where_declared_or_seen(tmp_path):
    image = np.rint(255 * draw_radiograph(np.random.default_rng(0), 64, has_pneumonia=False)).astype(np.uint8)
    assert looks_inverted(255.0 - image) and not looks_inverted(image.astype(float))
    write(tmp_path / "plain.png", image)
    write(tmp_path / "inverted.png", 255 - image)
    plain = as_prepared(tmp_path / "plain.png", tmp_path)
    for options in ({"photometric": "MONOCHROME1"}, {"invert": "auto"}):
        turned = as_prepared(tmp_path / "inverted.png", tmp_path, **options)
        np.testing.assert_allclose(turned, plain, atol=0.02)
    assert as_prepared(tmp_path / "inverted.png", tmp_path)[0, 0] > 0.5
    assert np.array_equal(as_prepared(tmp_path / "plain.png", tmp_path, invert="auto"), plain)


def test_bad_folders_and_files_are_named(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        class_folders.index(tmp_path / "absent")
    with pytest.raises(InputError, match="no class folders"):
        class_folders.index(tmp_path)
    write(tmp_path / "NORMAL" / "a.png", ramp(255, np.uint8))
    (tmp_path / "PNEUMONIA").mkdir()
    with pytest.raises(InputError, match="PNEUMONIA: holds no PNG or JPEG"):
        class_folders.index(tmp_path)
    (tmp_path / "PNEUMONIA" / "b.jpeg").write_bytes(b"\xff\xd8 cut off")
    with pytest.raises(InputError, match="b.jpeg: not a complete image file"):
        prepared("chestxray", tmp_path, tmp_path / "out")


def test_the_stored_range_is_minus_one_to_one(tmp_path):
    raw = write_chestxray(tmp_path / "raw", num_subjects=2, image_size=40)
    index = prepared("chestxray", raw, tmp_path / "out")
    images = open_hdf5(tmp_path / "out" / index["cases"][0]["file"]).read("image").astype(np.float32)
    assert images.min() >= -1 and images.max() <= 1 and images.std() > 0.2


def test_the_swirl_lies_on_its_curve():
    assert distance_to_swirl(swirl(np.linspace(0, 1, 50))).max() < 0.01
    module = SwirlDataModule(num_points=500, batch_size=100)
    batch = next(iter(module.train_dataloader()))
    assert batch["image"].shape == (100, 2) and batch["image"].abs().max() <= 1
    assert distance_to_swirl(to_grid(batch["image"])).mean() < 1.2
    with pytest.raises(InputError, match="no images"):
        module.dataset("test")


def test_what_the_swirl_does_not_know_is_named_unless_it_is_null():
    data = {"dataset": "swirl", "root": None, "num_points": 10, "batch_size": 5}
    build_datamodule({**data, "crop_size": None}, keys=("image",), seed=0)  # as debug=tiny says for all
    with pytest.raises(InputError, match="'crop_size'; see configs/data/swirl.yaml"):
        build_datamodule({**data, "crop_size": [8, 8]}, keys=("image",), seed=0)


def test_all_findings_of_an_image_are_labels_at_once(tmp_path):
    raw = write_nih_cxr14(tmp_path / "raw", num_subjects=4, image_size=40)
    table = next(raw.glob("Data_Entry_2017*.csv"))
    header, *lines = table.read_text().splitlines()
    column = header.split(",").index("Finding Labels")
    findings = ["Mass|Effusion", "Mass", "", "No Finding"]
    rows = [line.split(",") for line in lines]
    for row, (_, finding) in zip(rows, zip(rows, findings * len(rows), strict=False), strict=True):
        row[column] = finding
    table.write_text("\n".join([header, *map(",".join, rows)]) + "\n")
    index = prepared("nih_cxr14", raw, tmp_path / "out", "data.task=findings")
    assert index["label_values"] == ["Effusion", "Mass", "No Finding"] and index["multi_label"] is True
    dataset = build_datamodule({"root": tmp_path / "out", "batch_size": 4}, keys=("image",), seed=0).dataset(
        "all"
    )
    batch = dataset.__getitems__(range(4))
    assert batch["labels"].tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 0, 1]]
    assert batch["label"].tolist() == [-1, 1, -1, 2]
    known = {"label_values": ["No Finding", "Nodule", "Mass", "Effusion"], "multi_label": True}
    number_as_trained(dataset, known, ("label",), ("label",))
    assert dataset.__getitems__([0, 3])["labels"].tolist() == [[0, 0, 1, 1], [1, 0, 0, 0]]
    with pytest.raises(
        InputError, match="has several labels for an image, but the model was trained with one for each"
    ):
        number_as_trained(dataset, {"label_values": known["label_values"]}, ("label",), ())
    with pytest.raises(InputError, match="data.task=mass: choose findings"):
        nih_cxr14.index(tmp_path / "raw", task="mass")
