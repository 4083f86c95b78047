"""A new condition is a column of the manifest and a line of the conditioner's config."""

import csv
import json
import math
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from medldm.attributes import UNKNOWN, check_order, declare, with_attributes
from medldm.build import build_module
from medldm.conditions import number_as_trained
from medldm.data import build_datamodule
from medldm.data.prepared import load_index
from medldm.errors import InputError
from tests.data.test_prepare import prepare_folder, write_pictures
from tests.helpers import compose_config

AGES, SEXES = ["31", "", "74.5"], ["F", "M", ""]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Three pictures; the second states no age, the third no sex. `weight` differs within a subject."""
    raw = write_pictures(tmp_path_factory.mktemp("raw"))
    with open(raw / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mask", "subject", "age", "sex", "weight"])
        for name, subject, age, sex, weight in zip(
            "abc", ["p1", "p2", "p2"], AGES, SEXES, "123", strict=True
        ):
            writer.writerow([f"images/{name}.png", f"masks/{name}.png", subject, age, sex, weight])
    return prepare_folder(raw, tmp_path_factory.mktemp("out"))


def dataset_of(root, **options):
    module = build_datamodule({"root": str(root), "batch_size": 3, **options}, keys=("image", "mask"), seed=0)
    return module, module.dataset("all")


def test_columns_are_declared_and_reach_the_batch(root):
    declared = load_index(root)["attributes"]
    assert declared == {
        "age": {"kind": "scalar", "range": [31.0, 74.5], "unit": "years"},
        "sex": {"kind": "categorical", "names": ["F", "M"]},
        "weight": {"kind": "scalar", "range": [1.0, 3.0], "unit": "kg"},
        "slice_position": {"kind": "scalar", "range": [0.0, 1.0], "unit": None},
    }
    module, dataset = dataset_of(root)
    batch = dataset.__getitems__([0, 1, 2])
    np.testing.assert_array_equal(batch["age"], np.float32([31, np.nan, 74.5]))
    assert batch["sex"].tolist() == [0, 1, UNKNOWN] and batch["weight"].tolist() == [1, 2, 3]
    assert {"age", "sex"} <= set(module.unstated("all")) and "weight" not in module.unstated("all")


def test_a_folder_of_an_earlier_version_declares_what_its_cases_state(root, tmp_path):
    old = shutil.copytree(root, tmp_path / "old")
    index = json.loads((old / "index.json").read_text())
    del index["attributes"]
    for case in index["cases"]:  # what differed within a file was not kept
        for name in ("age", "sex", "weight"):
            case["slices"].pop(name, None)
    (old / "index.json").write_text(json.dumps(index))
    declared = load_index(old)["attributes"]
    assert declared["sex"]["names"] == ["F"] and declared["age"]["range"] == [31.0, 31.0]
    batch = dataset_of(old)[1].__getitems__([0, 1, 2])
    assert batch["sex"].tolist() == [0, UNKNOWN, UNKNOWN] and batch["age"].isnan().tolist() == [
        False,
        True,
        True,
    ]


def test_tables_that_others_edit_decide_the_names_of_views():
    index = {"spatial_dims": 3, "cases": [], "view_names": ["LA", "SA"], "attributes": {}}
    assert with_attributes(index)["attributes"] == {"view": {"kind": "categorical", "names": ["LA", "SA"]}}


@pytest.mark.parametrize(
    "values, expected",
    [
        (["1.5", 3, ""], (1.5, 3.0)),
        (["b", "a", None, "a"], ("a", "b")),
        (["1", "x"], ("1", "x")),
        ([str(i) + "x" for i in range(65)], None),  # names of images
        (["", None], None),
    ],
)
def test_a_column_of_numbers_is_a_scalar_and_one_of_few_names_a_category(values, expected):
    found = declare("column", values)
    assert expected == (found and (found.limits or found.names))


def model_of(root, *overrides):
    cfg = compose_config(
        "train", "experiment=cardiac2d/ldm", "data=folder", f"data.root={root}", "debug=tiny",
        "model/first_stage=pixel", "model/conditioner=strided_cnn", "model.conditioner.use_edges=false",
        "model.conditioner.drop_edges_prob=0",         *overrides,
    )  # fmt: skip
    return OmegaConf.to_container(cfg.model, resolve=True)


def test_age_and_sex_condition_a_model_by_a_line_of_its_config(root):
    module, dataset = dataset_of(root)
    torch.manual_seed(0)
    built = build_module(model_of(root, "+model.conditioner.attributes={age: true, sex: auto}"), module.facts)
    conditioner = built.conditioner
    assert conditioner.attributes == conditioner.null_attributes == ("age", "sex")
    assert conditioner.groups == ("mask", "attributes")
    batch = dataset.__getitems__([0, 1, 2])
    embedding = conditioner(batch).embedding
    age, sex = conditioner.embeddings["age"], conditioner.embeddings["sex"]
    ends = age.layers(torch.tensor([[-1.0], [1.0]]))  # the range of the data, scaled
    expected = torch.stack([ends[0] + sex.weight[1], age.null + sex.weight[2], ends[1] + sex.weight[0]])
    torch.testing.assert_close(embedding, expected)
    for name, other in (("age", torch.full((3,), 50.0)), ("sex", torch.tensor([1, 0, 1]))):
        assert not torch.equal(conditioner(batch | {name: other}).embedding[0], embedding[0])
    null = conditioner(batch, drop=conditioner.drop_groups(3)).embedding
    torch.testing.assert_close(null, (age.null + sex.weight[0]).expand(3, -1))
    without = {key: value for key, value in batch.items() if key not in ("age", "sex")}
    torch.testing.assert_close(conditioner(without).embedding, null)
    plain = build_module(model_of(root), module.facts).conditioner
    assert plain.attributes == () and plain(batch).embedding is None


def test_an_attribute_that_the_data_lack_is_refused_or_left_out(root):
    facts = dataset_of(root)[0].facts
    with pytest.raises(InputError, match=r"height=true but the dataset has no height \(it declares age, "):
        build_module(model_of(root, "+model.conditioner.attributes={height: true}"), facts)
    assert (
        build_module(
            model_of(root, "+model.conditioner.attributes={height: auto}"), facts
        ).conditioner.attributes
        == ()
    )


def test_names_get_the_numbers_of_the_model_and_samples_know_what_they_were_told(root):
    dataset = dataset_of(root)[1]
    plain = dataset.made_from(0)
    facts = {"attributes": {"sex": {"kind": "categorical", "names": ["M", "D", "F"]},
                            "age": {"kind": "scalar", "range": [0, 1], "unit": None}}}  # fmt: skip
    number_as_trained(dataset, facts, ("age", "sex"), ("age", "sex"))
    batch = dataset.__getitems__([0, 1, 2])
    assert batch["sex"].tolist() == [2, 0, UNKNOWN] and math.isnan(batch["age"][1])
    assert dataset.made_from(0) != plain
    facts["attributes"]["sex"]["names"] = ["M"]
    with pytest.raises(InputError, match="has the sex 'F', the model knows M"):
        number_as_trained(dataset_of(root)[1], facts, ("sex",), ("sex",))
    given = {"attributes": {"sex": {"kind": "categorical", "names": ["M", "F"]}}}
    trained = {"attributes": {"sex": {"kind": "categorical", "names": ["F", "M"]}}}
    with pytest.raises(InputError, match="numbers sex as F, M, the data as M, F"):
        check_order(trained, given, "init_from=x")
