"""The autoencoder `continuous.aekl.f8_d4` and the diffusion transformer `dit.s_2` of medlat, as its README
joins them, with its Gaussian diffusion.

The networks, the KL divergence with its weight, the noise schedule and the sampler (DDIM) are the package's;
the updates are those of `peer`, with an L1 loss. Latents are divided by their deviation. The transformer asks
for a class: all images are of one.

pip install --no-deps medlat==0.1.5 timm einops
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peer import FULL_WIDTH, NotOfferedError, Peer
from torch import Tensor


class Medlat(Peer):
    """Narrower below the full width: channels of both networks in proportion."""

    stages = ("medlat: VAE", "medlat: diffusion")

    def __init__(self, size: Sequence[int], width: int) -> None:
        from medlat import get_model, suggest_generator_params
        from medlat.generators.non_autoregressive.dit.models import DiT

        if len(size) == 3:
            raise NotOfferedError("aekl and dit.s_2 are for pictures")
        side = size[-1]
        narrow = width / FULL_WIDTH
        self.first = get_model(
            "continuous.aekl.f8_d4", img_size=side, in_channels=1, out_ch=1, ch=int(128 * narrow)
        )
        arguments = suggest_generator_params(self.first) | {"img_size": side, "num_classes": 1}
        if width >= FULL_WIDTH:
            self.second = get_model("dit.s_2", **arguments)
        else:  # dit.s_2 with fewer channels, as its builder makes it
            heads = max(1, int(6 * narrow))
            self.second = DiT(depth=12, hidden_size=64 * heads, patch_size=2, num_heads=heads, **arguments)

    def reconstruction(self, x: Tensor) -> Tensor:
        z, divergence, _ = self.first.encode(x)
        return F.l1_loss(self.first.decode(z), x) + divergence

    def rebuilt(self, x: Tensor) -> Tensor:
        return self.first.decode(self.first.encode(x)[0])

    def measure(self, x: Tensor) -> None:
        latent = self.first.encode(x)[0]
        self.shape, self.scale = latent.shape[1:], latent.std()

    def diffusion(self, respacing: str):
        from medlat import create_scheduler

        return create_scheduler("diffusion", learn_sigma=True, timestep_respacing=respacing)

    def denoising(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            z = self.first.encode(x)[0] / self.scale
        steps = torch.randint(0, 1000, (len(x),), device=x.device)
        classes = torch.zeros_like(steps)
        found = self.diffusion("").training_losses(self.second, z, steps, model_kwargs={"y": classes})
        return found["loss"].mean()

    def generate(self, num: int, num_steps: int) -> Tensor:
        device = next(self.second.parameters()).device
        classes = torch.zeros(num, dtype=torch.long, device=device)
        z = self.diffusion(f"ddim{num_steps}").p_sample_loop(
            self.second, (num, *self.shape), model_kwargs={"y": classes}, device=device, sampler="ddim"
        )
        return self.first.decode(z * self.scale)
