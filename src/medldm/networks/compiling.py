"""Calls the blocks of networks as a GPU needs it: weights are rounded to bf16 together, and kernels are
fused.

A block is a part of a network that marks itself by `is_block = True`. Each block is compiled by itself, so
that one that does not compile costs itself alone and not the network. `rounds_together = True` marks a part
that rounds the weights of all its blocks by one kernel where one process trains; several exchange gradients
while the backward pass goes on, and round block by block. `rounds_weights = True` marks a layer of another
kind whose weights are rounded with them.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from medldm.ranks import num_ranks

log = logging.getLogger(__name__)
Wrap = Callable[[Callable], Callable]  # makes the function that runs in the place of a block's call
LONGEST_ROW = 1024  # values that one program of a kernel can hold while it reduces them
LONGEST_SUM = 128  # values of a result that one program sums, one after the other
MOST_READS = 24  # a value that is made from more tensors is written, and not computed where it is used
NUM_VERSIONS = 256  # compiled versions of one class of blocks, whose blocks have different shapes


def outermost_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a module that are inside no other block."""
    if getattr(module, "is_block", False):
        yield module
        return
    for child in module.children():
        yield from outermost_blocks(child)


class Function(nn.Module):
    """A function of tensors as a block, so that its operations on single elements are compiled, too.

    function: it must not be a module, nor a closure over one, since copies of a module would call the
    original. parts: the modules whose weights it uses. They stay where they are registered. exact: whether it
    needs these weights in float32 where no gradient is recorded.
    """

    is_block = True

    def __init__(self, function: Callable, parts: Iterable[nn.Module] = (), *, exact: bool = False) -> None:
        super().__init__()
        self.function, self.parts, self.exact = function, list(parts), exact

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


_as_if = False


def is_compiling() -> bool:
    """Whether what runs now is followed by a compiler, or by a trace in its place: operations on elements are
    fused then, and products in another order may leave fewer tensors to write.
    """
    return torch.compiler.is_compiling() or _as_if


@contextmanager
def as_if_compiling(yes: bool = True) -> Iterator[None]:
    """A context in which `is_compiling()` says so."""
    global _as_if
    before, _as_if = _as_if, yes
    try:
        yield
    finally:
        _as_if = before


def same_weights(block: nn.Module) -> Callable:
    """Contexts for `torch.utils.checkpoint` in which what is computed again sees the present weights of the
    block, which may be rounded, and takes the same way through it.
    """
    as_if = _as_if
    tables = [(part._parameters, dict(part._parameters)) for part in block.modules() if part._parameters]

    @contextmanager
    def again() -> Iterator[None]:
        before = [dict(table) for table, _ in tables]
        try:
            for table, now in tables:
                table.update(now)
            with as_if_compiling(as_if):
                yield
        finally:
            for (table, _), old in zip(tables, before, strict=True):
                table.update(old)

    return lambda: (nullcontext(), again())


def checkpointed(block: nn.Module, call: Callable, *args: Any) -> Any:
    """`call(*args)` of a block, whose activations are computed again in the backward pass instead of kept."""
    if torch.compiler.is_compiling():  # compiled code has the weights as arguments
        return checkpoint(call, *args, use_reentrant=False)
    return checkpoint(call, *args, use_reentrant=False, context_fn=same_weights(block))


def wrap_blocks(module: nn.Module, wrap: Wrap) -> None:
    """Makes every outermost block of `module` be called through `wrap`, in place. Neither the state dict nor
    copies of the module change.
    """
    for block in outermost_blocks(module):
        block._compiled_call_impl = BlockCall(block, wrap(block._call_impl))
    for part in module.modules():
        if getattr(part, "rounds_together", False):
            part._compiled_call_impl = BlockCall(part, part._call_impl, only_alone=True)


def is_wrapped(block: nn.Module) -> bool:
    """Whether the block is called as on a GPU, where few large calls are better than many small ones."""
    return block._compiled_call_impl is not None


def compile_blocks(module: nn.Module, cache: Path | None = None) -> None:
    """Compiles every outermost block of `module` at its first call, for the shapes of that call. A block that
    cannot be compiled runs as it is, with one warning for all.

    cache: the folder that keeps compiled kernels for a resumed run, unless the environment names another one.
    """
    if cache is not None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache))
    wrap_blocks(module, compiled)


def compiled(call: Callable, backend: Callable | None = None) -> Callable:
    import torch._dynamo.config
    import torch._functorch.config
    import torch._inductor.config

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, NUM_VERSIONS)
    torch._dynamo.config.accumulated_recompile_limit = 4 * NUM_VERSIONS
    torch._dynamo.config.suppress_errors = True  # code that the compiler cannot follow runs as it is
    # the backward pass is compiled with the forward pass, where its failure can still be caught
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._functorch.config.donated_buffer = False  # gradients at the last layer keep the graph
    # the gradients of a SPADE norm with an embedding read 16 tensors, and are computed from them in more than
    # 60 operations; above these bounds the compiler would write what lies between
    torch._inductor.config.realize_reads_threshold = MOST_READS
    torch._inductor.config.realize_acc_reads_threshold = MOST_READS
    torch._inductor.config.realize_opcount_threshold = 200
    return torch.compile(call, backend=backend or inductor_or_eager, dynamic=False)


def compile_loop(network: nn.Module, *, records: bool) -> None:
    """Compiles a whole network that a sampler calls many times with the same shapes. With `records` its
    kernels are recorded once as a CUDA graph and replayed, so that no step waits for the host.
    """
    call = compiled(network._call_impl, backend=partial(inductor_or_eager, records=records))

    def replayed(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        # the next replay overwrites the result
        return tree_map_only(Tensor, Tensor.clone, call(*args, **kwargs))

    network._compiled_call_impl = replayed if records else call


def inductor_or_eager(
    graph: torch.fx.GraphModule, inputs: list[Tensor], *, records: bool = False
) -> Callable:
    """Compiles a graph, or returns it as it is where that fails. `records` makes it a CUDA graph."""
    from torch._inductor.compile_fx import compile_fx

    try:
        return compile_fx(graph, inputs, config_patches={"triton.cudagraphs": records})
    except Exception as error:  # a compiler, a driver or a full disk may raise anything
        warn_once(f"compile: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
        return graph.forward


_warned: set[str] = set()


def warn_once(reason: str) -> None:
    if not _warned:
        log.warning("%s; blocks run uncompiled, which is slower; compile=false leaves it out", reason)
    _warned.add(reason)


class Rounded(torch.autograd.Function):
    """Rounds several float32 weights at once, with gradients in float32. Autocast would round them one by
    one.
    """

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        low = copies(weights, dtype)
        needed = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(y for y, needs in zip(low, needed, strict=True) if not needs))
        return low

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        widened = iter(copies([g for g in gradients if g is not None], torch.float32))
        return None, *(None if g is None else next(widened) for g in gradients)


def copies(values: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors converted to another type by one call."""
    empty = [torch.empty_like(x, dtype=dtype) for x in values]
    if empty:
        torch._foreach_copy_(empty, list(values))
    return tuple(empty)


CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def is_rounded_with_others(part: nn.Module, name: str) -> bool:
    """Whether this weight of a layer is; a convolution's bias is not, which what follows adds in float32."""
    if isinstance(part, CONVOLUTIONS):
        return name != "bias"
    return isinstance(part, nn.Linear) or getattr(part, "rounds_weights", False)


class BlockCall:
    """Runs a block. Under autocast, one kernel rounds the weights of its convolutions and linear layers, and
    of norms that compute in the type of their input, before; and one widens their gradients after.
    only_alone: not where several processes train.
    """

    def __init__(self, block: nn.Module, run: Callable, *, only_alone: bool = False) -> None:
        self.run, self.exact, self.only_alone = run, getattr(block, "exact", False), only_alone
        self.places = [
            (part._parameters, name)
            for part in (p for root in (block, *getattr(block, "parts", ())) for p in root.modules())
            for name, weight in part._parameters.items()
            if weight is not None and is_rounded_with_others(part, name)
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        is_left = self.only_alone and num_ranks() > 1
        if not self.places or is_left or (self.exact and not torch.is_grad_enabled()):
            return self.run(*args, **kwargs)
        table, name = self.places[0]
        kind, is_rounded = table[name].device.type, table[name].dtype != torch.float32
        if is_rounded or not torch.is_autocast_enabled(kind):
            return self.run(*args, **kwargs)
        with self.rounded(torch.get_autocast_dtype(kind)):
            return self.run(*args, **kwargs)

    @contextmanager
    def rounded(self, dtype: torch.dtype) -> Iterator[None]:
        weights = [table[name] for table, name in self.places]
        try:
            for (table, name), low in zip(self.places, Rounded.apply(dtype, *weights), strict=True):
                table[name] = low
            yield
        finally:
            for (table, name), weight in zip(self.places, weights, strict=True):
                table[name] = weight
