"""Conditions that stay the same while a sampler calls a network many times."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from medldm.diffusion.condition import Condition

Given = Condition | Callable[[], Condition]  # a condition, or a function that makes it


def made(condition: Given) -> Condition:
    return condition() if callable(condition) else condition


class StaticCondition:
    """One condition for all steps of a sampler. What the network computes from the map alone is the same in
    every step: it is computed at the first one and kept as long as this object lives. The map itself is not
    kept where the condition is given as a function that makes it.

    The kept part is computed again where autocast has been switched on or off since, as for a sampler's last
    step, and at every step where gradients are recorded.
    """

    def __init__(self, network: nn.Module, condition: Given) -> None:
        self.condition = condition
        self.modulations = getattr(network, "modulations", None)
        self.kept: tuple[bool | None, Condition] | None = (
            None  # whether it was computed under autocast (None: no matter), and the condition
        )

    def prepared(self, z_t: Tensor) -> Condition:
        """The condition for z_t (B, C, *s), whose grid is that of all steps."""
        if torch.is_grad_enabled():
            return made(self.condition)
        is_rounded = torch.is_autocast_enabled(z_t.device.type)
        if self.kept is None or self.kept[0] not in (None, is_rounded):
            self.kept = None  # frees the memory of the old one first
            condition = made(self.condition)
            if condition.spade is None or self.modulations is None:
                self.kept = None, condition
            else:
                maps = self.modulations(condition.spade, z_t.shape[2:])
                self.kept = is_rounded, condition._replace(spade=maps)
        return self.kept[1]
