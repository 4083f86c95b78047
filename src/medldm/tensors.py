"""Reads and writes checkpoints as safetensors files: named tensors, and plain data beside them as JSON.

The format holds no code at all, and other programs read it. Tensors are named `state_dict/NAME` and
`ema/NAME`; under the key "medldm" of the metadata stands the description that a checkpoint holds, and under
"sha256" a digest of all tensors, as the format has no checksum of its own.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medldm.errors import InputError
from medldm.files import replacing

SAFETENSORS = ".safetensors"
PARTS_KEPT = ("state_dict", "ema")
PAIRS = "__pairs__"  # of a mapping whose keys are not all texts, which JSON has not


def is_safetensors(path: str | Path) -> bool:
    return str(path).lower().endswith(SAFETENSORS)


def library() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError("safetensors files need safetensors; run `pip install safetensors`") from error
    return safetensors.torch


def to_plain(value: Any) -> Any:
    """Plain data as JSON holds it, without a loss but of tuples, which become lists."""
    if isinstance(value, Mapping):
        if all(isinstance(key, str) for key in value):
            return {key: to_plain(part) for key, part in value.items()}
        return {PAIRS: [[key, to_plain(part)] for key, part in value.items()]}
    return [to_plain(part) for part in value] if isinstance(value, list | tuple) else value


def from_plain(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {PAIRS}:
            return {key: from_plain(part) for key, part in value[PAIRS]}
        return {key: from_plain(part) for key, part in value.items()}
    return [from_plain(part) for part in value] if isinstance(value, list) else value


def digest_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name]
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            total.update(value.reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def write_tensors(path: Path, content: Mapping[str, Any]) -> None:
    """The weights and the description of a checkpoint's `content`, without the state of its training."""
    tensors = {
        f"{part}/{name}": value.detach().cpu().clone().contiguous()
        for part in PARTS_KEPT
        for name, value in content.get(part, {}).items()
    }
    metadata = {
        "format": "pt",
        "medldm": json.dumps(to_plain(content["medldm"])),
        "sha256": digest_of_tensors(tensors),
    }
    data = library().save(tensors, metadata)
    with replacing(path) as aside:
        aside.write_bytes(data)


def read_tensors(data: bytes) -> dict[str, Any]:
    """The content that `write_tensors` was given. ValueError, or what the library raises, where the bytes are
    no such file or damaged.
    """
    tensors = library().load(data)
    size = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + size]).get("__metadata__") or {}
    content: dict[str, Any] = {"medldm": from_plain(json.loads(metadata["medldm"]))}
    for name, value in tensors.items():
        part, _, key = name.partition("/")
        if part not in PARTS_KEPT:
            raise ValueError(f"unknown part {part:.80}")
        content.setdefault(part, {})[key] = value
    if metadata.get("sha256") != digest_of_tensors(tensors):
        raise ValueError("its tensors differ from their digest")
    return content
