"""What would make the host wait for a GPU, found on a CPU as if a model and its batches lay on one.

Tensors that would be on the GPU are followed by their storage: weights, buffers, batches, what is made with a
`device=`, and whatever is computed from them.
"""

import traceback
import weakref
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
# Their result's size or value is known on the device alone.
READING_OPS = {
    aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.equal,
    aten.unique_consecutive, aten.bincount, aten.is_nonzero, aten.repeat_interleave,
}  # fmt: skip
INDEXING_OPS = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
READING_METHODS = {"cpu", "numpy", "tolist", "__array__"}


def tensors_in(*values: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, torch.Tensor)]


class DeviceTensors:
    """Which storages would be on the GPU, and what was found to read them."""

    def __init__(self) -> None:
        self.keys: set[int] = set()
        self.found: list[str] = []

    def add(self, *values: Any) -> None:
        for x in tensors_in(values):
            storage = x.untyped_storage()
            if storage._cdata not in self.keys:
                self.keys.add(storage._cdata)
                weakref.finalize(storage, self.keys.discard, storage._cdata)

    def has(self, *values: Any) -> bool:
        return any(x.untyped_storage()._cdata in self.keys for x in tensors_in(values))

    def report(self, what: str, *, of_lightning: bool = True) -> None:
        """`of_lightning` False: what Lightning does is no matter, as it has moved its own tensors before."""
        stack = traceback.extract_stack()
        frames = [f for f in stack if "/src/medldm/" in f.filename or "lightning" in f.filename]
        if frames and "lightning" in frames[-1].filename and not of_lightning:
            return
        where = frames[-1] if frames else stack[-4]
        self.found.append(f"{what} at {where.filename.rpartition('/')[2]}:{where.lineno} ({where.line})")


class OperatorWatch(TorchDispatchMode):
    def __init__(self, tensors: DeviceTensors) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        is_on_device = self.tensors.has(args, kwargs)
        packet = func.overloadpacket
        if is_on_device and packet in READING_OPS:
            self.tensors.report(str(func))
        if is_on_device and packet in INDEXING_OPS:
            indices = [x for x in tensors_in(args[1]) if x.dtype in (torch.bool, torch.uint8)]
            if indices:
                self.tensors.report(f"{func} by a mask")
        out = func(*args, **kwargs)
        if is_on_device:
            self.tensors.add(out)
        return out


class CallWatch(TorchFunctionMode):
    """Calls from Python, which name the device that they mean."""

    def __init__(self, tensors: DeviceTensors) -> None:
        super().__init__()
        self.tensors = tensors

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in READING_METHODS and self.tensors.has(args):
            self.tensors.report(f".{name}()")
        out = func(*args, **kwargs)
        if name == "to" and any(isinstance(x, torch.device | str) for x in (*args[1:], kwargs.get("device"))):
            if not (self.tensors.has(args[0]) or kwargs.get("non_blocking")):
                self.tensors.report(".to(device) without non_blocking", of_lightning=False)
            self.tensors.add(out)
        elif kwargs.get("device") is not None:
            if name in ("tensor", "as_tensor"):
                self.tensors.report(f"torch.{name}(..., device=)", of_lightning=False)
            self.tensors.add(out)
        return out


class HostReads(Callback):
    """Watches whole training steps from the `first` batch on; the last of the trainer's callbacks."""

    def __init__(self, first: int = 2) -> None:
        self.first, self.tensors = first, DeviceTensors()
        self.num_steps = 0
        self.modes: list[Any] = []

    def on_train_batch_start(
        self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx < self.first:
            return
        self.tensors.add(list(module.parameters()), list(module.buffers()), batch)
        self.tensors.add([list(optimizer.state.values()) for optimizer in trainer.optimizers])
        self.modes = [OperatorWatch(self.tensors), CallWatch(self.tensors)]
        for mode in self.modes:
            mode.__enter__()

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.modes:
            for mode in reversed(self.modes):
                mode.__exit__(None, None, None)
            self.modes = []
            self.num_steps += 1
