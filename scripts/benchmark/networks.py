"""Rows of the networks: one training step of medldm's network and of MONAI's nearest one."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from measuring import DEVICE, best_precision, train_step
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers import compose_part

UNET_CHANNELS = (256, 384, 512)
# MONAI's settings: what its classes do by themselves, and what its users can switch on.
MONAI = (("MONAI default", False, torch.enable_grad), ("MONAI best", True, best_precision))
OURS = (
    ("medldm", True),
    ("medldm, contiguous", False),
)  # channels_last=true, as `medldm train` has it, and false


def placed(module: nn.Module, channels_last: bool) -> nn.Module:
    module = module.to(DEVICE).train()
    return module.to(memory_format=torch.channels_last) if channels_last else module


def vqvae(batch_size: int, compiled: bool) -> dict[str, Callable]:
    """configs/model/network/vqvae_f8 at 256 x 256, and AutoencoderKL's encoder and decoder with MONAI's EMA
    quantiser between them, which is nearest: 4 latent channels, 4,096 codes, 1/8 of the size. The same loss.
    """
    from monai.networks.layers.vector_quantizer import EMAQuantizer
    from monai.networks.layers.vector_quantizer import VectorQuantizer as MonaiQuantizer
    from monai.networks.nets import AutoencoderKL

    class MonaiAutoencoder(nn.Module):
        def __init__(self, flash: bool) -> None:
            super().__init__()
            network = AutoencoderKL(
                2, 1, 1, channels=(128, 128, 256, 256), num_res_blocks=(2,) * 4,
                latent_channels=4, norm_num_groups=32,
                attention_levels=(False,) * 4, use_flash_attention=flash,
            )  # fmt: skip
            self.encoder, self.pre = network.encoder, network.quant_conv_mu
            self.decoder, self.post = network.decoder, network.post_quant_conv
            self.quantizer = MonaiQuantizer(EMAQuantizer(2, 4096, 4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            loss, z = self.quantizer(self.pre(self.encoder(x)))
            return self.decoder(self.post(z)), loss

    x = torch.randn(batch_size, 1, 256, 256, device=DEVICE)
    variants: dict[str, Callable] = {}
    for name, flash, precision in MONAI:
        theirs = placed(MonaiAutoencoder(flash), channels_last=flash)

        def loss(theirs: nn.Module = theirs) -> Tensor:
            x_hat, quantizer_loss = theirs(x)
            return F.l1_loss(x_hat.float(), x) + quantizer_loss

        variants[name] = partial(train_step, theirs, loss, precision)

    for name, channels_last in OURS:
        ours = placed(compose_part("network/vqvae_f8")(2, image_channels=1), channels_last)

        def ours_loss(network: nn.Module = ours) -> Tensor:
            x_hat, quantized = network(x)
            return F.l1_loss(x_hat.float(), x) + quantized.loss

        variants[name] = partial(train_step, ours, ours_loss, best_precision)
        if compiled:
            loss = partial(ours_loss, torch.compile(ours))
            variants[f"{name} compiled"] = partial(train_step, ours, loss, best_precision)
    return variants


def unet(batch_size: int, compiled: bool) -> dict[str, Callable]:
    """configs/model/network/unet_cardiac_as_run (103.5M) on 32 x 32 latents, and MONAI's U-Net of the same
    widths (91.3M) with 16 heads and attention in every level too. Mean squared error on the noise.
    """
    from monai.networks.nets import DiffusionModelUNet

    from medldm.diffusion.condition import Condition

    z, concat, target = (torch.randn(batch_size, n, 32, 32, device=DEVICE) for n in (4, 1, 4))
    t = torch.rand(batch_size, device=DEVICE) * 1000
    condition = Condition(concat, None, None, None)
    variants: dict[str, Callable] = {}
    for name, flash, precision in MONAI:
        theirs = DiffusionModelUNet(
            2, 5, 4, channels=UNET_CHANNELS, num_res_blocks=2, attention_levels=(True,) * len(UNET_CHANNELS),
            num_head_channels=tuple(width // 16 for width in UNET_CHANNELS), use_flash_attention=flash,
        )  # fmt: skip
        theirs = placed(theirs, channels_last=flash)
        loss = lambda theirs=theirs: F.mse_loss(theirs(torch.cat([z, concat], 1), t).float(), target)  # noqa: E731
        variants[name] = partial(train_step, theirs, loss, precision)

    for name, channels_last in OURS:
        ours = placed(
            compose_part("network/unet_cardiac_as_run")(2, in_channels=5, out_channels=4), channels_last
        )

        def ours_loss(network: nn.Module = ours) -> Tensor:
            return F.mse_loss(network(z, t, condition).float(), target)

        variants[name] = partial(train_step, ours, ours_loss, best_precision)
        if compiled:
            loss = partial(ours_loss, torch.compile(ours))
            variants[f"{name} compiled"] = partial(train_step, ours, loss, best_precision)
    return variants
