"""Checkpoints from strangers: nothing that they name is run, and what does not fit ends in one line."""

import copy
import io
import pickle
import zipfile

import pytest
import torch

from medldm import parts
from medldm.build import build_module, load_first_stage, load_module
from medldm.checkpoints import read_checkpoint
from medldm.commands import encode, evaluate, sample, train, translate
from medldm.errors import InputError
from medldm.training.restoring import check_averages, check_optimizers
from tests.helpers import compose_config
from tests.training import LDM, VQVAE, load, train_config

HOSTILE = {  # what ran once, with arguments that leave a mark at PLACE
    "sympy.sympify": {"a": "__import__('pathlib').Path('PLACE').touch()"},
    "builtins.open": {"file": "PLACE", "mode": "w"},
    "builtins.eval": {"_args_": ["open('PLACE', 'w')"]},
    "pathlib.Path.write_text": {"_args_": [{"_target_": "pathlib.Path", "_args_": ["PLACE"]}, "text"]},
    "pathlib.Path.touch": {"_args_": [{"_target_": "pathlib.Path", "_args_": ["PLACE"]}]},
    "distutils.spawn.spawn": {"cmd": ["touch", "PLACE"]},
    "subprocess.run": {"args": ["touch", "PLACE"]},
    "tempfile.TemporaryDirectory._rmtree": {"name": "PLACE"},
    "os.system": {"command": "touch PLACE"},
    "torch.load": {"f": "PLACE"},
    "numpy.load": {"file": "PLACE"},
    "hydra.utils.instantiate": {"config": {"_target_": "os.system", "command": "touch PLACE"}},
    "medldm.parts.find_part": {"target": "os.system"},
}
# Where it stands in a config: an own part, one inside a part, one that is dropped before use, a new key.
PLACES = ("autoencoder", "autoencoder.quantizer", "optimizer", "extra", "extra.deep.deeper")


def save(content, path):
    torch.save(content, path)
    return path


def planted(content, where, value):
    """A copy of a checkpoint's content with `value` at the dotted key of its model's config."""
    content = content | {"medldm": copy.deepcopy(content["medldm"])}
    node = content["medldm"]["model"]
    *parents, last = where.split(".")
    for key in parents:
        node = node.setdefault(key, {})
    node[last] = value
    return content


def attack(target, mark):
    def placed(value):
        if isinstance(value, dict):
            return {key: placed(part) for key, part in value.items()}
        if isinstance(value, list):
            return [placed(part) for part in value]
        return value.replace("PLACE", str(mark))

    return {"_target_": target} | placed(HOSTILE[target])


@pytest.fixture
def refused(first_stage, tmp_path):
    """Plants a value into a config and gives the line that reading it ends in; nothing may have been run."""

    def told(where, value):
        mark = tmp_path / "mark"
        path = save(planted(load(first_stage), where, value), tmp_path / "hostile.ckpt")
        with pytest.raises(InputError) as caught:
            load_module(path)
        assert not mark.exists() and "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    return told


@pytest.mark.parametrize("target", HOSTILE)
def test_a_part_that_is_not_listed_is_refused_before_it_is_imported(target, refused, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.import_module", lambda *_: pytest.fail("imported"))
    assert target in refused("autoencoder", attack(target, tmp_path / "mark"))


@pytest.mark.parametrize("where", PLACES)
def test_it_is_refused_wherever_it_stands(where, refused, tmp_path):
    assert "os.system" in refused(where, attack("os.system", tmp_path / "mark"))


def test_it_is_refused_inside_a_list_and_in_the_first_stage(diffusion, refused, tmp_path):
    assert "os.system" in refused("slice_axes", [0, [attack("os.system", tmp_path / "mark")]])
    content = load(diffusion)
    content["medldm"]["first_stage"]["model"]["autoencoder"] = attack("os.system", tmp_path / "mark")
    with pytest.raises(InputError, match="first_stage: its config: autoencoder names 'os.system'"):
        load_module(save(content, tmp_path / "nested.ckpt"))


@pytest.mark.parametrize(
    ("where", "value", "line"),
    [
        ("pixel_loss", "${oc.env:HOME}", "interpolation"),
        ("autoencoder._args_", [1], "_args_"),
        ("autoencoder._convert_", "all", "_convert_"),
        ("autoencoder._recursive_", False, "_recursive_"),
        ("autoencoder._partial_", "yes", "_partial_"),
        ("autoencoder._target_", ["os.system"], "none of medldm's parts"),
        ("autoencoder.channels", [10**12], "beyond any model's size"),
        ("autoencoder.quantizer.num_codes", 2**20, "does not fit the model of its config"),
        ("autoencoder.num_res_blocks", [10**9, 1], "beyond any model's size"),
        ("autoencoder.channels", b"16", "a bytes, which is no plain data"),
        ("autoencoder.channels", "wide", "model.autoencoder.channels=wide: give a list of whole numbers"),
        ("autoencoder", None, "model.autoencoder=None: give a part with a _target_"),
        ("kind", "gan", "unlike its config"),
    ],
)
def test_whatever_no_config_of_a_model_holds_is_refused(where, value, line, refused):
    assert line in refused(where, value)


def test_a_model_larger_than_its_weights_is_refused_before_it_is_allocated(first_stage, refused):
    levels = load(first_stage)["medldm"]["model"]["autoencoder"]["channels"]
    assert "larger than its weights" in refused("autoencoder.channels", [2**18] * len(levels))


def test_a_config_nested_without_end_is_refused(refused):
    value = "x"
    for _ in range(300):  # a third of what torch can write
        value = [value]
    assert "nested deeper" in refused("extra", value)


def commands(path, prepared, output):
    """Every way a checkpoint enters medldm, by its key on the command line."""
    root, out = f"data.root={prepared}", f"output={output}"
    return {
        "sample": (sample, compose_config("sample", f"checkpoint={path}", root, out)),
        "encode": (encode, compose_config("encode", f"checkpoint={path}", root)),
        "translate": (
            translate,
            compose_config("translate", f"checkpoint={path}", "source=x.nii.gz", "source_modality=t1", out),
        ),
        "init_from": (train, train_config(prepared, output, VQVAE, f"init_from={path}")),
        "resume": (train, train_config(prepared, output, VQVAE, f"resume={path}")),
        "first_stage": (train, train_config(prepared, output, LDM, f"model.first_stage.checkpoint={path}")),
    }


@pytest.mark.parametrize("name", ["sample", "encode", "translate", "init_from", "resume", "first_stage"])
def test_no_command_runs_what_a_checkpoint_names(name, first_stage, prepared, tmp_path):
    mark, output = tmp_path / "mark", tmp_path / "out"
    path = save(planted(load(first_stage), "autoencoder", attack("os.system", mark)), tmp_path / "x.ckpt")
    module, cfg = commands(path, prepared, output)[name]
    with pytest.raises(InputError, match="'os.system', which is none of medldm's parts"):
        module.task(cfg)
    assert not mark.exists() and not output.exists()


def test_evaluation_does_not_run_what_a_segmenter_names(first_stage, tmp_path):
    mark = tmp_path / "mark"
    path = save(planted(load(first_stage), "autoencoder", attack("os.system", mark)), tmp_path / "x.ckpt")
    with pytest.raises(InputError, match="none of medldm's parts"):
        evaluate.load_segmenter(str(path), (1, 64, 64), torch.device("cpu"), {})
    assert not mark.exists()


def test_a_part_of_ones_own_is_trusted_by_name(first_stage, tmp_path, monkeypatch):
    target = "tests.models.test_hostile_checkpoints.own_autoencoder"
    content = load(first_stage)
    content["medldm"]["model"]["autoencoder"]["_target_"] = target
    path = save(content, tmp_path / "own.ckpt")
    with pytest.raises(InputError, match=parts.TRUSTED):
        load_module(path)
    monkeypatch.setenv(parts.TRUSTED, f"elsewhere.Net, {target}")
    assert load_module(path).state_dict().keys() == load_module(first_stage).state_dict().keys()


def own_autoencoder(*args, **kwargs):
    return parts.find_part("medldm.networks.autoencoder.VQAutoencoder")(*args, **kwargs)


def test_every_part_of_the_list_is_there():
    assert all(callable(parts.find_part(target)) for target in parts.PARTS)


def test_a_part_that_moved_is_found_under_its_old_name(first_stage, monkeypatch):
    monkeypatch.setitem(parts.PARTS, "medldm.old.Net", "medldm.networks.autoencoder.VQAutoencoder")
    description = load(first_stage)["medldm"]
    description["model"]["autoencoder"]["_target_"] = "medldm.old.Net"
    module = build_module(description["model"], description["facts"])
    assert type(module.autoencoder).__name__ == "VQAutoencoder"


def test_each_key_that_does_not_fit_is_named(first_stage, tmp_path):
    content = load(first_stage)
    state = dict(content["state_dict"])
    names = [name for name, value in state.items() if value.ndim > 1][:5]
    del state[names[0]]
    state[names[1]] = torch.zeros(3, 5)
    state[names[2]] = torch.full_like(state[names[2]], float("nan"))
    state[names[3]] = state[names[3]].to(torch.complex64)
    state[names[4]] = state[names[4]].to(torch.int64)
    path = save(content | {"state_dict": state | {"more": torch.zeros(1)}}, tmp_path / "other.ckpt")
    with pytest.raises(InputError) as caught:
        load_module(path)
    told = ("is missing", "is (3, 5), not", "holds values that are not finite")
    told += ("is torch.complex64, not torch.float32", "is torch.int64, not torch.float32")
    for text in (*map(" ".join, zip(names, told, strict=True)), "more is not the model's"):
        assert text in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(1).expand(10**12),
        torch.zeros(10**6, 10**6, device="meta"),
        torch.sparse_coo_tensor(size=(10**6, 10**6)),
        "text",
    ],
    ids=["expanded", "meta", "sparse", "text"],
)
def test_a_tensor_without_its_values_is_named(value, first_stage, tmp_path):
    content = load(first_stage)
    name = next(iter(content["state_dict"]))
    path = save(content | {"state_dict": content["state_dict"] | {name: value}}, tmp_path / "huge.ckpt")
    with pytest.raises(InputError, match=f"{path}: .*"):
        load_module(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "one"},
        {"stage": None},
        {"model": []},
        {"facts": None},
        {"facts": {"image_channels": 10**12}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_description_of_another_shape_is_named(change, first_stage, tmp_path):
    content = load(first_stage)
    path = save(content | {"medldm": content["medldm"] | change}, tmp_path / "odd.ckpt")
    with pytest.raises(InputError, match=f"{path}: .*({next(iter(change))}|size)"):
        read_checkpoint(path)


@pytest.mark.parametrize("value", [0.5, "first.ckpt", [1], True])
def test_a_stage_that_is_no_part_of_a_config_is_named(value, diffusion, tmp_path):
    content = load(diffusion)
    content["medldm"]["model"]["first_stage"] = value
    path = save(content, tmp_path / "odd.ckpt")
    with pytest.raises(InputError, match=f"{path}: .* in the place of its first_stage; give one"):
        read_checkpoint(path)


def test_a_second_stage_loads_no_file_that_its_config_names(diffusion, first_stage, tmp_path):
    content = load(diffusion)
    del content["medldm"]["first_stage"]
    with pytest.raises(InputError, match="lacks the description of its first_stage"):
        load_module(save(content, tmp_path / "bare.ckpt"))


def test_an_archive_larger_than_its_file_is_refused(first_stage, tmp_path):
    path = tmp_path / "bomb.ckpt"
    with zipfile.ZipFile(first_stage) as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as small:
        for entry in whole.infolist():
            small.writestr(entry.filename, whole.read(entry))
    with pytest.raises(InputError, match=f"{path}: not a readable checkpoint"):
        load_first_stage(path)


def test_a_pickle_that_calls_is_refused(tmp_path):
    class Call:
        def __reduce__(self):
            return (open, (str(tmp_path / "mark"), "w"))

    path, buffer = tmp_path / "call.ckpt", io.BytesIO()
    pickle.dump({"medldm": Call()}, buffer)
    path.write_bytes(buffer.getvalue())
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read_checkpoint(path)
    assert not (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s[0]["state"][0].update(exp_avg=torch.zeros(1)), "does not fit the parameters"),
        (lambda s: s[0]["state"][0].update(step=torch.zeros(7)), "does not fit the parameters"),
        (lambda s: s[0]["state"].update({999: s[0]["state"][0]}), "the state of its optimiser is damaged"),
        (lambda s: s[0]["param_groups"].pop(), "param_groups: is no list of 2 entries"),
        (lambda s: s[0]["param_groups"][0].update(lr="fast"), "param_groups.0.lr: is fast in the place of"),
        (lambda s: s[0]["param_groups"][0].update(eps=float("nan")), "param_groups.0.eps: is nan"),
        (lambda s: s[0]["state"][0].pop("exp_avg_sq"), "does not fit the parameters"),
        (lambda s: s[0]["state"][0].update(step="x"), "does not fit the parameters"),
        (lambda s: s[0]["state"][0].update(exp_avg=0.5), "does not fit the parameters"),
        (lambda s: change_moment(s, torch.Tensor.to, torch.complex64), "does not fit the parameters"),
        (lambda s: change_moment(s, torch.Tensor.to_sparse), "does not fit the parameters"),
        (lambda s: change_moment(s, lambda m: torch.zeros(()).expand(m.shape)), "does not fit the param"),
        (lambda s: change_moment(s, lambda m: m.to("meta")), "does not fit the parameters"),
        (lambda s: s.append(s[0]), "does not hold the state of"),
        (lambda s: s.clear(), "does not hold the state of"),
    ],
)
def test_a_state_of_an_optimiser_that_does_not_fit_is_refused(change, line, first_stage):
    content = load(first_stage)
    module = load_module(first_stage)
    check_optimizers(first_stage, content, module)
    states = copy.deepcopy(content["optimizer_states"])
    change(states)
    with pytest.raises(InputError, match=line):
        check_optimizers(first_stage, content | {"optimizer_states": states}, module)


def change_moment(states: list, change, *options) -> None:
    kept = states[0]["state"][0]
    kept["exp_avg"] = change(kept["exp_avg"], *options)


def changed(content: dict, key: str, value) -> dict:
    """The content with another value under a dotted key; without it where the value is `...`."""
    content = copy.copy(content)
    first, _, rest = key.partition(".")
    if rest:
        content[first] = changed(content[first], rest, value)
    elif value is ...:
        del content[first]
    else:
        content[first] = value
    return content


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("data.subjects.train", [["a"]], "the record of its data: subjects.train.0: Input should be a valid"),
        ("data.dataset", ..., "the record of its data: dataset: Field required"),
        ("data.images", {"a": [1]}, "the record of its data: images.a.0: Input should be a valid string"),
        ("init_from", {"stage": "diffusion", "data": 3}, "its init_from: the record of its data: "),
        ("init_from", "x", "its init_from does not describe a model"),
        ("facts.num_classes", "4", "the facts of its data: num_classes: Input should be a valid integer"),
        ("facts.view_names", 3, "the facts of its data: view_names: "),
        ("first_stage.sha256", None, "its first_stage does not state its sha256"),
        ("first_stage.facts.spatial_dims", 4, "its first_stage: the facts of its data: spatial_dims: "),
    ],
)
def test_what_a_checkpoint_records_has_a_form(key, value, line, diffusion, tmp_path):
    path = save(changed(load(diffusion), f"medldm.{key}", value), tmp_path / "a.ckpt")
    with pytest.raises(InputError) as told:
        load_module(path)
    assert str(path) in str(told.value) and line in str(told.value) and "\n" not in str(told.value)


STATES = [
    ("global_step", ..., "global_step: Field required"),
    ("global_step", -1, "global_step: Input should be greater"),
    ("epoch", "two", "epoch: Input should be a valid integer"),
    ("pytorch-lightning_version", None, "pytorch-lightning_version: Input should be a valid string"),
    ("loops", [], "loops: Input should be a valid dictionary"),
    ("loops.fit_loop", {}, "loops.fit_loop: has no "),
    (
        "loops.fit_loop.epoch_progress.current.ready",
        "x",
        "progress.current.ready: is x in the place of 0",
    ),
    ("callbacks.Checkpoints.best", "x", "best: Input should be a valid number"),
    ("callbacks.Checkpoints", {"kept": []}, "best: Field required"),
    ("CaseDataModule.batch", float("nan"), "CaseDataModule.batch: is nan in the place of 0"),
    ("lr_schedulers", [{}], "lr_schedulers.0: has no "),
    ("lr_schedulers", [], "lr_schedulers: is no list of 1 entries"),
    ("random_state", {}, "its random_state is damaged"),
    ("random_state", {"cpu": torch.zeros(3)}, "its random_state is damaged"),
    ("epoch_count", torch.zeros(2, 3, 5), "what this model keeps beside its weights is damaged"),
    ("state_dict", {}, "its state_dict does not fit the model: "),
]


@pytest.mark.parametrize(("key", "value", "line"), STATES, ids=[f"{key}-{line}" for key, _, line in STATES])
def test_a_training_does_not_go_on_from_another_state(key, value, line, first_stage, prepared, tmp_path):
    path = save(changed(load(first_stage), key, value), tmp_path / "a.ckpt")
    words = (VQVAE, f"resume={path}", "trainer.max_steps=4")
    with pytest.raises(InputError) as told:
        train.task(train_config(prepared, tmp_path / "run", *words))
    assert str(path) in str(told.value) and line in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("ema.n_averaged", ..., "ema: has no n_averaged"),
        ("ema.n_averaged", 3, "ema.n_averaged: is 3 in the place of"),
        ("ema.more", torch.zeros(1), "its ema does not fit the model: more is not the model's"),
        ("averages.num_updates", "x", "averages.num_updates: is x in the place of 0"),
        ("averages.weights", {}, "averages.weights: has no "),
    ],
)
def test_averages_of_another_form_are_refused(key, value, line, diffusion):
    content, module = load(diffusion), load_module(diffusion)
    check_averages(content, module.ema_modules, diffusion)
    with pytest.raises(InputError, match=line):
        check_averages(changed(content, key, value), module.ema_modules, diffusion)
