import json

import pytest

from medldm.data.datasets.mnms2 import SUBJECTS, official_160_40_160, published_splits, seed42_350_10
from medldm.data.splits import fraction_split, make_splits, read_splits, write_splits_once
from medldm.errors import InputError

FRACTIONS = {"val": 0.1, "test": 0.1}


def test_the_published_split_holds_out_its_ten_subjects():
    split = seed42_350_10()
    assert split["test"] == ["225", "043", "286", "303", "057", "273", "016", "058", "249", "125"]
    assert len(split["train"]) + len(split["val"]) == 350
    assert sorted(sum(split.values(), [])) == SUBJECTS


def test_official_split_is_sequential():
    split = official_160_40_160()
    assert (split["train"][-1], split["val"][0], split["val"][-1], split["test"][0]) == (
        "160",
        "161",
        "200",
        "201",
    )


def test_full_mnms2_gets_the_named_splits_and_others_a_fraction_split():
    full = make_splits(SUBJECTS, fractions=FRACTIONS, seed=1, published=published_splits(SUBJECTS))
    assert full["default"] == full["seed42_350_10"] and "official_160_40_160" in full
    assert published_splits(SUBJECTS[1:]) == {}
    assert set(make_splits(["a", "b", "c"], fractions=FRACTIONS, seed=1)) == {"default"}


@pytest.mark.parametrize("num_train", [1, 2, 3, 30])
def test_a_stated_split_without_validation_holds_out_training_subjects(num_train):
    """As Med-LSDM's train/ and test/, IXI's tables, or a manifest with these two words."""
    stated = {f"s{i:02d}": "Training" for i in range(num_train)} | {"t1": "test", "t2": "TEST"}
    splits = make_splits(list(stated), fractions=FRACTIONS, seed=5, stated=stated)
    split = splits["default"]
    held = {1: 0, 2: 1, 3: 1, 30: 3}[num_train]
    assert len(split["val"]) == held and split["test"] == ["t1", "t2"]
    assert sorted(split["train"] + split["val"]) == sorted(stated)[:num_train]
    assert split == make_splits(list(stated), fractions=FRACTIONS, seed=5, stated=stated)["default"]
    assert ("note" in split) == bool(held)
    if held:
        assert f"{held} of {num_train} training subjects" in split["note"]
    none = make_splits(list(stated), fractions={"val": 0, "test": 0}, seed=5, stated=stated)
    assert none["default"]["val"] == []


@pytest.mark.parametrize("word", ["validation", "Val", " valid "])
def test_a_stated_validation_is_kept_in_any_spelling(word):
    stated = {"a": "Train", "b": "train", "c": word}
    split = make_splits("abc", fractions=FRACTIONS, seed=5, stated=stated)["default"]
    assert split == {"train": ["a", "b"], "val": ["c"], "test": []}
    with pytest.raises(InputError, match="split 'fold3' of subject c"):
        make_splits("abc", fractions=FRACTIONS, seed=5, stated={**stated, "c": "fold3"})


def test_a_note_of_a_split_is_no_subject(tmp_path):
    path = tmp_path / "splits.json"
    split = make_splits("ab", fractions=FRACTIONS, seed=5, stated={"a": "train", "b": "train"})
    assert write_splits_once(path, split, "ab") == write_splits_once(path, {}, "ab")
    assert read_splits(path)["default"]["note"]


@pytest.mark.parametrize("count", [1, 2, 3, 10, 101])
def test_fraction_split_is_seeded_and_covers_every_subject_once(count):
    subjects = [f"s{i}" for i in range(count)]
    split = fraction_split(subjects, FRACTIONS, seed=3)
    assert split == fraction_split(subjects[::-1], FRACTIONS, seed=3)
    assert sorted(sum(split.values(), [])) == sorted(subjects) and split["train"]
    assert count < 3 or all(split.values())


def test_splits_are_written_once(tmp_path):
    path = tmp_path / "splits.json"
    first = write_splits_once(path, make_splits("abcd", fractions=FRACTIONS, seed=1), "abcd")
    again = write_splits_once(path, make_splits("abcd", fractions=FRACTIONS, seed=9), "abcd")
    assert first == again == json.loads(path.read_text())


def test_a_split_that_is_kept_although_others_would_be_drawn_is_told(tmp_path, caplog):
    path, subjects = tmp_path / "splits.json", [f"s{i}" for i in range(20)]
    drawn = make_splits(subjects, fractions=FRACTIONS, seed=1)
    write_splits_once(path, drawn, subjects)
    write_splits_once(path, drawn, subjects)
    assert not caplog.messages
    more = make_splits(subjects, fractions={"val": 0.3, "test": 0.1}, seed=1)
    assert write_splits_once(path, more, subjects) == drawn
    assert "split 'default' stays as it was written" in caplog.text and "delete the file" in caplog.text


def test_overlapping_split_is_an_input_error(tmp_path):
    path = tmp_path / "splits.json"
    path.write_text(json.dumps({"default": {"train": ["a", "b"], "val": ["b"], "test": []}}))
    with pytest.raises(InputError, match="subject b in both train and val"):
        write_splits_once(path, {}, ["a", "b"])
