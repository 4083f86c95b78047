"""The condition of a frozen denoiser together with the hint of the branch that controls it."""

import torch
from torch import Tensor, nn

from medldm.batch import Batch
from medldm.diffusion.condition import Condition, Conditioner, fixed_drop
from medldm.networks.control import ControlledUNet


def controlled(
    conditioner: Conditioner, network: nn.Module, hint: Conditioner
) -> tuple["ControlConditioner", ControlledUNet]:
    """Conditioner and network of a trained denoiser, frozen, with a branch that reads what `hint` gives.
    ValueError where these do not allow for one.
    """
    return ControlConditioner(conditioner, hint), ControlledUNet(network, hint.concat_channels)


class ControlConditioner(nn.Module):
    """What the base is told by its own conditioner, frozen, and what the branch reads: the planes that the
    conditioner `hint` would concatenate to z_t.

    Groups are those of both. One that both have is withheld from both at once, as often as `hint` says. What
    the network's shape follows from (the four sizes) is the base's.
    """

    def __init__(self, base: Conditioner, hint: Conditioner) -> None:
        super().__init__()
        if hint.embedding_dim or hint.spade_channels or hint.context_dim:
            raise ValueError(
                "a control branch reads images alone: edges and class maps by an encoder; leave out "
                "attributes and spade"
            )
        if not hint.concat_channels:
            raise ValueError("encoder=None gives a control branch nothing to read; choose one")
        self.base, self.hint = base.requires_grad_(False), hint
        self.groups = tuple(dict.fromkeys((*base.groups, *hint.groups)))
        self.attributes, self.null_attributes = base.attributes, base.null_attributes
        self.concat_channels, self.spade_channels = base.concat_channels, base.spade_channels
        self.embedding_dim, self.context_dim = base.embedding_dim, base.context_dim

    @property
    def trained_part(self) -> nn.Module:
        """All that training changes."""
        return self.hint

    @property
    def dropped_groups(self) -> tuple[str, ...]:
        parts = {name: part for part in (self.base, self.hint) for name in part.groups}
        return tuple(name for name in self.groups if name in parts[name].dropped_groups)

    @property
    def trains_null(self) -> bool:
        return bool(self.groups) and self.dropped_groups == self.groups

    @property
    def batch_keys(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.base.batch_keys, *self.hint.batch_keys)))

    @property
    def halo(self) -> int | None:
        """See `SpatialConditioner.halo`; a base without any condition depends on nothing."""
        halos = [getattr(part, "halo", None) for part in (self.base, self.hint) if part.batch_keys]
        return None if None in halos else max(halos, default=0)

    def sample_drop(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Tensor:
        """(B, len(groups)) bool: what each sample of a training batch loses."""
        columns: dict[str, Tensor] = {}
        for part in (self.base, self.hint):
            drop = part.sample_drop(batch_size, generator, device)
            columns |= dict(zip(part.groups, drop.unbind(1), strict=True))
        return torch.stack([columns[name] for name in self.groups], dim=1)

    def drop_groups(
        self, batch_size: int, names: tuple[str, ...] | None = None, device: torch.device | None = None
    ) -> Tensor:
        """(B, len(groups)) bool that drops `names` for every sample; None drops all: the null of guidance."""
        return fixed_drop(self.groups, batch_size, names, device)

    def forward(
        self, batch: Batch, first_stage: nn.Module | None = None, drop: Tensor | None = None
    ) -> Condition:
        """Condition of a batch; `drop` is (B, len(groups))."""

        def of(part: Conditioner) -> Condition:
            own = None if drop is None else drop[:, [self.groups.index(name) for name in part.groups]]
            return part(batch, first_stage, own)

        return of(self.base)._replace(hint=of(self.hint).concat)
