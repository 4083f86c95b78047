"""What nobody stated stays unknown from the manifest to the batch: -1, or NaN, and never the first class."""

import csv
import json
import shutil

import h5py
import pytest

from medldm.attributes import UNKNOWN, check_class_names, check_order
from medldm.conditions import number_as_trained
from medldm.data import build_datamodule
from medldm.data.loading.dataset import Item
from medldm.data.loading.facts import view_weights
from medldm.data.loading.pairs import pair_items
from medldm.data.prepared import load_index
from medldm.data.records import read_images
from medldm.errors import InputError
from medldm.evaluation.pairs import group_members, make_pairs
from medldm.training.run import Run, make_module
from tests.data.test_prepare import prepare_folder, write_pictures
from tests.helpers import compose_config


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """Three pictures of three subjects: one says that it is well, one that it is ill, one nothing."""
    root = write_pictures(tmp_path_factory.mktemp("raw"))
    rows = [("a", "p1", "well", "SA"), ("b", "p2", "", ""), ("c", "p3", "ill", "LA")]
    with open(root / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mask", "subject", "label", "view"])
        writer.writerows([(f"images/{n}.png", f"masks/{n}.png", *rest) for n, *rest in rows])
    return root


@pytest.fixture(scope="module")
def root(raw, tmp_path_factory):
    return prepare_folder(raw, tmp_path_factory.mktemp("out"))


def build(root, **options):
    return build_datamodule({"root": str(root), "batch_size": 3, **options}, keys=("image",), seed=0)


def edit_index(root, out, change):
    """A copy of a prepared folder whose index an older version, or another data set, would have written."""
    shutil.copytree(root, out)
    index = json.loads((out / "index.json").read_text())
    change(index)
    (out / "index.json").write_text(json.dumps(index))
    return out


def test_a_missing_label_is_unknown_in_file_index_and_batch(root, caplog):
    index = load_index(root)
    assert index["label_values"] == ["ill", "well"] and index["view_names"] == ["SA", "LA"]
    assert [case["slices"]["label"] for case in index["cases"]] == [[1], [UNKNOWN], [0]]
    with h5py.File(root / "cases/p2.h5") as file:
        assert [file[kind][0] for kind in ("label", "view", "phase")] == [UNKNOWN] * 3
    datamodule = build(root)
    batch = datamodule.dataset("all").__getitems__([0, 1, 2])
    assert batch["label"].tolist() == [1, UNKNOWN, 0] and batch["view"].tolist() == [0, UNKNOWN, 1]
    assert batch["slice_position"].isnan().all()  # pictures stand in no stack
    assert "1 of 3 images of all state no label; they are unknown, of no class" in caplog.text
    assert set(datamodule.facts["unknown_attributes"]) >= {"slice_position", "phase"}


def test_an_index_of_an_earlier_version_is_read_as_unknown_where_nothing_was_stated(root, tmp_path):
    def as_before(index):
        for case in index["cases"]:
            for kind in ("view", "phase", "label"):
                case["slices"][kind] = [max(0, number) for number in case["slices"][kind]]

    old = edit_index(root, tmp_path / "old", as_before)
    slices = [case["slices"] for case in load_index(old)["cases"]]
    assert [s["label"] for s in slices] == [[1], [UNKNOWN], [0]]  # "ill" is stated, so its 0 stays
    assert [s["view"] for s in slices] == [[0], [UNKNOWN], [1]]


def test_a_file_of_an_earlier_version_is_made_anew(raw, root, tmp_path):
    old = shutil.copytree(root, tmp_path / "old")
    with h5py.File(old / "cases/p2.h5", "r+") as file:
        file["label"][:] = 0
    prepare_folder(raw, old)
    with h5py.File(old / "cases/p2.h5") as file:
        assert file["label"][0] == UNKNOWN


def test_evaluation_groups_leave_unknown_images_out(root):
    pairs = make_pairs(root, root, None)
    assert [pair.attributes.get("label") for pair in pairs] == [1, None, 0]
    assert group_members(pairs, load_index(root))["label"] == ["well", None, "ill"]
    assert [record.attributes.get("view") for record in read_images(root)] == [0, None, 1]


def test_an_unknown_view_is_left_out_of_chosen_ones_with_a_word_and_counts_in_balance(root, caplog):
    assert [item.view for item in build(root, views=["SA"], split="default").items("all")] == [0]
    assert "state no view; they are left out by data.views" in caplog.text
    items = [Item(0, 0, view, 0, 0, 0.5) for view in (0, 0, UNKNOWN, 1)]
    assert view_weights(items).tolist() == [0.5, 0.5, 1, 1]


def test_a_pair_of_an_unknown_modality_is_refused(root):
    index = load_index(root)
    index["cases"][1]["subject"] = "p1"
    with pytest.raises(InputError, match="cases/p2.h5: p2 states no label.*column label of manifest.csv"):
        pair_items(index, build(root).items("all"), None)


# ---- a model's names and a data set's ----

KNOWN = {"view_names": ["LA", "SA"], "label_values": ["well", "doubtful", "ill"], "phase_names": []}


def test_names_in_another_order_get_the_numbers_of_the_model(root, caplog):
    dataset = build(root).dataset("all")
    number_as_trained(
        dataset, KNOWN, ("view", "label", "slice_position"), ("view", "label", "slice_position")
    )
    batch = dataset.__getitems__([0, 1, 2])
    assert batch["view"].tolist() == [1, UNKNOWN, 0] and batch["label"].tolist() == [0, UNKNOWN, 2]
    assert "1 images ('p2_000' first) state no view; they are sampled as unknown" in caplog.text
    untouched = build(root).dataset("all")
    number_as_trained(untouched, KNOWN, (), ())  # a model that uses neither
    assert untouched.__getitems__([0])["view"].tolist() == [0]


def test_a_name_that_the_model_has_not_is_refused_where_an_image_has_it(root):
    dataset = build(root).dataset("all")
    with pytest.raises(InputError, match="'p1_000' has the view 'SA', the model knows LA"):
        number_as_trained(dataset, {"view_names": ["LA"]}, ("view",), ("view",))
    dataset.items = dataset.items[2:]
    number_as_trained(dataset, {"view_names": ["LA"]}, ("view",), ())
    assert dataset.__getitems__([0])["view"].tolist() == [0]


def test_an_unknown_attribute_is_refused_by_a_model_that_never_saw_one(root):
    with pytest.raises(InputError, match=r"1 images \('p2_000' first\) state no label.*drop_all_prob"):
        number_as_trained(build(root).dataset("all"), KNOWN, ("label",), ("view",))


def test_classes_in_another_order_are_refused_with_a_mapping_that_mends_them(root, raw, tmp_path):
    trained, given = {"label_names": ["background", "b", "a"]}, {"label_names": ["background", "a", "b"]}
    check_class_names(trained, trained, "", "")
    check_class_names(trained, {"label_names": None}, "", "")
    check_class_names(trained, {"label_names": ["background", "class 1", "class 2"]}, "", "")
    with pytest.raises(
        InputError,
        match=r"'\+data.preprocess.labels.mapping=\{0: 0, 1: 2, 2: 1\}' .*names=\[background, b, a\]",
    ):
        check_class_names(trained, given, "ckpt: trained on", "DATA")
    given["preprocess"] = {"labels": {"mapping": {"0": 0, "7": 1, "9": 2}}}
    with pytest.raises(InputError, match=r"mapping=\{0: 0, 7: 2, 9: 1\}"):
        check_class_names(trained, given, "ckpt: trained on", "DATA")
    with pytest.raises(InputError, match="has background, x, y; prepare the data with the classes it knows"):
        check_class_names(trained, {"label_names": ["background", "x", "y"]}, "ckpt: trained on", "DATA")


@pytest.mark.parametrize("table", ["view_names", "label_values", "label_names"])
def test_weights_go_on_only_under_the_same_numbers(table):
    check_order({table: ["a", "b"]}, {table: ["a", "b"]}, "init_from=x")
    check_order({table: ["a", "b"]}, {table: ["c", "d"]}, "init_from=x")  # another task
    with pytest.raises(InputError, match=f"init_from=x: numbers {table} as a, b, the data as b, a"):
        check_order({table: ["a", "b"]}, {table: ["b", "a"]}, "init_from=x")


@pytest.mark.parametrize("drop", [0.0, 0.1])
def test_validation_images_alone_without_a_label_need_a_trained_null(root, tmp_path, drop):
    """They would be judged under a null that no training step has touched."""
    folder = shutil.copytree(root, tmp_path / "data")
    split = {"train": ["p1", "p3"], "val": ["p2"], "test": []}
    (folder / "splits.json").write_text(json.dumps({"default": split}))
    cfg = compose_config(
        "train", "experiment=cardiac2d/ldm", "data=folder", f"data.root={folder}", "debug=tiny",
        "model/conditioner=label", f"model.conditioner.drop_all_prob={drop}", "model/first_stage=pixel",
        "data.num_workers=0", "data.edge_degrade=null",
    )  # fmt: skip
    cfg.run_dir = str(tmp_path / "run")
    datamodule = build(folder)
    run = Run(tmp_path / "run", train_config(cfg), None, None)
    assert datamodule.unstated("train") == ["phase", "slice_position"]
    assert datamodule.unstated("val") == ["view", "phase", "label", "slice_position"]
    if drop:
        assert make_module(cfg, run, datamodule).conditioner.null_attributes
    else:
        with pytest.raises(InputError, match="some images of val state no label, and training never sees"):
            make_module(cfg, run, datamodule)


def train_config(cfg):
    from omegaconf import OmegaConf

    return OmegaConf.to_container(cfg.model, resolve=True)
