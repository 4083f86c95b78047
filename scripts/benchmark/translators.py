"""Rows of MS-SPADE: a batch of mixed targets at once, and the published loop over its samples."""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from measuring import DEVICE, best_precision, train_step
from torch import Tensor, nn

from networks import compose_part

K, CHANNELS = 4, 4


class LoopedSPADE(nn.Module):
    """As published: K norms of three convolutions, and a loop that reads each sample's class on the host."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            nn.ModuleList(
                [nn.Conv3d(channels, hidden, 3, padding=1)]
                + [nn.Conv3d(hidden, channels, 3, padding=1) for _ in range(2)]
            )
            for _ in range(K)
        )

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        out = []
        for i in range(len(x)):
            shared, gamma, beta = self.parts[label[i].item()]
            one = x[i : i + 1]
            hidden = F.relu(shared(one))
            out.append(F.instance_norm(one) * (1 + gamma(hidden)) + beta(hidden))
        return torch.cat(out)


def looped(network: nn.Module) -> nn.Module:
    """The same translator with `LoopedSPADE` in the place of its switched norms."""
    for block in network.blocks:
        for name in ("norm1", "norm2"):
            norm = getattr(block, name)
            channels = norm.shared.weight.shape[1]
            hidden = norm.modulation.weight.shape[1]
            setattr(block, name, LoopedSPADE(channels, hidden))
    return network


def translators(batch_size: int, edge: int) -> dict[str, Callable]:
    """configs/model/translator/ms_spade on latents of `edge`^3, targets in turn: one training step each."""
    z, target = (torch.randn(batch_size, CHANNELS, edge, edge, edge, device=DEVICE) for _ in range(2))
    label = torch.arange(batch_size, device=DEVICE) % K
    variants: dict[str, Callable] = {}
    for name, change in (("loop over samples", looped), ("medldm", lambda network: network)):
        make = partial(compose_part("translator/ms_spade"), use_checkpoint=False)
        network = change(make(3, latent_channels=CHANNELS, num_classes=K)).to(DEVICE).train()

        def loss(network: nn.Module = network) -> Tensor:
            return F.l1_loss(network(z, label).float(), target)

        variants[name] = partial(train_step, network, loss, best_precision)
    return variants
