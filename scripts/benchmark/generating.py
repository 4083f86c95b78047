"""Rows of sampling: seconds an image or volume of whole systems at their default settings, and what MONAI
has for the same: a U-Net of the same widths, its DDIM scheduler with as many steps, and its decoder.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import DEVICE, best_precision
from omegaconf import OmegaConf
from torch import Tensor, nn

from medldm.commands import plan as planning
from medldm.devices import in_channels_last, inference_precision, mixed_precision, to_channels_last
from medldm.planning.step import random_batch
from networks import UNET_CHANNELS

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers import compose_config

# Voxels of an image: those of training on a GPU, and on a CPU volumes that take seconds a step.
SIZES = {
    "cardiac2d/ldm": {"cuda": (256, 256), "cpu": (256, 256)},
    "medlsdm/autopet_ldm": {"cuda": (32, 256, 256), "cpu": (32, 64, 64)},
    "aldm/brats_ldm": {"cuda": (144, 192, 144), "cpu": (32, 32, 32)},
}


class Counterpart(NamedTuple):
    """MONAI's parts: U-Net, decoder, what the U-Net sees beside the latent, as channels and as a map."""

    unet: nn.Module
    decode: Callable[[Tensor], Tensor]
    concat_channels: int = 0
    map_channels: int = 0


def system(experiment: str) -> tuple[nn.Module, dict]:
    """Both stages of an experiment with random weights, and the batch of one image that conditions it."""
    size = ",".join(map(str, SIZES[experiment][DEVICE.type]))
    overrides = (f"experiment={experiment}", f"image_shape=[{size}]", "data.batch_size=1")
    cfg = OmegaConf.to_container(compose_config("plan", *overrides), resolve=True)
    job = planning.job_of(cfg, experiment)
    module = job.build().to(DEVICE).eval()
    return module, random_batch(job, module, 1, DEVICE)


def monai_cardiac() -> Counterpart:
    from monai.networks.nets import AutoencoderKL, DiffusionModelUNet

    unet = DiffusionModelUNet(
        2, 5, 4, channels=UNET_CHANNELS, num_res_blocks=2, attention_levels=(True,) * len(UNET_CHANNELS),
        num_head_channels=tuple(width // 16 for width in UNET_CHANNELS),
    )  # fmt: skip
    autoencoder = AutoencoderKL(
        2, 1, 1, channels=(128, 128, 256, 256), num_res_blocks=(2,) * 4, latent_channels=4,
        norm_num_groups=32, attention_levels=(False,) * 4,
    )  # fmt: skip
    return Counterpart(unet, autoencoder.to(DEVICE).eval().decode, concat_channels=1)


def monai_semantic() -> Counterpart:
    from monai.networks.nets import VQVAE, SPADEDiffusionModelUNet

    unet = SPADEDiffusionModelUNet(
        3, 8, 8, label_nc=64, channels=(64, 128, 256), attention_levels=(False, False, True),
        num_res_blocks=2, num_head_channels=32,
    )  # fmt: skip
    autoencoder = VQVAE(
        3, 1, 1, channels=(32, 64), num_res_layers=1, num_res_channels=(32, 64),
        downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=16_384, embedding_dim=8,
    )  # fmt: skip
    return Counterpart(unet, autoencoder.to(DEVICE).eval().decoder, map_channels=64)


def monai_translation(latent_channels: int) -> Counterpart:
    from monai.networks.nets import VQVAE, DiffusionModelUNet

    unet = DiffusionModelUNet(
        3, 3 * latent_channels, latent_channels, channels=(128, 128, 256), num_res_blocks=1,
        attention_levels=(False, False, True), num_head_channels=32,
    )  # fmt: skip
    autoencoder = VQVAE(
        3, 1, 1, channels=(64, 128), num_res_layers=1, num_res_channels=(64, 128),
        downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=8_192, embedding_dim=latent_channels,
    )  # fmt: skip
    return Counterpart(unet, autoencoder.to(DEVICE).eval().decoder, concat_channels=2 * latent_channels)


def monai_sampling(theirs: Counterpart, latent: tuple[int, ...], num_steps: int) -> Callable[[], Tensor]:
    """DDIM of `num_steps` from noise (1, C, *s), then decoding."""
    from monai.networks.schedulers import DDIMScheduler

    unet = theirs.unet.to(DEVICE).eval()
    scheduler = DDIMScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(num_steps)
    beside = torch.randn(1, theirs.concat_channels, *latent[1:], device=DEVICE)
    given = (
        {"seg": torch.randn(1, theirs.map_channels, *latent[1:], device=DEVICE)}
        if theirs.map_channels
        else {}
    )

    @torch.no_grad()
    def run() -> Tensor:
        z = torch.randn(1, *latent, device=DEVICE)
        with best_precision():
            for t in scheduler.timesteps:
                noise = unet(torch.cat([z, beside], dim=1), t.to(DEVICE)[None], **given)
                z, _ = scheduler.step(noise.float(), t, z)
            return theirs.decode(z)

    return run


def our_sampling(module: nn.Module, batch: dict, latent: tuple[int, ...]) -> Callable[[], Tensor]:
    """What `medldm sample` does for one case, with the experiment's own sampler and in its precision, which
    on a CPU is float32 also where trainings run in bf16.
    """
    precision = inference_precision("auto", DEVICE)

    @torch.no_grad()
    def run() -> Tensor:
        with mixed_precision(DEVICE, precision):
            return module.sample(batch, ["a"], latent[1:])

    return run


def variants_of(experiment: str) -> tuple[dict[str, Callable], int]:
    """(callables that make one image each, number of steps)."""
    module, batch = system(experiment)
    size, stage = SIZES[experiment][DEVICE.type], module.first_stage
    latent = (stage.latent_channels, *stage.latent_shape(size))
    counterparts = {
        "cardiac2d/ldm": monai_cardiac,
        "medlsdm/autopet_ldm": monai_semantic,
        "aldm/brats_ldm": lambda: monai_translation(latent[0]),
    }
    num_steps = module.sampler.num_steps
    theirs = counterparts[experiment]()
    if DEVICE.type == "cuda":  # as `medldm sample` and MONAI's users can have it
        to_channels_last(module)
        batch = in_channels_last(batch)
    return {
        "MONAI, DDIM": monai_sampling(theirs, latent, num_steps),
        "medldm": our_sampling(module, batch, latent),
    }, num_steps


def rows() -> Iterator[tuple[str, dict[str, Callable]]]:
    """(title, variants) of each system."""
    for experiment, sizes in SIZES.items():
        variants, num_steps = variants_of(experiment)
        shape = "x".join(map(str, sizes[DEVICE.type]))
        yield f"sampling {experiment}, {shape}, {num_steps} steps", variants
