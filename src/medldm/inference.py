"""What every command that runs a trained model shares: the device, the precision, and batches that follow
the cases.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from medldm.data.dataset import CaseDataset, Item, expand


def pick_device(name: str = "auto") -> torch.device:
    if name != "auto":
        return torch.device(name)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bf16 on a GPU that multiplies it, float32 elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch on a device in the data types of `Batch`; it travels in those of the file."""
    return expand(
        {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
    )


def items_by_case(items: Sequence[Item]) -> dict[int, list[int]]:
    """case -> positions of its items in the dataset, in order."""
    by_case: dict[int, list[int]] = {}
    for position, item in enumerate(items):
        by_case.setdefault(item.case, []).append(position)
    return by_case


def case_batches(dataset: CaseDataset, positions: Sequence[int], batch_size: int) -> Iterator[dict[str, Any]]:
    """The items of one case in batches, in order."""
    for start in range(0, len(positions), batch_size):
        yield dataset.__getitems__([(0, p) for p in positions[start : start + batch_size]])
