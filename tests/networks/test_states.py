"""What checkpoints and seeds rely on: each network's state by name, shape and order, and its random draws."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.helpers import CONFIG_DIR, compose_part

NAMES = sorted(path.stem for path in Path(CONFIG_DIR, "model/network").glob("*.yaml"))
BASES = ("vq_autoencoder", "vqvae_cardiac")  # what others inherit, without sizes or a codebook of their own
OURS = [name for name in NAMES if not name.startswith(("monai", *BASES))]
VOLUMES = ("vqgan", "unet3d", "unet_aldm", "unet_semantic")
DIGESTS = {
    "pixel_unet": "644d0cebff50f872",
    "pixel_unet_down": "1ce16315333a8d8d",
    "scorenet": "e508f457cf7c5085",
    "scorenet_colab": "61dd160233c1c4e2",
    "scorenet_points": "1f1cf61337029e64",
    "unet3d": "ff04bf42ec76f626",
    "unet_aldm": "5f2f9806724fdb2a",
    "unet_aldm_phantom": "a1a310373aabd542",
    "unet_block": "ef3ee3e9d79cebfb",
    "unet_cardiac": "0925aa640b45cbe8",
    "unet_cardiac_as_run": "3e70e0cdc59f41f4",
    "unet_cardiac_published": "3e70e0cdc59f41f4",
    "unet_demo": "11ff8b53698f94b7",
    "unet_latent": "611a74ab090ea37d",
    "unet_narrow": "7d85587c57755721",
    "unet_semantic": "f4c65ba1def3e88f",
    "unet_semantic_published": "530230b20ce24bf2",
    "vqgan3d": "4a834b9978399c79",
    "vqgan3d_published": "4a834b9978399c79",
    "vqgan_aldm": "9bde4ff5e2c4dc2a",
    "vqgan_aldm_phantom": "17d82d40aafc9506",
    "vqgan_aldm_r1": "3628b9b944428240",
    "vqgan_aldm_r3": "0f2b12b1c66c0f33",
    "vqvae_as_run": "8fbeea83019c641c",
    "vqvae_demo": "dd32cf2c9920058e",
    "vqvae_f8": "67e952bea71929b8",
    "vqvae_published": "9e9c006e996d1991",
}


class Draws(TorchDispatchMode):
    """Notes the shape of every tensor that is filled with random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.uniform_, torch.ops.aten.normal_):
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


def variants(name: str) -> list[dict[str, int | None]]:
    """Sizes that data decide: without conditions, and with a semantic map (and tokens)."""
    if name.startswith("vq"):
        return [{"image_channels": 1, "decoder_map_channels": classes} for classes in (None, 3)]
    sizes = {"in_channels": 7, "out_channels": 4}
    conditions = [(None, None)] if name.startswith("scorenet") else [(None, None), (3, 5)]
    return [sizes | {"spade_channels": a, "context_channels": b} for a, b in conditions]


def build(name: str, sizes: dict[str, int | None]) -> nn.Module:
    return compose_part(f"network/{name}")(3 if name.startswith(VOLUMES) else 2, **sizes)


def digest(name: str) -> str:
    content = []
    for sizes in variants(name):
        with torch.device("meta"), Draws() as draws:
            network = build(name, sizes)
        state = [(key, tuple(value.shape)) for key, value in network.state_dict().items()]
        trained = [key for key, _ in network.named_parameters()]
        content.append((state, trained, draws.shapes))
    return hashlib.sha256(repr(content).encode()).hexdigest()[:16]


@pytest.mark.parametrize("name", OURS)
def test_checkpoints_resumed_optimisers_and_seeds_fit_the_network(name):
    """Optimisers know parameters by their place, a seed gives values in the order of the draws."""
    assert digest(name) == DIGESTS[name]
