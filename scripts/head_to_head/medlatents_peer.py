"""The VAE of medtokenizers and the diffusion transformer of medlatents, by their defaults: no conditions.

The networks, the KL divergence, the noise schedule and the sampler are the packages'. Their trainers expect a
project of their own, so the updates are those of `monai_peer`, with an L1 loss and a KL weight of 1e-6
(Rombach et al. 2022). Latents are divided by their deviation.

The packages are installed without what they ask for beside torch, part of which replaces versions in use:
pip install --no-deps medtokenizers==0.1.2 medlatents==0.1.2 medrs lpips jaxtyping beartype torch-ema \
    wadler-lindig accelerate tqdm huggingface-hub
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from monai_peer import BATCH_SIZE, batches, kept, train_for
from torch import Tensor, nn

KL_WEIGHT = 1e-6
FULL_WIDTH = 256  # of `width`, at which the packages' defaults are taken


def build_networks(side: int, width: int) -> tuple[nn.Module, nn.Module]:
    """Narrower ones below the full width: channels in proportion, and the transformer called Nano."""
    from medlatents import ContinuousDiT_models
    from medtokenizers import ContinuousTokenizer

    first = ContinuousTokenizer(dim=2, resolution=side, channels=64 * width // FULL_WIDTH)
    num_tokens = (side // first.spatial_compression) ** 2
    name = "ContinuousDiT-S" if width >= FULL_WIDTH else "ContinuousDiT-Nano"
    return first, ContinuousDiT_models[name](seq_length=num_tokens, in_channels=first.latent_channels)


def run(
    folder: Path, train: Tensor, num: int, seconds: float, device: torch.device, width: int, num_steps: int
) -> Tensor:
    """Trains each stage for half of the time; then generates `num` images (N, 1, H, W) in [-1, 1]."""
    from medlatents.diffusion import ContinuousGaussianDiffusion

    torch.manual_seed(0)
    side = train.shape[-1]
    first, second = (network.to(device) for network in build_networks(side, width))
    data = batches(train, device, seed=0)

    def reconstruction(x: Tensor) -> Tensor:
        found = first(x)
        return F.l1_loss(found["reconstructions"], x) + KL_WEIGHT * found["kl_loss"]

    said = kept(folder / "vae.pt", first, lambda: train_for(seconds / 2, first, reconstruction, data))
    print(f"medtokenizers: VAE, {said}", flush=True)
    with torch.no_grad():
        latent = first.encode(next(data))[0]
    scale = latent.std()
    diffusion = ContinuousGaussianDiffusion(device=device)

    def denoising(x: Tensor) -> Tensor:
        with torch.no_grad():
            tokens = first.encode(x)[0].flatten(2).transpose(1, 2) / scale
        return diffusion.compute_loss(second, tokens)

    said = kept(folder / "dit.pt", second, lambda: train_for(seconds / 2, second, denoising, data))
    print(f"medlatents: diffusion, {said}", flush=True)
    made = []
    with torch.no_grad():
        for part in torch.arange(num).split(BATCH_SIZE):
            shape = (len(part), latent.shape[2:].numel(), latent.shape[1])
            tokens = diffusion.sample(second, shape, num_inference_steps=num_steps)
            z = (tokens * scale).transpose(1, 2).reshape(len(part), *latent.shape[1:])
            made.append(first.decode(z).float().cpu())
    return torch.cat(made).clamp(-1, 1)
