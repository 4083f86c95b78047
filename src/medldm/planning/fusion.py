"""Models how a compiler fuses the operations of a block into fewer kernels, which move fewer bytes.

The model works from the operations alone, by these rules; no compiler runs.

1. Operations on single elements and reductions are fused. Products, convolutions, attention, pooling,
   gathers and whatever is not known here run as they are, and read and write their tensors.
2. Operations that feed each other are one chain, unless something that runs as it is, or a reduction over
   more than `LONGEST_ROW` values (`LONGEST_STRIDED_ROW` where they do not lie side by side), lies between
   them on any path. The norm of an image is such a reduction: its statistics are a chain, and the next chain
   reads the image again. The results of a shorter reduction end a chain where they are spread over more
   values than they were made from, or are reduced again. A chain that could run earlier waits for the chain
   that reads it, if both read one tensor.
3. A chain reads each tensor from outside once, and writes the tensors that are used outside of it.
4. A tensor that only other chains of the block use is not written where it costs them no more bytes to read
   what it was made from. This is also how a backward pass computes parts of the forward pass again.
5. A chain is one kernel for each size of tensor that it writes, which reads all that those were made from;
   of tensors that are joined to one, the size is that of a piece.
   Longer reductions are a kernel for each pair of sizes, which also does the operations on as many elements
   that follow, and a small one more where few results make it split them over the card. A norm has two small
   kernels beside those of its rows, its gradient five. Kernels of the same sizes that read one tensor are
   one, unless one of them waits for the other.
6. The bias of a convolution is added by the chain that follows. What the backward pass needs of it is the
   sum, which is then written. The gradient of a bias is a reduction.
7. Nothing is fused across blocks, nor between a block's forward and its backward pass.

Beside what torch 2.15's compiler schedules for a card (docs/performance.md) it has up to one kernel too many
for residual blocks and three for a discriminator, and its bytes are between 4% too high and 2% too low.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from medldm.networks.compiling import LONGEST_ROW, LONGEST_SUM, MOST_READS

LONGEST_STRIDED_ROW = 64  # where they do not lie side by side in memory
MOST_SPLIT = 8192  # reductions to no more values than these are split over the card
SMALL_KERNELS = {"norm": 2, "norm_backward": 5}  # that put together parts of sums, and gradients of weights
ON_ELEMENTS = {
    "_to_copy", "clone", "copy_", "cat", "stack", "constant_pad_nd", "zeros", "ones", "full", "zeros_like",
    "ones_like", "full_like", "new_zeros", "new_full", "fill", "fill_", "zero_", "arange", "slice_backward",
    "select_backward", "leaky_relu_backward", "native_dropout", "native_dropout_backward",
    "upsample_nearest2d", "upsample_nearest3d", "scalar_tensor", "lift_fresh_copy",
}  # fmt: skip
ALONG_AN_AXIS = {"_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data"}
NORMS = {"native_group_norm", "native_batch_norm", "native_layer_norm"}
SUMS = {"sum", "mean", "amax", "amin", "mse_loss", "l1_loss", "smooth_l1_loss", "var", "var_mean"}
PIECES = {"cat", "stack"}  # whose pieces are written by the kernels that make them
FUSED = ("elements", "row", "reduction")


class Region(NamedTuple):
    """Where an operation runs: in which call of a block, and in its forward or backward pass."""

    call: int
    is_backward: bool


# What is read of written values: (number of the value, place in its storage) -> bytes.
Reads = dict[tuple[int, int], int]


@dataclass
class Value:
    """What one operation wrote: `num_bytes` of it, and the nodes that read it."""

    maker: int  # number of the node; -1 for what was there before the step
    num_bytes: int
    numel: int
    readers: list[int] = field(default_factory=list)
    sources: Reads = field(default_factory=dict)  # what it is computed from where it is not written
    is_result: bool = False  # the block returns it
    is_written: bool = True
    is_reduced: bool = False  # it took a reduction, and so is not computed twice
    is_kept: bool = False  # what a backward pass reads of it is not computed again


class Piece(NamedTuple):
    """What a node reads: a value, or a part of it."""

    value: int
    place: int
    num_bytes: int


@dataclass
class Node:
    """One operation. kind: "elements", "row" (a reduction within a program), "reduction", "as it is"."""

    kind: str
    region: Region | None  # None: outside of blocks
    reads: list[Piece]
    writes: list[int]  # numbers of values
    level: int
    chain: int
    sizes: tuple[int, int] = (0, 0)  # values read and written, of a reduction
    row: int = 0  # values that a row of its chain reads on the way to it, 0 for none
    num_small: int = 0  # kernels beside its own


def fusion_kind(func: Any, args: Sequence, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> str:
    """The kind of a `Node`, or "norm", "norm_backward" and "long_row", which are two nodes each."""
    name = func.overloadpacket.__name__
    if name in NORMS:
        rows = outputs[1].numel()
        return "row" if rows and inputs[0].numel() <= LONGEST_ROW * rows else "norm"
    if name.removesuffix("_backward") in NORMS:
        return "norm_backward"
    if name in ALONG_AN_AXIS:
        axis = next(a for a in args if isinstance(a, int))
        return "row" if outputs[0].shape[axis] <= longest_row(inputs[0], (axis,)) else "long_row"
    if name in SUMS:
        largest, made = max(inputs, key=Tensor.numel), max(x.numel() for x in outputs)
        axes = next((a for a in args[1:] if isinstance(a, list | tuple)), range(largest.ndim))
        return "row" if largest.numel() <= longest_row(largest, axes) * max(made, 1) else "reduction"
    is_on_elements = name in ON_ELEMENTS or torch.Tag.pointwise in func.tags
    return "elements" if is_on_elements else "as it is"


def num_launched(func: Any, args: Sequence) -> int:
    """The kernels that one call launches where nothing is fused, as PyTorch's CUDA sources have them: a bias
    is added apart from the convolution; the sum of its gradient (`sums_bias`) is not among them.
    """
    name = func.overloadpacket.__name__
    if name == "native_group_norm":  # statistics, parts of scale and shift, the result
        return 3 if args[1] is not None else 2
    if name == "native_group_norm_backward":
        return 5 if args[4] is not None else 3
    if name in ("native_batch_norm", "native_batch_norm_backward", "native_layer_norm_backward"):
        return 2
    if name == "convolution":
        return 1 + (args[2] is not None)
    return sum(args[-1][:2]) if name == "convolution_backward" else 1


def sums_bias(func: Any, args: Sequence) -> bool:
    """Whether it gives the gradient of a convolution's bias, which a compiler sums apart from the others."""
    return func.overloadpacket.__name__ == "convolution_backward" and bool(args[-1][2])


def ends_chain(maker: "Node", numel: int, row: int) -> bool:
    """Whether what makes `numel` values of this node's is another kernel: also where a row is spread over
    more values than it was made from, or its results are reduced again. row: how many values are reduced, 0
    for none.
    """
    if maker.kind in ("as it is", "reduction"):
        return True
    return maker.row > 0 and (numel > maker.row or row not in (0, maker.row))


def longest_row(x: Tensor, axes: Sequence[int]) -> int:
    """Values along these axes that one program of a kernel reduces."""
    lie_together = any(x.stride(axis) == 1 for axis in axes if x.ndim)
    return LONGEST_ROW if lie_together else LONGEST_STRIDED_ROW


def touched_bytes(x: Tensor) -> int:
    """What an operation on this tensor moves: a broadcast axis is read once."""
    size = x.element_size()
    for n, stride in zip(x.shape, x.stride(), strict=True):
        size *= n if stride else min(n, 1)
    return size


Stored = Sequence[tuple[Tensor, int]]  # tensors, each with the number of its storage


class Graph:
    """The operations of a step in the order in which they ran, and what flows between them."""

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.values: list[Value] = []
        self.newest: dict[int, int] = {}  # number of a storage -> of the value that it holds
        self.parents: list[int] = []  # of nodes, for the union of chains

    def add(self, func: Any, args: Sequence, inputs: Stored, outputs: Stored, region: Region | None) -> bool:
        """Records an operation. Returns whether it runs as it is."""
        given, made = [x for x, _ in inputs], [x for x, _ in outputs]
        kind = "as it is" if region is None else fusion_kind(func, args, given, made)
        reads = [self.piece(*pair) for pair in inputs]
        size = max((x.numel() for x in given), default=0)
        if kind in ("norm", "norm_backward"):
            self.append("reduction", region, reads, outputs[1:], (size, 0))
            self.nodes[-1].num_small = SMALL_KERNELS[kind]
            statistics = [self.piece(*pair) for pair in outputs[1:]]
            self.append("elements", region, reads + statistics, outputs[:1])
        elif kind == "long_row":
            sums = (made[0][:0], -len(self.nodes) - 1)
            self.append("reduction", region, reads, [sums], (size, 1))
            self.nodes[-1].num_small = 1
            self.append("elements", region, [*reads, self.piece(*sums)], outputs)
        elif region and func.overloadpacket.__name__ == "convolution" and len(inputs) == 3:
            self.append_convolution(region, reads, outputs)
        elif region and sums_bias(func, args):
            self.append("as it is", region, reads, outputs[:-1])
            self.append_sum("reduction", region, reads[:1], outputs[-1:], given[0].numel())
        else:
            self.append_sum(kind, region, reads, outputs, size)
            if func.overloadpacket.__name__ in PIECES:
                self.values[-1].numel = size
        return kind == "as it is"

    def append_sum(
        self, kind: str, region: Region | None, reads: list[Piece], outputs: Stored, size: int
    ) -> None:
        """An operation on `size` values, which may be a reduction."""
        largest = max((x.numel() for x, _ in outputs), default=0)
        self.append(kind, region, reads, outputs, (size, largest))
        is_split = kind == "reduction" and largest <= MOST_SPLIT and size > LONGEST_SUM * largest
        self.nodes[-1].num_small = int(is_split)

    def append_convolution(self, region: Region, reads: list[Piece], outputs: Stored) -> None:
        """One with a bias, which is added apart from it."""
        raw = (outputs[0][0], -len(self.nodes) - 1)
        self.append("as it is", region, reads[:2], [raw])
        self.append("elements", region, [self.piece(*raw), reads[2]], outputs)
        self.values[-1].is_kept = True

    def hand_out(self, storage: int) -> None:
        """Records that the result of a block is in this storage."""
        if storage in self.newest:
            self.values[self.newest[storage]].is_result = True

    def piece(self, x: Tensor, storage: int) -> Piece:
        if storage not in self.newest:
            self.newest[storage] = self.new_value(-1, x)
        return Piece(self.newest[storage], x.storage_offset(), touched_bytes(x))

    def new_value(self, maker: int, x: Tensor) -> int:
        self.values.append(Value(maker, touched_bytes(x), x.numel()))
        return len(self.values) - 1

    def append(
        self,
        kind: str,
        region: Region | None,
        reads: list[Piece],
        outputs: Stored,
        sizes: tuple[int, int] = (0, 0),
    ) -> None:
        number = len(self.nodes)
        numbers = {piece.value for piece in reads}
        for value in numbers:
            self.values[value].readers.append(number)
        makers = [self.nodes[self.values[v].maker] for v in numbers if self.values[v].maker >= 0]
        makers = [m for m in makers if m.region == region]
        made = max((x.numel() for x, _ in outputs), default=0)
        row = sizes[0] if kind == "row" else 0
        reduced = sizes[0] if kind in ("row", "reduction") else 0
        level = max((m.level + ends_chain(m, made, reduced) for m in makers), default=0)
        self.parents.append(number)
        writes = []
        for x, storage in outputs:
            self.newest[storage] = self.new_value(number, x)
            writes.append(self.newest[storage])
        joined = [m for m in makers if m.kind in ("elements", "row") and m.level == level]
        joined = joined if kind in FUSED else []
        row = min((n for n in (row, *(m.row for m in joined)) if n), default=0)
        self.nodes.append(Node(kind, region, reads, writes, level, number, sizes, row))
        for maker in joined:
            self.parents[self.chain(maker.chain)] = self.chain(number)

    def chain(self, node: int) -> int:
        while self.parents[node] != node:
            self.parents[node] = self.parents[self.parents[node]]
            node = self.parents[node]
        return node

    def settle(self) -> list[list[Node]]:
        """The chains, once all operations are known. Call it once."""
        self.delay()
        for node in self.nodes:
            node.chain = self.chain(node.chain)
        self.choose_written()
        chains = defaultdict(list)
        for node in self.nodes:
            if node.kind in FUSED:
                chains[node.chain].append(node)
        return sorted(chains.values(), key=lambda nodes: nodes[0].level)

    def delay(self) -> None:
        """Joins chains with later ones, by rule 2."""
        chains: dict[int, list[Node]] = defaultdict(list)
        for node in self.nodes:
            if node.kind in FUSED and node.region is not None:
                chains[self.chain(node.chain)].append(node)
        for chain in sorted(chains.values(), key=lambda nodes: -nodes[0].level):
            self.delay_chain(chain, chains)

    def delay_chain(self, chain: list[Node], chains: dict[int, list[Node]]) -> None:
        """Joins this chain with the first that reads it, where nothing lies between."""
        own, first = self.chain(chain[0].chain), chain[0]
        written = {number for node in chain for number in node.writes}
        readers = [self.nodes[r] for number in written for r in self.values[number].readers]
        readers = [r for r in readers if self.chain(r.chain) != own]
        if not readers or any(r.kind not in FUSED or r.region != first.region for r in readers):
            return
        if any(self.values[number].is_result for number in written):
            return
        latest = min(r.level for r in readers)
        read = {piece.value for node in chain for piece in node.reads}
        for reader in (r for r in readers if r.level == latest > first.level):
            later = chains[self.chain(reader.chain)]
            is_apart = any(
                ends_chain(maker, self.largest(node), node.sizes[0] if node.kind == "row" else 0)
                for maker in chain
                for node in later
                if {piece.value for piece in node.reads} & set(maker.writes)
            )
            if is_apart or reader.kind == "reduction":
                continue
            if read & {piece.value for node in later for piece in node.reads}:
                self.parents[own] = self.chain(reader.chain)
                for node in chain:
                    node.level = latest
                later.extend(chain)
                return

    def largest(self, node: Node) -> int:
        return max((self.values[number].numel for number in node.writes), default=0)

    def sources_of(self, node: Node) -> Reads:
        """The written values that a kernel reads for this node."""
        found: Reads = {}
        for number, place, size in node.reads:
            value = self.values[number]
            for key, touched in ({(number, place): size} if value.is_written else value.sources).items():
                found[key] = max(touched, found.get(key, 0))
        return found

    def choose_written(self) -> None:
        """Decides which values are written, by rules 3 and 4."""
        outside = defaultdict(set)  # what each chain reads of others
        for node in self.nodes:
            for number in {piece.value for piece in node.reads}:
                maker = self.values[number].maker
                if maker < 0 or self.nodes[maker].chain != node.chain:
                    outside[node.chain].add(number)
        for node in self.nodes:
            if node.kind not in ("elements", "row"):
                continue
            read = [self.values[piece.value] for piece in node.reads]
            is_reduced = node.kind == "row" or any(v.is_reduced and not v.is_written for v in read)
            sources = self.sources_of(node)
            for value in (self.values[number] for number in node.writes):
                value.is_reduced, value.sources = is_reduced, sources
                value.is_written = self.must_write(node, value, outside)

    def must_write(self, node: Node, value: Value, outside: dict[int, set[int]]) -> bool:
        readers = [self.nodes[r] for r in value.readers]
        others = {r.chain for r in readers if r.chain != node.chain}
        if value.is_result:
            return True
        if not others:
            return not readers  # a value that nothing reads within the step is a gradient, which is kept
        if any(r.kind not in FUSED or r.region.call != node.region.call for r in readers):
            return True
        if value.is_kept and any(r.region != node.region for r in readers):
            return True
        if value.is_reduced or len(value.sources) > MOST_READS:
            return True
        read = {chain: self.made_from(outside[chain]) for chain in others}
        extra = sum(
            size
            for chain in others
            for (number, _), size in value.sources.items()
            if number not in read[chain]
        )
        return extra > value.num_bytes * (1 + len(others))

    def made_from(self, numbers: set[int]) -> set[int]:
        """The written values that a chain reads for these."""
        found = set()
        for number in numbers:
            value = self.values[number]
            found |= {number} if value.is_written else {source for source, _ in value.sources}
        return found
