"""The kernels that a compiler makes of the chains of `planning.fusion`, by its rule 5."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from medldm.planning.fusion import FUSED, Graph, Node, Reads


@dataclass
class Kernel:
    """What one kernel reads and writes: numbers of values; and the small kernels beside it."""

    parts: set[int] = field(default_factory=set)  # numbers of the kernels that it was made of
    reads: Reads = field(default_factory=dict)
    writes: set[int] = field(default_factory=set)
    num_small: int = 0


def follow(reductions: list[Kernel], kernel: Kernel) -> bool:
    """Whether a kernel on elements goes on with as many results of one of these reductions, which then does
    its work, too.
    """
    read = {number for number, _ in kernel.reads}
    for other in reductions:
        if other.writes & read:
            other.reads |= kernel.reads
            other.writes |= kernel.writes
            return True
    return False


def join(kernels: list[Kernel], kernel: Kernel, after: Sequence[set[int]]) -> None:
    """Puts a kernel to others of its sizes: those that read a tensor of its own become one with it, unless
    one waits for the other. after: for each part of a kernel those that wait for it.
    """
    for other in list(kernels):
        waits = any(b in after[a] or a in after[b] for a in other.parts for b in kernel.parts)
        if not waits and other.reads.keys() & kernel.reads.keys():
            kernels.remove(other)
            kernel = Kernel(
                other.parts | kernel.parts,
                other.reads | kernel.reads,
                other.writes | kernel.writes,
                other.num_small + kernel.num_small,
            )
    kernels.append(kernel)


def fused(graph: Graph) -> Iterator[tuple[int, int]]:
    """(kernels, bytes) of each kernel and the small ones beside it. Call it once, after the step."""
    found: list[tuple[tuple, Kernel]] = []
    for chain in graph.settle():
        for size, kernel in kernels_of(graph, chain).items():
            kernel.parts = {len(found)}
            found.append(((chain[0].region, size), kernel))
    after = followers(graph, [kernel for _, kernel in found])
    alike: dict[tuple, list[Kernel]] = defaultdict(list)
    for key, kernel in found:
        join(alike[key], kernel, after)
    reductions = defaultdict(list)
    for (region, size), kernels in alike.items():
        if size[0] == "reduction":
            reductions[region, size[-1]] += kernels
    for (region, size), kernels in alike.items():
        if size[0] == "elements":
            before = reductions[region, size[-1]]
            kernels[:] = [k for k in kernels if not follow(before, k)]
    return (cost_of(graph, kernel) for kernels in alike.values() for kernel in kernels)


def kernels_of(graph: Graph, chain: Sequence[Node]) -> dict[tuple, Kernel]:
    """Those of a chain by the sizes that they run over."""
    kernels: dict[tuple, Kernel] = defaultdict(Kernel)
    for node in chain:
        for number in node.writes:
            key = ("elements", graph.values[number].numel)
            if node.kind == "reduction":
                key = ("reduction", *node.sizes)
            elif not graph.values[number].is_written:
                continue
            kernels[key].writes.add(number)
            kernels[key].reads |= graph.sources_of(node)
        if node.num_small:
            kernels[("reduction", *node.sizes)].num_small += node.num_small
    return kernels


def followers(graph: Graph, kernels: Sequence[Kernel]) -> list[set[int]]:
    """For each kernel the numbers of those that wait for it."""
    readers = defaultdict(set)  # of each value: kernels, and operations that run as they are
    writes = [kernel.writes for kernel in kernels]
    for number, kernel in enumerate(kernels):
        for value, _ in kernel.reads:
            readers[value].add(number)
    for node in graph.nodes:
        if node.kind not in FUSED:
            for value, _ in graph.sources_of(node):
                readers[value].add(len(writes))
            writes.append(set(node.writes))
    after = []
    for number in range(len(kernels)):
        stack, seen = [number], set()
        while stack:
            following = set().union(*(readers[value] for value in writes[stack.pop()])) - seen
            seen |= following
            stack += following
        after.append(seen)
    return after


def cost_of(graph: Graph, kernel: Kernel) -> tuple[int, int]:
    moved = sum(size for (number, _), size in kernel.reads.items() if number not in kernel.writes)
    return 1 + kernel.num_small, moved + sum(graph.values[n].num_bytes for n in kernel.writes)
