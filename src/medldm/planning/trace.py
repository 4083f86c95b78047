"""What one training step costs, followed through its shapes: nothing is computed and no device is needed.

Under `StepTrace` every operation of PyTorch that launches a kernel is recorded with its floating-point
operations, the bytes that it must read and write at least, and the bytes alive while it runs. On fake tensors
(`FakeTensorMode`) this takes neither memory nor a GPU; on real ones it counts what really runs.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from medldm.networks.compiling import as_if_compiling
from medldm.planning.fusion import Graph, Region, num_launched, sums_bias, touched_bytes
from medldm.planning.kernels import fused

# Where CUDA's autocast and a CPU's, which traces run under, treat an operation differently (torch.amp's
# reference, "CUDA Ops that autocast to float32" and "CPU Ops that autocast to float32").
FLOAT32_ON_CUDA = {
    "layer_norm", "group_norm", "softmax", "log_softmax", "mse_loss", "l1_loss", "smooth_l1_loss", "kl_div",
    "cross_entropy", "nll_loss", "cosine_similarity", "softplus", "exp", "log", "pow", "sum", "prod",
    "cumsum", "norm", "rsqrt",
}  # fmt: skip
AS_GIVEN_ON_CUDA = {
    "interpolate", "pad", "grid_sample", "max_pool2d", "max_pool3d", "max_pool2d_with_indices",
    "max_pool3d_with_indices", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "upsample_nearest2d", "upsample_nearest3d", "upsample_bilinear2d", "upsample_trilinear3d",
}  # fmt: skip
# These read as many entries of their first tensor as they write.
GATHERS = {"index", "gather", "index_select", "embedding"}
# These write their first argument and do not read it.
OVERWRITE = {"copy_", "_foreach_copy_", "fill_", "zero_", "_foreach_zero_"}
# These allocate or look at memory and launch nothing.
FREE = {
    "empty",
    "empty_like",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "detach",
    "alias",
    "lift_fresh",
}


def onednn_flops(x: Tensor, weight: Tensor, *sizes: Any, out_val: Tensor, **options: Any) -> int:
    return conv_flop_count(x.shape, weight.shape, out_val.shape)


FLOPS = {**flop_registry, torch.ops.aten.mkldnn_convolution: onednn_flops}


class AutocastAsOnCUDA(TorchFunctionMode):
    """Gives operations the precision that CUDA's autocast would, while a CPU's autocast is on."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        if name in AS_GIVEN_ON_CUDA:
            with torch.autocast("cpu", enabled=False):
                return func(*args, **kwargs)
        if name in FLOAT32_ON_CUDA:
            args = tuple(widened(x) for x in args)
        return func(*args, **kwargs)


class AttentionAsOnCUDA(TorchDispatchMode):
    """Lays out what attention and its backward pass give as CUDA's kernel does: in the order of the axes in
    the memory of queries, keys and values. A CPU's kernel has an order of its own.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "_scaled_dot_product_flash_attention_for_cpu":
            return laid_out_as(args[0]), *out[1:]
        if name == "_scaled_dot_product_flash_attention_for_cpu_backward":
            return tuple(map(laid_out_as, args[1:4]))
        return out


def laid_out_as(x: Tensor) -> Tensor:
    """A new tensor (B, heads, L, c) with its axes in the memory in the order of those of x."""
    return torch.empty_like(x.transpose(1, 2)).transpose(1, 2)


def widened(x: object) -> object:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.bfloat16, torch.float16) else x


@dataclass
class Operation:
    """All calls of one operation of PyTorch in one precision."""

    name: str
    dtype: torch.dtype  # the narrowest floating type among its tensors, which decides what units multiply
    spatial_dims: int  # of a convolution's kernel; 0 for anything else
    num_calls: int = 0
    flops: float = 0.0
    num_bytes: float = 0.0  # its tensors, each read or written once
    num_kernels: int = 0


@dataclass
class Cost:
    """What a step needs, by operation, and the most bytes that tensors made by it hold at one time."""

    operations: dict[tuple, Operation] = field(default_factory=dict)
    unfused: dict[tuple, Operation] = field(default_factory=dict)  # those that a compiler would leave alone
    peak_bytes: int = 0
    peak_bytes_with_workspace: int = 0

    @property
    def flops(self) -> float:
        """Floating-point operations of products and convolutions, as `torch.utils.flop_counter`
        counts them.
        """
        return sum(op.flops for op in self.operations.values())

    @property
    def num_bytes(self) -> float:
        return sum(op.num_bytes for op in self.operations.values())

    @property
    def num_kernels(self) -> int:
        """The kernels that are launched; a fused or foreach one is for several tensors."""
        return sum(op.num_kernels for op in self.operations.values())

    def take_peaks(self, other: "Cost") -> None:
        """Of two ways to run the same step, both of which write what a compiler fuses, the smaller peak."""
        if other.peak_bytes < self.peak_bytes:
            self.peak_bytes = other.peak_bytes
            self.peak_bytes_with_workspace = other.peak_bytes_with_workspace

    def add(self, op: Operation, *, is_fused: bool, num_fused: int = 0) -> None:
        """Count one more call of an operation, of whose kernels a compiler fuses `num_fused` with others."""
        for table in (self.operations,) if is_fused else (self.operations, self.unfused):
            key = (op.name, op.dtype, op.spatial_dims)
            kept = table.setdefault(key, Operation(*key))
            kept.num_calls += op.num_calls
            kept.flops += op.flops
            kept.num_bytes += op.num_bytes
            kept.num_kernels += op.num_kernels - (num_fused if table is self.unfused else 0)


class StepTrace(TorchDispatchMode):
    """Records `cost` of everything that runs under it, below autograd: forward, backward, recomputation.

    Storages are followed by weak references, so a view counts once and memory is given back when it is in
    truth. A convolution may need scratch: the allowance is a copy of its tensors, for the layout that its
    kernel wants (`Cost.peak_bytes_with_workspace`).

    What blocks called through `block` would cost if they were compiled is in `compiled`, by the model of
    `fusion`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cost, self.graph = Cost(), Graph()
        self.alive, self.seen, self.numbers = 0, {}, {}
        self.num_storages = 0
        self.entered: list[int] = []  # calls of blocks that are running
        self.calls: list[range] = []  # of each call of a block, the numbers of its nodes of autograd

    @property
    def compiled(self) -> Cost:
        """The cost with blocks compiled; memory is that of the step as it ran."""
        num_kernels, num_bytes = (sum(v) for v in zip((0, 0), *fused(self.graph), strict=True))
        chains = Operation("fused", torch.float32, 0, num_kernels, 0.0, num_bytes, num_kernels)
        cost = Cost(dict(self.cost.unfused), {}, self.cost.peak_bytes, self.cost.peak_bytes_with_workspace)
        cost.add(chains, is_fused=True)
        return cost

    def block(self, call: Callable) -> Callable:
        """The call of a block, whose operations are noted as the block's."""

        def run(*args: Any, **kwargs: Any) -> Any:
            number, first = len(self.calls), torch.autograd._get_sequence_nr()
            self.calls.append(range(0))
            self.entered.append(number)
            try:
                with as_if_compiling():
                    out = call(*args, **kwargs)
                for x in tensors(out):
                    self.graph.hand_out(self.number(x))
                return out
            finally:
                self.entered.pop()
                self.calls[number] = range(first, torch.autograd._get_sequence_nr())

        return run

    def region(self) -> Region | None:
        """Where the operation that runs now belongs."""
        if self.entered:
            return Region(self.entered[-1], is_backward=False)
        node = torch._C._current_autograd_node()
        if node is None:
            return None
        number = node._sequence_nr()
        return next((Region(i, True) for i, numbers in enumerate(self.calls) if number in numbers), None)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        read = args[1:] if func.overloadpacket.__name__ in OVERWRITE else args
        inputs = list(tensors((read, {key: x for key, x in kwargs.items() if key != "out"})))
        known = {storage_of(x) for x in tensors((args, kwargs))}
        out = func(*args, **kwargs)
        outputs = list(tensors(out)) or written_in_place(func, args)
        for x in outputs:
            if storage_of(x) not in known:
                self.follow(x.untyped_storage())
        if launches(func, outputs, known):
            self.record(func, args, kwargs, out, inputs, outputs)
        return out

    def record(
        self, func: Any, args: tuple, kwargs: dict, out: Any, inputs: list[Tensor], outputs: list[Tensor]
    ) -> None:
        """Adds one operation, with its bytes and FLOPs, to the cost of the step."""
        touched, name = inputs + outputs, func.overloadpacket.__name__
        is_convolution = "convolution" in name
        op = Operation(name, narrowest_dtype(touched), touched[0].ndim - 2 if is_convolution else 0, 1)
        op.num_bytes = sum(map(touched_bytes, touched))
        if name in GATHERS:
            op.num_bytes -= max(0, touched_bytes(inputs[0]) - sum(map(touched_bytes, outputs)))
        count = FLOPS.get(func.overloadpacket)
        if count is not None:
            op.flops = count(*args, **kwargs, out_val=out)
        op.num_kernels, region = num_launched(func, args), self.region()
        stored = ([(x, self.number(x)) for x in values] for values in (inputs, outputs))
        is_fused = not self.graph.add(func, args, *stored, region)
        adds_bias = region is not None and name == "convolution" and len(inputs) == 3
        self.cost.add(op, is_fused=is_fused, num_fused=int(adds_bias))
        if sums_bias(func, args):  # a kernel of its own
            self.cost.add(bias_gradient(inputs[0]), is_fused=region is not None)
        workspace = sum(map(touched_bytes, touched)) if is_convolution else 0
        if "backward" in name:  # its gradients are its outputs: copies are needed of what comes in
            workspace -= sum(map(touched_bytes, tensors(out)))
        self.note_peak(workspace)

    def follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return
        self.seen[key] = weakref.finalize(storage, self.release, key, size)
        self.numbers.pop(key, None)
        self.alive += size
        self.note_peak(0)

    def number(self, x: Tensor) -> int:
        """Of its storage, never given again to another one."""
        key = storage_of(x)
        if key not in self.numbers:
            self.num_storages += 1
            self.numbers[key] = self.num_storages
        return self.numbers[key]

    def note_peak(self, workspace: int) -> None:
        cost = self.cost
        cost.peak_bytes = max(cost.peak_bytes, self.alive)
        cost.peak_bytes_with_workspace = max(cost.peak_bytes_with_workspace, self.alive + max(0, workspace))

    def release(self, key: int, size: int) -> None:
        del self.seen[key]
        self.numbers.pop(key, None)
        self.alive -= size


def bias_gradient(gradient: Tensor) -> Operation:
    """The sum over all but the channels of a convolution's result."""
    return Operation("bias_gradient", gradient.dtype, 0, 1, 0.0, touched_bytes(gradient), 1)


def tensors(tree: object) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))


def storage_of(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def written_in_place(func: Any, args: tuple) -> list[Tensor]:
    """What an operation that returns nothing has changed, as those on lists of tensors do."""
    return list(tensors(args[0])) if func._schema.is_mutable and args else []


def narrowest_dtype(values: list[Tensor]) -> torch.dtype:
    floating = [x.dtype for x in values if x.dtype.is_floating_point]
    return min(floating, key=lambda dtype: dtype.itemsize) if floating else torch.float32


def launches(func: Any, outputs: list[Tensor], known: set[int]) -> bool:
    """Whether an operation is work: views, allocations and questions about shapes are not."""
    if func.overloadpacket.__name__ in FREE or not outputs:
        return False
    return func._schema.is_mutable or any(storage_of(x) not in known for x in outputs)
