"""Held-out subjects are unseen by every stage of a checkpoint, or it is said."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from medldm.data.loading.datamodule import CaseDataModule
from medldm.errors import InputError
from medldm.fingerprints import file_sha256
from medldm.held_out import changed_attributes, changed_data, seen_subjects, stages_of
from medldm.training.latents import find_latents
from medldm.training.resume import check_resumed_attributes, warn_of_other_stages
from tests.provenance.conftest import (
    NUM_SUBJECTS,
    draw,
    run_encode,
    run_evaluate,
    run_prepare,
    run_sample,
    write_splits,
)
from tests.provenance.test_caches import checkpoint_of
from tests.provenance.test_samples import ldm
from tests.training import LDM, VQVAE, run_training


def swapped(root):
    """A second split in which a training subject is the test set."""
    default = json.loads((root / "splits.json").read_text())["default"]
    first, *rest = default["train"]
    other = {"train": rest + default["test"], "val": default["val"], "test": [first]}
    write_splits(root, default=default, other=other)
    return first


def description_of(path):
    return torch.load(path, weights_only=True)["medldm"]


def test_a_checkpoint_says_what_every_stage_was_trained_on(made):
    splits = json.loads((made / "data/splits.json").read_text())["default"]
    stages = dict(stages_of(description_of(ldm(made))))
    assert stages.keys() == {"diffusion model", "autoencoder model"}
    for record in stages.values():
        assert record["subjects"] == splits and record["split"] == "default"
        assert record["dataset"] == "folder" and len(record["images"]) == len(splits["train"])


def test_sampling_a_test_set_that_was_trained_on_is_refused(copied, caplog):
    first = swapped(copied / "data")
    out = copied / "out"
    arguments = (ldm(copied), copied / "data", out, "data.split=other", "split=test")
    with pytest.raises(
        InputError, match=rf"checkpoint=.* model was trained on subject {first}, .*'test'"
    ) as told:
        run_sample(*arguments)
    assert "allow_training_subjects=true" in str(told.value) and not out.exists()
    run_sample(*arguments, "allow_training_subjects=true")
    assert f"was trained on subject {first}" in caplog.text
    with pytest.raises(InputError, match=rf"trained on 1 of the 1 judged subjects \({first}"):
        run_evaluate(out, copied / "data", copied / "evaluation")
    results = run_evaluate(out, copied / "data", copied / "evaluation", "allow_training_subjects=true")
    assert any("1 of the 1 judged subjects" in line for line in results["warnings"])


def test_a_first_stage_that_saw_the_test_set_is_told_by_encode_and_refused_by_train(copied, caplog):
    first = swapped(copied / "data")
    run_encode(checkpoint_of(copied), copied / "data")
    assert "was trained on" not in caplog.text
    options = (
        LDM,
        "data=folder",
        f"model.first_stage.checkpoint={checkpoint_of(copied)}",
        "data.split=other",
    )
    with pytest.raises(InputError, match=rf"first_stage.checkpoint=.* was trained on subject {first}"):
        run_training(copied / "data", copied / "run", *options)
    assert not (copied / "run").exists()
    run_encode(checkpoint_of(copied), copied / "data", "data.split=other")
    assert f"was trained on subject {first}" in caplog.text


def test_fine_tuning_keeps_what_its_origin_was_trained_on(copied):
    splits = json.loads((copied / "data/splits.json").read_text())["default"]
    write_splits(copied / "data", default={**splits, "train": splits["train"][:2]})
    options = (VQVAE, "data=folder", "data.batch_size=2", f"init_from={checkpoint_of(copied)}")
    tuned = run_training(copied / "data", copied / "tuned", *options)
    resumed = run_training(copied / "data", copied / "tuned", *options, "resume=auto", "trainer.max_steps=3")
    write_splits(
        copied / "data", default={"train": splits["train"][:2], "val": [], "test": splits["train"][2:]}
    )
    for checkpoint in (tuned, resumed):
        with pytest.raises(InputError, match=f"was trained on subject {splits['train'][2]}"):
            run_sample(checkpoint, copied / "data", copied / "out", "split=test")


def test_a_resume_on_other_data_is_refused(copied):
    options = (VQVAE, "data=folder", "data.batch_size=2", "resume=auto", "trainer.max_steps=3")
    first = swapped(copied / "data")
    with pytest.raises(InputError, match=r"resume=.*subject .* in 'train'.*init_from=") as told:
        run_training(copied / "data", copied / "vq", *options, "data.split=other")
    assert first in str(told.value)
    draw(copied / "raw", int(first[1:]), turned=True)
    run_prepare(copied / "raw", copied / "data")
    with pytest.raises(InputError, match="prepared otherwise when it was begun"):
        run_training(copied / "data", copied / "vq", *options)


def state(root, case: int, **values) -> None:
    """Changes what index.json says of a case's attributes."""
    index = json.loads((root / "index.json").read_text())
    index.pop("attributes", None)
    for i, entry in enumerate(index["cases"]):
        entry["attributes"] |= {"sex": "MF"[i % 2]} | (values if i == case else {})
    (root / "index.json").write_text(json.dumps(index))


def test_a_resume_with_other_attributes_is_refused_where_the_model_reads_them_and_said_elsewhere(
    copied, caplog
):
    records = []
    for values in ({}, {"sex": "X"}, {"label": "b"}):
        state(copied / "data", 0, **values)
        records.append(CaseDataModule(copied / "data", keys=("image",), batch_size=2).record)
    first, other_sex, _ = records
    assert changed_attributes(first, first) == changed_attributes({}, first) == []
    assert changed_attributes(first, other_sex) == ["sex"]
    content = {"medldm": {"data": first}}
    with pytest.raises(InputError, match=r"resume=last.ckpt: .* values of sex when .* init_from=last.ckpt"):
        check_resumed_attributes(Path("last.ckpt"), content, other_sex, ("label", "sex"))
    check_resumed_attributes(Path("last.ckpt"), content, first, ("sex",))
    assert not caplog.messages
    state(copied / "data", 0, sex="X")
    options = (VQVAE, "data=folder", "data.batch_size=2", "resume=auto")
    run_training(copied / "data", copied / "vq", *options)  # an autoencoder reads none
    assert "the cases state other values of sex than when the run was begun" in caplog.text


def test_the_same_images_are_known_under_other_names(made, tmp_path):
    index = json.loads((made / "data/index.json").read_text())
    description = description_of(checkpoint_of(made))
    train = description["data"]["subjects"]["train"]
    shutil.copytree(made / "raw", tmp_path / "raw")
    for kind in ("images", "masks"):
        for i in range(NUM_SUBJECTS):  # the next one's name
            shutil.copy(made / f"raw/{kind}/p{i}.png", tmp_path / f"raw/{kind}/q{i}.png")
            (tmp_path / f"raw/{kind}/p{i}.png").unlink()
    draw(tmp_path / "raw", 0, turned=True)  # another p0
    run_prepare(tmp_path / "raw", tmp_path / "data")
    other = json.loads((tmp_path / "data/index.json").read_text())
    assert seen_subjects(description, index).all == set(train)
    assert seen_subjects(description, other).all == {name.replace("p", "q") for name in train}
    assert seen_subjects(description, other | {"dataset": "mnms2"}).all  # by content, whatever the dataset
    for case in other["cases"]:
        case["raw"] = [{"path": "x"}]  # of an older medldm: by name alone
    assert seen_subjects(description, other).all == set(train) & {"p0"}


def test_checkpoints_without_a_record_are_taken_with_a_word(copied, caplog):
    for checkpoint in (checkpoint_of(copied), ldm(copied)):
        content = torch.load(checkpoint, weights_only=True)
        for description in (content["medldm"], content["medldm"].get("first_stage", {})):
            description.pop("data", None)
        torch.save(content, checkpoint)
    run_sample(ldm(copied), copied / "data", copied / "out", "split=test")
    assert sum("did not record the subjects" in message for message in caplog.messages) == 1
    results = run_evaluate(copied / "out", copied / "data", copied / "evaluation")
    assert any("does not say which subjects" in line for line in results["warnings"])
    options = (VQVAE, "data=folder", "data.batch_size=2", "resume=auto", "trainer.max_steps=3")
    run_training(copied / "data", copied / "vq", *options)
    assert "did not record its data" in caplog.text


def test_synthetic_images_bring_along_what_their_model_was_trained_on(copied):
    out, root = copied / "out", copied / "data"
    run_sample(ldm(copied), root, out, "split=all")
    first = swapped(root)
    synthetic = {"train_on": "both", "synthetic": out, "batch_size": 2, "keys": ("image",)}
    record = CaseDataModule(root, **synthetic).record
    assert first in record["generator"] and record["synthetic"]
    options = (VQVAE, "data=folder", "data.train_on=both", f"data.synthetic={out}", "data.split=other")
    with pytest.raises(InputError, match=f"data.synthetic=.* its generator was trained on subject {first}"):
        run_training(root, copied / "run", *options)


def test_a_resumed_run_keeps_its_first_stage_and_says_so(copied, caplog):
    content = {"first_stage": {"sha256": file_sha256(checkpoint_of(copied))}}
    model = {"first_stage": {"checkpoint": str(checkpoint_of(copied))}, "map_stage": None}
    warn_of_other_stages(model, content)
    assert not caplog.messages
    checkpoint_of(copied).write_bytes(b"trained on")
    warn_of_other_stages(model, content)
    assert "not the file that the run was begun with" in caplog.text


def test_a_cache_of_another_autoencoder_is_refused(copied):
    name = next((copied / "data/latents").iterdir()).name
    model = {"first_stage": {"checkpoint": str(ldm(copied))}}  # any other checkpoint
    data = {"root": str(copied / "data"), "latents": name, "spatial_dims": 2}
    with pytest.raises(InputError, match="made with another autoencoder than"):
        find_latents(data, model, None)
    assert find_latents(data | {"latents": "auto"}, model, None) is None
    model = {"first_stage": {"checkpoint": str(checkpoint_of(copied))}}
    assert find_latents(data | {"latents": "auto"}, model, None) == name
    resumed = {"stage": "autoencoder", "model": {}, "sha256": file_sha256(checkpoint_of(copied))}
    checkpoint_of(copied).write_bytes(b"trained on")
    assert find_latents(data | {"latents": "auto"}, model, resumed) == name
    (copied / f"data/latents/{name}/latents.json").unlink()
    with pytest.raises(InputError, match="medldm encode .* to its end"):
        find_latents(data | {"latents": "auto"}, model, resumed)


def test_changes_of_a_resumed_run_are_named():
    record = {
        "subjects": {"train": ["a"], "val": ["b"]},
        "split": "default",
        "content": "1",
        "train_on": "real",
    }
    assert changed_data(record, record | {"content": None}) is None
    assert "prepared otherwise" in changed_data(record, record | {"content": "2"})
    assert "data.train_on was real" in changed_data(record, record | {"train_on": "both"})
    moved = record | {"subjects": {"train": [], "val": ["b", "a"]}}
    assert changed_data(record, moved) == "subject a was in 'train' of data.split=default when it was begun"
