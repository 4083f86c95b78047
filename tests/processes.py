"""A group of gloo processes in a test: forked, so that nothing is imported again."""

import os
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(task: Callable[[int], Any], folder: Path, world_size: int = 2) -> list[Any]:
    """What `task(rank)` returns on each rank: tensors, or containers of them."""
    children = []
    for rank in range(world_size):
        child = os.fork()
        if child == 0:
            os._exit(run_one(task, folder, rank, world_size))
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert statuses == [0] * world_size
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world_size)]


def run_one(task: Callable[[int], Any], folder: Path, rank: int, world_size: int) -> int:
    """Run `task` as one of several ranks and keep what it returns; the exit status of the process."""
    try:
        store = dist.FileStore(str(folder / "store"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
        torch.save(task(rank), folder / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        return 1
    return 0
