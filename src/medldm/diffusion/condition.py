"""The condition that a denoiser is called with, and the protocol and helpers of the conditioners that make
it.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from medldm.batch import Batch
from medldm.diffusion.schedule import at_least_float32
from medldm.errors import InputError
from medldm.networks.spade import Modulations


class Condition(NamedTuple):
    """What a denoiser may use besides z_t and t."""

    concat: Tensor | None = None  # (B, Cc, *s), concatenated to z_t
    embedding: Tensor | None = None  # (B, E), added to the time embedding
    # (B, Cs, *any), read by SPADE norms, or what the network's `modulations` has made of it
    spade: Tensor | Modulations | None = None
    context: Tensor | None = None  # (B, L, Dc), for cross-attention
    hint: Tensor | None = None  # (B, Ch, *s), read by a control branch


def in_float32(condition: Condition) -> Condition:
    """The condition in float32, which suits a network of any precision: autocast rounds it where the network
    runs in a lower one.
    """
    return Condition(*(None if x is None else at_least_float32(x) for x in condition))


def concatenate(first: Condition, second: Condition) -> Condition:
    """Two conditions with the same fields, concatenated along the batch axis to 2B samples."""
    pairs = zip(first, second, strict=True)
    return Condition(*(None if a is None else torch.cat([a, b]) for a, b in pairs))


class Conditioner(Protocol):
    """A module that makes the condition of a batch, and states the four sizes that the U-Net is built from.

    `groups` names the parts that can be dropped separately. `drop` is (B, len(groups)) bool, True where a
    sample loses that group, or None to keep all. The null of guidance is `drop` all True; the network knows
    it where `trains_null` says that training drops all groups at once. `dropped_groups` are those that
    training drops.
    """

    groups: tuple[str, ...]
    attributes: tuple[str, ...]  # the names of embedded ones, and of those among them that may be unknown
    null_attributes: tuple[str, ...]
    dropped_groups: tuple[str, ...]
    trains_null: bool
    batch_keys: tuple[str, ...]  # the arrays of a batch that the condition is made from
    concat_channels: int
    spade_channels: int
    embedding_dim: int
    context_dim: int

    def sample_drop(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Tensor: ...

    def drop_groups(
        self, batch_size: int, names: tuple[str, ...] | None = None, device: torch.device | None = None
    ) -> Tensor: ...

    def __call__(
        self, batch: Batch, first_stage: nn.Module | None = None, drop: Tensor | None = None
    ) -> Condition: ...


def require(batch: Batch, key: str) -> Tensor:
    if key not in batch:
        raise InputError(
            f"the data has no `{key}`, which the conditioner uses; give it, or choose a conditioner without "
            "it (use_edges, use_mask and use_<attribute> set to false)"
        )
    return batch[key]


def fixed_drop(
    groups: tuple[str, ...], batch_size: int, names: tuple[str, ...] | None, device: torch.device | None
) -> Tensor:
    """(B, len(groups)) bool, True in the columns of `names`, or everywhere for None."""
    names = groups if names is None else tuple(names)
    unknown = [name for name in names if name not in groups]
    if unknown:
        raise InputError(
            f"drop: the model has no condition {unknown[0]}; it has {', '.join(groups) or 'none'}"
        )
    drop = torch.zeros(batch_size, len(groups), dtype=torch.bool, device=device)
    for name in names:
        drop[:, groups.index(name)] = True
    return drop


def check_drop(conditioner: Conditioner, names: tuple[str, ...]) -> None:
    """InputError for a condition that the model does not have, or that training never withheld, since the
    null in its place was never learned.
    """
    conditioner.drop_groups(1, names)
    unseen = [name for name in names if name not in conditioner.dropped_groups]
    if unseen:
        raise InputError(
            f"drop=[{unseen[0]}]: training never withheld it; train with a conditioner of drop_all_prob=0.1"
        )
