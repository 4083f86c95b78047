"""What the processes of one training share. A process that runs alone is the only rank.

Under FSDP2 weights, gradients and moments are `DTensor`s, of which each rank holds a part.
"""

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def num_ranks() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if num_ranks() > 1 else 0


def all_reduce(x: Tensor) -> Tensor:
    """The sum over ranks. Changes x in place."""
    if num_ranks() > 1:
        dist.all_reduce(x)
    return x


def mean_over_ranks(x: Tensor) -> Tensor:
    """The mean over ranks. Changes x in place."""
    if num_ranks() > 1:
        dist.all_reduce(x)
        x /= num_ranks()
    return x


def any_rank(flag: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Whether the flag is set on any rank; asked from host to host in a `group` of gloo."""
    if num_ranks() == 1:
        return flag
    total = torch.tensor(int(flag))
    dist.all_reduce(total, group=group)
    return bool(total)


def host_group() -> dist.ProcessGroup | None:
    """A group of all ranks whose tensors live on the host, so that asking does not wait for a device; None
    where the default group is one. Every rank has to call this.
    """
    if num_ranks() == 1 or dist.get_backend() == "gloo":
        return None
    return dist.new_group(backend="gloo")


def is_divided(x: Tensor) -> bool:
    """Whether this rank holds a part of the tensor alone."""
    return isinstance(x, DTensor)


def parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This rank's part of each tensor, as a view of its values; all of those that are not divided."""
    return [x._local_tensor if isinstance(x, DTensor) else x for x in tensors]


def whole(x: Tensor) -> Tensor:
    """The tensor put together from all ranks' parts; itself where it is not divided. Every rank has to call
    this.
    """
    return x.full_tensor() if isinstance(x, DTensor) else x


def like(x: Tensor, other: Tensor) -> Tensor:
    """This rank's part of `x`, which is whole on every rank, divided as `other` is."""
    if not isinstance(other, DTensor):
        return x
    x = x.to(other.device, other.dtype)
    return distribute_tensor(x, other.device_mesh, other.placements, src_data_rank=None)
