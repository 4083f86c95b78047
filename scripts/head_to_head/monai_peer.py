"""MONAI's VQ-VAE and latent diffusion as its tutorials 2d_vqvae and 2d_ldm use them: no conditions.

The networks, losses and the scheduler are MONAI's, with the settings of those tutorials; what is ours is the
clock that ends a stage and the files.
"""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.files import replacing

BATCH_SIZE = 16
LEARNING_RATE = 1e-4
NUM_STEPS = 1000  # of noise in training: the tutorials' DDPM


def batches(images: Tensor, device: torch.device, seed: int) -> Iterator[Tensor]:
    """Endlessly: (B, 1, H, W) of shuffled epochs."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(images), generator=generator).split(BATCH_SIZE):
            yield images[index].to(device)


def train_for(
    seconds: float, network: nn.Module, loss_of: Callable[[Tensor], Tensor], data: Iterator[Tensor]
) -> int:
    """Updates until the time is over; how many there were."""
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)
    network.train()
    start, num_updates = time.monotonic(), 0
    while time.monotonic() - start < seconds:
        optimizer.zero_grad(set_to_none=True)
        loss_of(next(data)).backward()
        optimizer.step()
        num_updates += 1
    network.eval()
    return num_updates


def kept(path: Path, network: nn.Module, train: Callable[[], int]) -> str:
    """Train the network, or read what an earlier call trained."""
    if path.is_file():
        state = torch.load(path, weights_only=True)
        network.load_state_dict(state["network"])
        network.eval()
        return f"{state['num_updates']} updates (kept)"
    num_updates = train()
    with replacing(path) as aside:
        torch.save({"network": network.state_dict(), "num_updates": num_updates}, aside)
    return f"{num_updates} updates"


def build_networks(width: int) -> tuple[nn.Module, nn.Module]:
    from monai.networks.nets import VQVAE, DiffusionModelUNet

    first = VQVAE(
        spatial_dims=2, in_channels=1, out_channels=1, channels=(width, 2 * width),
        num_res_channels=2 * width, num_res_layers=2,
        downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
        upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)), num_embeddings=256, embedding_dim=32,
    )  # fmt: skip
    widths = (width // 2, width, 2 * width)
    second = DiffusionModelUNet(
        spatial_dims=2, in_channels=32, out_channels=32, num_res_blocks=2, channels=widths,
        attention_levels=(False, True, True), num_head_channels=(0, width, 2 * width),
    )  # fmt: skip
    return first, second


def run(
    folder: Path, train: Tensor, num: int, seconds: float, device: torch.device, width: int, num_steps: int
) -> Tensor:
    """Both stages for half of the time each, then `num` images (N, 1, H, W) in [-1, 1]."""
    from monai.inferers import LatentDiffusionInferer
    from monai.networks.schedulers import DDPMScheduler

    torch.manual_seed(0)
    first, second = (network.to(device) for network in build_networks(width))
    data = batches((train + 1) / 2, device, seed=0)  # the tutorials' range is [0, 1]

    def reconstruction(x: Tensor) -> Tensor:
        x_hat, quantization = first(x)
        return F.l1_loss(x_hat, x) + quantization

    said = kept(folder / "vqvae.pt", first, lambda: train_for(seconds / 2, first, reconstruction, data))
    print(f"monai: VQ-VAE, {said}", flush=True)
    with torch.no_grad():
        latent = first.encode_stage_2_inputs(next(data))
    scheduler = DDPMScheduler(NUM_STEPS, schedule="linear_beta", beta_start=0.0015, beta_end=0.0195)
    inferer = LatentDiffusionInferer(scheduler, scale_factor=1 / latent.std().item())

    def denoising(x: Tensor) -> Tensor:
        noise = torch.randn(len(x), *latent.shape[1:], device=device)
        steps = torch.randint(0, NUM_STEPS, (len(x),), device=device)
        return F.mse_loss(inferer(x, first, second, noise, steps), noise)

    said = kept(folder / "unet.pt", second, lambda: train_for(seconds / 2, second, denoising, data))
    print(f"monai: diffusion, {said}", flush=True)
    scheduler.set_timesteps(num_steps)
    made = []
    with torch.no_grad():
        for part in torch.arange(num).split(BATCH_SIZE):
            noise = torch.randn(len(part), *latent.shape[1:], device=device)
            made.append(inferer.sample(noise, first, second, scheduler, verbose=False).float().cpu())
    return torch.cat(made).clamp(0, 1) * 2 - 1
