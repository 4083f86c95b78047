"""A checkpoint as safetensors: the same model bit for bit, a card that says what it is, damage is seen."""

import json

import pytest
import torch
import yaml

from medldm.build import load_first_stage, load_module
from medldm.commands import export
from medldm.errors import InputError
from medldm.tensors import from_plain, read_tensors, to_plain, write_tensors
from tests.helpers import compose_config
from tests.training import load


def share(checkpoint, output, *words):
    export.task(
        compose_config("export", "format=safetensors", f"checkpoint={checkpoint}", f"output={output}", *words)
    )
    return output / "model.safetensors"


def equal_states(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_the_model_is_the_same_bit_for_bit_without_the_state_of_its_training(diffusion, tmp_path, weights):
    path = share(diffusion, tmp_path)
    ours, theirs = load_module(diffusion, weights=weights), load_module(path, weights=weights)
    assert equal_states(ours.state_dict(), theirs.state_dict())
    assert theirs.description == ours.description and theirs.facts == ours.facts
    assert ours.sampler == theirs.sampler
    assert path.stat().st_size < diffusion.stat().st_size


def test_a_first_stage_in_it_encodes_alike(first_stage, tmp_path):
    path = share(first_stage, tmp_path)
    ours, theirs = load_first_stage(first_stage)[0], load_first_stage(path)[0]
    x = torch.rand(2, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(ours.encode_raw(x), theirs.encode_raw(x))


def test_the_card_says_data_split_licence_metrics_and_use(first_stage, tmp_path):
    results = {
        "schema_version": 1, "metrics": {}, "definitions": {}, "distribution": {}, "dataset": "mnms2",
        "rows": {"generated": {"ssim": {"mean": 0.51234, "ci95": [0.4, 0.6], "n": 9, "num_subjects": 3}}},
        "aggregation": "mean over images", "n": {"images": 9, "subjects": 3, "samples_per_condition": 1},
        "data_range": "1", "groups": {}, "differences": {}, "row_definitions": {}, "networks": {},
        "condition": {}, "memorization": {}, "warnings": [],
    }  # fmt: skip
    (tmp_path / "metrics.json").write_text(json.dumps(results))
    share(first_stage, tmp_path / "out", "licence=CC-BY-4.0", f"evaluation={tmp_path}")
    card = (tmp_path / "out/README.md").read_text()
    assert "dataset mnms2, split `default`, subjects: 2 train, 1 val, 1 test" in card
    assert "| ssim | 0.5123 | 0.4 to 0.6 | 9 | 3 |" in card
    assert "## Licence\n\nCC-BY-4.0\n" in card and "no medical device" in card
    config = yaml.safe_load((tmp_path / "out/config.yaml").read_text())
    assert config["kind"] == load(first_stage)["medldm"]["stage"]
    share(first_stage, tmp_path / "bare")
    card = (tmp_path / "bare/README.md").read_text()
    assert "Not stated. Ask whoever trained it" in card and "Not stated: export with `evaluation=DIR`" in card


def test_a_flipped_bit_and_a_hostile_config_are_refused(first_stage, tmp_path):
    path = share(first_stage, tmp_path)
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    (tmp_path / "damaged.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="damaged.safetensors: not a readable checkpoint"):
        load_module(tmp_path / "damaged.safetensors")
    content = read_tensors(path.read_bytes())
    content["medldm"]["model"]["optimizer"] = {"_target_": "os.system", "command": "true"}
    write_tensors(tmp_path / "hostile.safetensors", content)
    with pytest.raises(InputError, match="names 'os.system', which is none of medldm's parts"):
        load_module(tmp_path / "hostile.safetensors")


def test_plain_data_come_back_as_they_were():
    tree = {"a": [1, 2.5, None, True, {"b": "c"}], "ranges": {0: [0.0, 1.0], 3: {}}, "empty": {}}
    assert from_plain(json.loads(json.dumps(to_plain(tree)))) == tree


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("format=gguf",), "format=gguf: choose png or safetensors"),
        (("format=safetensors",), "checkpoint: not given"),
        (("format=safetensors", "root=x"), "root, split: have no effect on weights"),
        (("root=x", "licence=MIT"), "licence: has no effect on pictures"),
    ],
)
def test_keys_of_the_other_format_are_refused(words, line, tmp_path):
    with pytest.raises(InputError, match=line):
        export.task(compose_config("export", f"output={tmp_path / 'out'}", *words))
    assert not any(tmp_path.iterdir())
