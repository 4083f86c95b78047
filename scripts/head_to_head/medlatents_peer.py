"""The VAE of medtokenizers and the diffusion transformer of medlatents, by their defaults.

The networks, the KL divergence, the noise schedule and the sampler are the packages'. Their trainers expect a
project of their own, so the updates are those of `peer`, with an L1 loss and a KL weight of 1e-6 (Rombach et
al. 2022). Latents are divided by their deviation.

The packages are installed without what they ask for beside torch, part of which replaces versions in use:
pip install --no-deps medtokenizers==0.1.2 medlatents==0.1.2 medrs lpips jaxtyping beartype torch-ema \
    wadler-lindig accelerate tqdm huggingface-hub
"""

from collections.abc import Sequence
from math import prod

import torch.nn.functional as F
from peer import FULL_WIDTH, Peer
from torch import Tensor, no_grad

KL_WEIGHT = 1e-6


class Medlatents(Peer):
    """Narrower below the full width: channels in proportion, and the transformer called Nano."""

    stages = ("medtokenizers: VAE", "medlatents: diffusion")

    def __init__(self, size: Sequence[int], width: int) -> None:
        from medlatents import ContinuousDiT_models
        from medtokenizers import ContinuousTokenizer

        channels = 64 * width // FULL_WIDTH
        self.first = ContinuousTokenizer(dim=len(size), resolution=max(size), channels=channels)
        num_tokens = prod(n // self.first.spatial_compression for n in size)
        build = ContinuousDiT_models["ContinuousDiT-S" if width >= FULL_WIDTH else "ContinuousDiT-Nano"]
        self.second = build(seq_length=num_tokens, in_channels=self.first.latent_channels)

    def reconstruction(self, x: Tensor) -> Tensor:
        found = self.first(x)
        return F.l1_loss(found["reconstructions"], x) + KL_WEIGHT * found["kl_loss"]

    def rebuilt(self, x: Tensor) -> Tensor:
        mean = self.first.encode(x)[1][1][0]
        return self.first.decode(mean)

    def measure(self, x: Tensor) -> None:
        from medlatents.diffusion import ContinuousGaussianDiffusion

        latent = self.first.encode(x)[0]
        self.shape, self.scale = latent.shape[1:], latent.std()
        self.diffusion = ContinuousGaussianDiffusion(device=x.device)

    def denoising(self, x: Tensor) -> Tensor:
        with no_grad():
            tokens = self.first.encode(x)[0].flatten(2).transpose(1, 2) / self.scale
        return self.diffusion.compute_loss(self.second, tokens)

    def generate(self, num: int, num_steps: int) -> Tensor:
        shape = (num, self.shape[1:].numel(), self.shape[0])
        tokens = self.diffusion.sample(self.second, shape, num_inference_steps=num_steps)
        return self.first.decode((tokens * self.scale).transpose(1, 2).reshape(num, *self.shape))
