"""How blocks of networks are called on a GPU: their weights rounded to bf16 together, their kernels fused.

A block is a part of a network that marks itself by `is_block = True`. Each block is compiled by itself: what
does not compile costs one block and not the network. `rounds_together = True` marks a part that rounds the
weights of all its blocks by one kernel, `rounds_weights = True` a layer of its own kind whose weights are
among them.
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

log = logging.getLogger(__name__)
Wrap = Callable[[Callable], Callable]  # makes of a block's call what is run in its place
NUM_VERSIONS = 256  # of one class of blocks: each block has shapes of its own, which are compiled apart


def outermost_blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The blocks within a module that lie in no other block."""
    if getattr(module, "is_block", False):
        yield module
        return
    for child in module.children():
        yield from outermost_blocks(child)


class Function(nn.Module):
    """A function of tensors as a block: what it does with single elements is compiled, too.

    function: no module, and no closure over one: copies of a module would keep calling the first one's.
    parts: the modules whose weights it uses. They stay where they are registered.
    exact: it wants those weights in float32 where no gradient is recorded.
    """

    is_block = True

    def __init__(self, function: Callable, parts: Iterable[nn.Module] = (), *, exact: bool = False) -> None:
        super().__init__()
        self.function, self.parts, self.exact = function, list(parts), exact

    def forward(self, *args: Any) -> Any:
        return self.function(*args)


def same_weights(block: nn.Module) -> Callable:
    """For `torch.utils.checkpoint`: what is computed again sees the weights that the block has now, which may
    be rounded ones.
    """
    tables = [(part._parameters, dict(part._parameters)) for part in block.modules() if part._parameters]

    @contextmanager
    def again() -> Iterator[None]:
        before = [dict(table) for table, _ in tables]
        try:
            for table, now in tables:
                table.update(now)
            yield
        finally:
            for (table, _), old in zip(tables, before, strict=True):
                table.update(old)

    return lambda: (nullcontext(), again())


def checkpointed(block: nn.Module, call: Callable, *args: Any) -> Any:
    """`call(*args)` of the block's own, computed again in the backward pass instead of kept."""
    if torch.compiler.is_compiling():  # weights are arguments of what is compiled
        return checkpoint(call, *args, use_reentrant=False)
    return checkpoint(call, *args, use_reentrant=False, context_fn=same_weights(block))


def wrap_blocks(module: nn.Module, wrap: Wrap) -> None:
    """Call every outermost block of `module` through `wrap` from now on, in place. Neither the state dict nor
    copies of the module are changed.
    """
    for block in outermost_blocks(module):
        block._compiled_call_impl = BlockCall(block, wrap(block._call_impl))
    for part in module.modules():
        if getattr(part, "rounds_together", False):
            part._compiled_call_impl = BlockCall(part, part._call_impl)


def is_wrapped(block: nn.Module) -> bool:
    """Whether the block is called as on a GPU, where few large calls are better than many small ones."""
    return block._compiled_call_impl is not None


def compile_blocks(module: nn.Module, cache: Path | None = None) -> None:
    """Compile every outermost block of `module` at its first call, for the shapes of that call. A block that
    cannot be compiled runs as it is, and one warning says so.

    cache: folder that keeps compiled kernels for a resumed run; where the environment names one, that one.
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
    torch._dynamo.config.suppress_errors = True  # what cannot be followed runs as it is
    # the backward pass is compiled with the forward pass, where its failure can still be caught
    torch._functorch.config.force_non_lazy_backward_lowering = True
    torch._functorch.config.donated_buffer = False  # gradients at the last layer keep the graph
    torch._inductor.config.realize_reads_threshold = 8  # a norm before its activation reads five tensors
    return torch.compile(call, backend=backend or inductor_or_eager, dynamic=False)


def compile_loop(network: nn.Module) -> None:
    """Compile a whole network that a sampler calls many times with the same shapes. On a GPU its kernels are
    recorded once as a CUDA graph and played back, which takes the host out of every step.
    """
    call = compiled(network._call_impl, backend=partial(inductor_or_eager, records=True))

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map_only(Tensor, Tensor.clone, call(*args, **kwargs))  # played back, it is overwritten

    network._compiled_call_impl = run


def inductor_or_eager(
    graph: torch.fx.GraphModule, inputs: list[Tensor], *, records: bool = False
) -> Callable:
    """torch's compiler, or the graph as it is where that fails. `records`: as a CUDA graph, on a GPU."""
    from torch._inductor.compile_fx import compile_fx

    try:
        return compile_fx(graph, inputs, config_patches={"triton.cudagraphs": records})
    except Exception as error:  # whatever a compiler, a driver or a full disk may raise
        warn_once(f"compile: {type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
        return graph.forward


_warned: set[str] = set()


def warn_once(reason: str) -> None:
    if not _warned:
        log.warning("%s; blocks run uncompiled, which is slower; compile=false leaves it out", reason)
    _warned.add(reason)


class Rounded(torch.autograd.Function):
    """Several float32 weights rounded at once, with gradients in float32: autocast would do it one by one."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return copies(weights, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        widened = iter(copies([g for g in gradients if g is not None], torch.float32))
        return None, *(None if g is None else next(widened) for g in gradients)


def copies(values: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The tensors in another type, by one call."""
    empty = [torch.empty_like(x, dtype=dtype) for x in values]
    if empty:
        torch._foreach_copy_(empty, list(values))
    return tuple(empty)


ROUNDED = (
    nn.Linear, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


class BlockCall:
    """Runs a block; under autocast the weights of its convolutions and linear layers, and of the norms that
    compute in their input's type, are rounded by one kernel before, and their gradients widened by one.
    """

    def __init__(self, block: nn.Module, run: Callable) -> None:
        self.run, self.exact = run, getattr(block, "exact", False)
        self.places = [
            (part._parameters, name)
            for part in (p for root in (block, *getattr(block, "parts", ())) for p in root.modules())
            if isinstance(part, ROUNDED) or getattr(part, "rounds_weights", False)
            for name, weight in part._parameters.items()
            if weight is not None
        ]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.places or (self.exact and not torch.is_grad_enabled()):
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
