"""What all commands that run a trained model share: device, precision, and batches of single cases."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from medldm.data.loading.dataset import CaseDataset, Item, expand
from medldm.devices import inference_precision, mixed_precision, pick_device

__all__ = ["autocast", "case_batches", "items_by_case", "pick_device", "to_device"]


def autocast(device: torch.device, precision: str = "auto") -> torch.autocast:
    """The context in which a trained model runs: `auto` is bf16 on a GPU that multiplies it, float32
    elsewhere.
    """
    return mixed_precision(device, inference_precision(precision, device))


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
