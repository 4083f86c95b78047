"""MONAI's VQ-VAE and latent diffusion as its tutorials use them: networks, losses, scheduler and their
settings, of 2d_vqvae and 2d_ldm, of volumes those of 3d_vqvae and 3d_ldm.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from peer import NotOfferedError, Peer
from torch import Tensor

NUM_STEPS = 1000  # of noise in training: the tutorials' DDPM


class Monai(Peer):
    stages = ("monai: VQ-VAE", "monai: diffusion")

    def __init__(self, size: Sequence[int], width: int) -> None:
        from monai.networks.nets import VQVAE, DiffusionModelUNet
        from monai.networks.schedulers import DDPMScheduler

        if any(n % 16 for n in size):
            raise NotOfferedError(
                f"two networks that halve twice need sizes in multiples of 16, not {[*size]}"
            )
        dims = len(size)
        self.first = VQVAE(
            spatial_dims=dims, in_channels=1, out_channels=1, channels=(width, width),
            num_res_channels=width, num_res_layers=2,
            downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
            upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)), num_embeddings=256, embedding_dim=32,
        )  # fmt: skip
        widths = (width // 2, width, 2 * width) if dims == 2 else (32, 64, 64)
        heads = (0, width, 2 * width) if dims == 2 else (0, 64, 64)
        self.second = DiffusionModelUNet(
            spatial_dims=dims, in_channels=32, out_channels=32, num_res_blocks=2 if dims == 2 else 1,
            channels=widths, attention_levels=(False, True, True), num_head_channels=heads,
        )  # fmt: skip
        schedule = "linear_beta" if dims == 2 else "scaled_linear_beta"
        self.scheduler = DDPMScheduler(NUM_STEPS, schedule=schedule, beta_start=0.0015, beta_end=0.0195)

    def reconstruction(self, x: Tensor) -> Tensor:
        x = (x + 1) / 2  # the tutorials' range
        x_hat, quantization = self.first(x)
        return F.l1_loss(x_hat, x) + quantization

    def rebuilt(self, x: Tensor) -> Tensor:
        return self.first((x + 1) / 2)[0] * 2 - 1

    def measure(self, x: Tensor) -> None:
        from monai.inferers import LatentDiffusionInferer

        latent = self.first.encode_stage_2_inputs((x + 1) / 2)
        self.shape = latent.shape[1:]
        self.inferer = LatentDiffusionInferer(self.scheduler, scale_factor=1 / latent.std().item())

    def denoising(self, x: Tensor) -> Tensor:
        noise = torch.randn(len(x), *self.shape, device=x.device)
        steps = torch.randint(0, NUM_STEPS, (len(x),), device=x.device)
        return F.mse_loss(self.inferer((x + 1) / 2, self.first, self.second, noise, steps), noise)

    def generate(self, num: int, num_steps: int) -> Tensor:
        self.scheduler.set_timesteps(num_steps)
        noise = torch.randn(num, *self.shape, device=next(self.second.parameters()).device)
        x = self.inferer.sample(noise, self.first, self.second, self.scheduler, verbose=False)
        return x.clamp(0, 1) * 2 - 1
