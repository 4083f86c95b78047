"""A control branch is trained on a frozen base, is saved with it, and samples as any model does."""

import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from medldm.build import load_module, rebuild
from medldm.commands import sample
from medldm.data.records import read_images
from medldm.errors import InputError
from medldm.fingerprints import file_sha256
from medldm.held_out import stages_of
from medldm.networks.control import ControlledUNet
from medldm.training.base import check_conditions
from tests.helpers import compose_config
from tests.training import LDM, first_difference, load, make_batches, run_training

CONTROL = "experiment=cardiac2d/control"
UNCONDITIONAL = (LDM, "model/conditioner=none")


@pytest.fixture(scope="module")
def base(prepared, first_stage, tmp_path_factory):
    """last.ckpt of an unconditional model after two updates."""
    run_dir = tmp_path_factory.mktemp("base") / "run"
    stage = f"model.first_stage.checkpoint={first_stage}"
    return run_training(prepared, run_dir, *UNCONDITIONAL, stage, "model.optimizer.lr=1e-2")


@pytest.fixture(scope="module")
def controlled(prepared, base, tmp_path_factory):
    """last.ckpt of a branch on it after two updates."""
    run_dir = tmp_path_factory.mktemp("controlled") / "run"
    options = (f"model.adapter.checkpoint={base}", "model.optimizer.lr=1e-2", "model.warmup_steps=0")
    return run_training(prepared, run_dir, CONTROL, *options)


def test_training_changes_the_branch_and_its_hint_alone(base, controlled):
    theirs, own = load_module(base), load_module(controlled)
    assert first_difference(own.network.base.state_dict(), theirs.network.state_dict()) is None
    assert first_difference(own.first_stage.state_dict(), theirs.first_stage.state_dict()) is None
    branch = load(controlled)["state_dict"]
    assert all(branch[f"network.branch.controls.{i}.weight"].any() for i in range(4))
    content = load(controlled)
    trained = {name for name in content["ema"] if name.startswith("module.")}
    assert {name.split(".")[1] for name in trained} == {"network", "conditioner"}
    assert all(f"module.network.{name}" in trained for name, _ in own.network.branch.named_parameters())
    assert not any(".base." in name for name in trained)
    frozen = (own.schedule, own.conditioner.base, own.network.base)
    assert not any(p.requires_grad for part in frozen for p in part.parameters())
    stepped = sum(len(group["params"]) for group in content["optimizer_states"][0]["param_groups"])
    parts = (own.network.branch, own.conditioner.hint)
    assert stepped == sum(len(list(part.parameters())) for part in parts)


def test_step_0_is_the_base_bit_for_bit(prepared, base, tmp_path):
    """A run whose rate is 0 has what a run of no updates would have: its samples are the base's."""
    options = (f"model.adapter.checkpoint={base}", "model.optimizer.lr=0")
    own = load_module(run_training(prepared, tmp_path / "run", CONTROL, *options))
    theirs = load_module(base)
    theirs.network.requires_grad_(False)  # a CPU has other kernels for weights without gradients
    (batch,) = make_batches(1, 2, 64)
    options = {"sampler": theirs.sampler, "seed": 3}
    expected = theirs.sample(batch, ["a", "b"], (8, 8), **options)
    assert torch.equal(own.sample(batch, ["a", "b"], (8, 8), **options), expected)
    nn.init.constant_(own.network.branch.controls[0].bias, 1.0)
    assert not torch.equal(own.sample(batch, ["a", "b"], (8, 8), **options), expected)


def test_a_checkpoint_names_its_base_and_whom_that_was_trained_on(base, controlled):
    description = load(controlled)["medldm"]
    assert description["adapter"]["sha256"] == file_sha256(base)
    assert description["adapter"]["data"] == load(base)["medldm"]["data"]
    assert [stage for stage, _ in stages_of(description)] == [
        "diffusion model", "autoencoder model", "diffusion model"
    ]  # fmt: skip
    assert description["model"]["network"] == load(base)["medldm"]["model"]["network"]


def test_a_resumed_branch_is_bit_equal_to_one_that_never_stopped(prepared, base, tmp_path):
    options = (CONTROL, f"model.adapter.checkpoint={base}", "trainer.limit_train_batches=1.0")
    options += ("data.batch_size=4",)
    whole = run_training(prepared, tmp_path / "whole", *options, "trainer.max_steps=6")
    halves = run_training(prepared, tmp_path / "halves", *options, "trainer.max_steps=3")
    again = run_training(prepared, tmp_path / "halves", *options, "trainer.max_steps=6", "resume=auto")
    assert halves == again and load(again)["global_step"] == 6
    for key in ("state_dict", "ema", "optimizer_states"):
        assert first_difference(load(whole)[key], load(again)[key]) is None
    moved = tmp_path / "other.ckpt"
    shutil.copy(base, moved)  # the same file elsewhere will do
    args = (tmp_path / "halves", CONTROL, *options[2:], "trainer.max_steps=6", f"resume={again}")
    run_training(prepared, *args, f"model.adapter.checkpoint={moved}")
    content = load(base)
    content["state_dict"]["network.stem.bias"] += 1
    torch.save(content, moved)
    with pytest.raises(InputError, match="model.adapter.checkpoint: not the file that resume="):
        run_training(prepared, *args, f"model.adapter.checkpoint={moved}")


def test_guidance_windows_and_dropped_conditions(controlled):
    module = load_module(controlled)
    (batch,) = make_batches(1, 2, 64)
    assert module.condition_keys == ("mask",) and module.conditioner.groups == ("mask",)
    assert module.conditioner.trains_null and module.conditioner.dropped_groups == ("mask",)
    for layer in module.network.branch.controls:
        nn.init.normal_(layer.weight)
    plain = module.sample(batch, ["a", "b"], (8, 8))
    without = module.sample(batch, ["a", "b"], (8, 8), drop=("mask",))
    module.sampler.guidance_scale = 0
    assert torch.equal(module.sample(batch, ["a", "b"], (8, 8)), without)
    assert not torch.equal(plain, without)
    module.sampler.guidance_scale = 2
    assert not torch.equal(module.sample(batch, ["a", "b"], (8, 8)), plain)


def test_a_window_sees_the_hint_below_it(controlled):
    module = load_module(controlled)
    (batch,) = make_batches(1, 2, 64)
    conditions = module.conditions(batch, (8, 8))
    box = (slice(0, 4), slice(2, 6))
    whole = conditions((slice(0, 8), slice(0, 8))).hint
    assert whole.shape == (2, 32, 8, 8)
    torch.testing.assert_close(conditions(box).hint, whole[..., 0:4, 2:6])


def test_a_branch_on_a_conditioned_base_keeps_both_conditions(prepared, diffusion, tmp_path):
    """Edges and map concatenated by the base, the map to the branch: one group each, withheld from both."""
    options = (CONTROL, f"model.adapter.checkpoint={diffusion}", "trainer.max_steps=1")
    module = load_module(run_training(prepared, tmp_path / "run", *options))
    assert module.conditioner.groups == ("edges", "mask", "attributes")
    assert set(module.condition_keys) == {"edges", "mask"}
    (batch,) = make_batches(1, 2, 64)
    full, bare = module.condition(batch), module.condition(batch, ("mask",))
    assert full.concat.shape == (2, 8, 8, 8) and full.hint.shape == (2, 32, 8, 8)
    assert not torch.equal(full.hint, bare.hint) and not torch.equal(full.concat, bare.concat)
    drop = module.conditioner.sample_drop(4000, torch.Generator().manual_seed(0))
    assert drop.float().mean(0)[1].item() == pytest.approx(0.1, abs=0.02)  # as often as the hint says
    command = (f"checkpoint={tmp_path / 'run/checkpoints/last.ckpt'}", f"data.root={prepared}")
    sample.task(compose_config("sample", *command, "limit=1", f"output={tmp_path / 'out'}"))
    assert len(list(read_images(tmp_path / "out"))) == 12  # the slices of one subject


def test_a_branch_in_3d_on_a_map_in_spade_norms(prepared_3d, tmp_path):
    """Med-LSDM's network on the volumes themselves, the map in its SPADE norms and in the branch."""
    pixels = ("model/first_stage=pixel", "data.spatial_dims=3", "trainer.max_steps=1")
    options = ("experiment=medlsdm/folder_ldm", "model/conditioner=onehot", *pixels)
    base = run_training(prepared_3d, tmp_path / "base", *options)
    options = ("experiment=medlsdm/control", f"model.adapter.checkpoint={base}", "trainer.max_steps=1")
    last = run_training(prepared_3d, tmp_path / "run", *options)
    module = load_module(last)
    assert isinstance(module.network, ControlledUNet) and module.network.spatial_dims == 3
    assert module.conditioner.groups == ("mask",)


def other_facts(path, place, **changes):
    """A checkpoint whose data stated other facts; what these make larger has new weights."""
    content = load(path)
    content["medldm"]["facts"] |= changes
    if "num_classes" in changes:
        content["state_dict"] = rebuild(content["medldm"], "", largest=2**30).state_dict()
        content.pop("ema")
    torch.save(content, place)
    return place


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"label_names": ["background", "liver", "spleen", "kidney"]}, "reads the classes background, liver"),
        (
            {"view_names": ["axial", "coronal"]},
            r"reads view in \[axial, coronal\], the dataset has \[SA, LA\]",
        ),
        (
            {"label_names": None, "num_classes": 6},
            "with the facts of this dataset, it does not fit the model",
        ),
    ],
)
def test_a_frozen_base_that_would_take_conditions_for_others_is_refused(
    prepared, diffusion, tmp_path, changes, text
):
    if "view_names" in changes:
        entry = {"kind": "categorical", "names": changes["view_names"]}
        changes = changes | {"attributes": load(diffusion)["medldm"]["facts"]["attributes"] | {"view": entry}}
    base = other_facts(diffusion, tmp_path / "base.ckpt", **changes)
    with pytest.raises(InputError, match=rf"model.adapter.checkpoint=.*base.ckpt: {text}"):
        run_training(prepared, tmp_path / "run", CONTROL, f"model.adapter.checkpoint={base}")


def test_a_number_that_the_base_scaled_by_another_range_is_refused(diffusion):
    ranges = [{"kind": "scalar", "range": limits, "unit": "T"} for limits in ([1.5, 3.0], [0.5, 7.0])]
    facts = load(diffusion)["medldm"]["facts"]
    trained, others = ({**facts, "attributes": {"field_T": entry}} for entry in ranges)
    conditioner = SimpleNamespace(attributes=("field_T",))
    base = SimpleNamespace(condition_keys=("mask",), facts=trained, conditioner=conditioner)
    check_conditions(base, trained, "base")
    with pytest.raises(
        InputError, match=r"base: reads field_T in \[1.5, 3.0\], the dataset has \[0.5, 7.0\]"
    ):
        check_conditions(base, others, "base")
    check_conditions(
        SimpleNamespace(**vars(base) | {"conditioner": SimpleNamespace(attributes=())}), others, ""
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ((), "model.adapter.checkpoint: not given"),
        (("model.adapter.checkpoint={first_stage}",), "of the kind autoencoder; give a latent diffusion"),
        (("model.adapter.checkpoint={controlled}",), "has a branch itself; give the checkpoint below it"),
        (
            ("model.adapter.checkpoint={base}", "+model/objective=flow"),
            "model.objective has no effect: it is that of model.adapter.checkpoint",
        ),
        (
            ("model.adapter.checkpoint={base}", "model.adapter.conditioner.encoder=null"),
            "model.adapter.conditioner.encoder=None gives a control branch nothing to read",
        ),
        (
            ("model.adapter.checkpoint={base}", "model.adapter.conditioner.use_view=true"),
            "model.adapter.conditioner: a control branch reads images alone",
        ),
    ],
)
def test_a_base_that_cannot_be_controlled_is_told_in_one_line(
    prepared, first_stage, base, controlled, tmp_path, options, text
):
    paths = {"first_stage": first_stage, "base": base, "controlled": controlled}
    with pytest.raises(InputError, match=text):
        run_training(prepared, tmp_path / "run", CONTROL, *(option.format(**paths) for option in options))
