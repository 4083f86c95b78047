"""Weights divided over two processes (FSDP2, gloo) train as one process does."""

import os
import socket

import pytest
import torch
from pytorch_lightning.callbacks import Callback

from medldm.callbacks import Pictures, PowerAverages
from medldm.errors import InputError
from medldm.networks.discriminator import PatchDiscriminator
from medldm.training.sharding import check_layout, check_sharded
from tests.training import LDM, LONGER, PLAIN_SGD, load, read_metrics, run_training

TWO_PARTS = (
    "trainer.strategy=fsdp", "trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=2",
)  # fmt: skip


def train_two_ranks(root, run_dir, *overrides) -> None:
    """A training in two forked processes, which Lightning takes for ones that somebody else has started."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    children = []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                os.environ.update(variables, LOCAL_RANK=str(rank))
                torch.set_num_threads(1)
                run_training(root, run_dir, *overrides, *TWO_PARTS)
                status = 0
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]


def test_divided_weights_train_as_whole_ones_and_go_on_with_another_number_of_processes(
    prepared, first_stage, tmp_path
):
    """Two updates in two processes, one more after a resume, and the last one in one process, against four in
    one. Blocks are computed again in the backward pass. The optimiser has momentum, and is none of Adam's
    kind, whose first steps are as large where a gradient is all rounding.
    """
    options = (
        LDM, *LONGER, *PLAIN_SGD, "+model.optimizer.momentum=0.9", "model.network.use_checkpoint=true",
        f"model.first_stage.checkpoint={first_stage}", "model.conditioner.drop_all_prob=0.3",
        "trainer.gradient_clip_val=0.05", "trainer.precision=32-true", "callbacks.pictures=null",
        "trainer.val_check_interval=2",
    )  # fmt: skip
    parts, whole = tmp_path / "parts", tmp_path / "whole"
    train_two_ranks(prepared, parts, *options, "trainer.max_steps=2")
    train_two_ranks(prepared, parts, *options, "resume=auto", "trainer.max_steps=3")
    for folder in (parts, whole):
        run_training(prepared, folder, *options, "resume=auto", "trainer.max_steps=4")
    contents = [load(folder / "checkpoints/last.ckpt") for folder in (parts, whole)]
    compare(*contents)
    rows = [[row for row in read_metrics(folder) if row["train/loss"]] for folder in (parts, whole)]
    assert len(rows[0]) == len(rows[1]) == 4
    last = [float(row[-1]["train/loss"]) for row in rows]  # before, each process told of its part of a batch
    assert last[0] == pytest.approx(last[1], rel=1e-5)


def compare(one, two) -> None:
    """Weights, average and momentum are equal to float tolerance, in one order and shape."""
    assert one["global_step"] == two["global_step"] == 4
    for part in ("state_dict", "ema"):
        assert list(one[part]) == list(two[part])
        torch.testing.assert_close(one[part], two[part], atol=2e-6, rtol=1e-5)
    states = [content["optimizer_states"][0] for content in (one, two)]
    assert [group["params"] for group in states[0]["param_groups"]] == [
        group["params"] for group in states[1]["param_groups"]
    ]
    assert states[1]["state"].keys() == states[0]["state"].keys() and len(states[0]["state"]) > 20
    for number, entries in states[1]["state"].items():
        torch.testing.assert_close(states[0]["state"][number], entries, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize(
    ("callbacks", "automatic", "num_ranks", "message"),
    [
        ([Callback()], True, 2, None),
        ([], True, 1, "the run is one process"),
        ([], False, 2, "steps its optimisers by itself"),
        ([Pictures("samples")], True, 2, r"callbacks\.pictures=null"),
        ([PowerAverages("run", every_n_steps=1)], True, 2, r"callbacks\.post_hoc_ema=null"),
    ],
)
def test_what_cannot_be_divided_is_refused(callbacks, automatic, num_ranks, message):
    module = PatchDiscriminator(2, channels=(4, 8), strides=(2, 2), norm="group")
    module.automatic_optimization = automatic
    if message is None:
        check_sharded(module, callbacks, num_ranks)
        return
    with pytest.raises(InputError, match=f"trainer.strategy=fsdp: .*{message}"):
        check_sharded(module, callbacks, num_ranks)


def test_batch_norms_and_layouts_are_refused():
    module = PatchDiscriminator(2, channels=(4, 8), strides=(2, 2), norm="batch")
    module.automatic_optimization = True
    with pytest.raises(InputError, match="batch norms"):
        check_sharded(module, [], 2)
    check_layout("auto", "auto")
    with pytest.raises(InputError, match="compile=true: does not go with"):
        check_layout("auto", True)
    with pytest.raises(InputError, match="channels_last=true: does not go with"):
        check_layout(True, "auto")
