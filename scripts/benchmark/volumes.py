"""Rows of volumes: 3D VQ-GAN and U-Nets beside MONAI's, cached latents, tiled decoding, traced memory."""

from collections.abc import Callable
from functools import partial

import memory
import torch
import torch.nn.functional as F
from measuring import DEVICE, Measured, best_precision, train_step
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from medldm.diffusion.condition import Condition
from medldm.networks.tiling import TiledAutoencoder
from medldm.planning.step import train_step as whole_step
from networks import compose_part


def vqgan(shape: tuple[int, ...]) -> dict[str, Callable]:
    """One step of stage one with both discriminators and feature matching, without LPIPS, whose weights are
    not here. MONAI: VQVAE of the same widths and codes, discriminators of the same widths, the same losses.
    """
    from monai.networks.nets import VQVAE, PatchDiscriminator

    x = torch.randn(1, 1, *shape, device=DEVICE)
    job = memory.vqgan_job(shape, "model.perceptual=null", "model.perceptual_weight=0.0")
    ours = job.build().to(DEVICE)

    def step() -> None:
        with best_precision():
            whole_step(ours, {"image": x})

    theirs = VQVAE(
        3, 1, 1, channels=(32, 64), num_res_layers=1, num_res_channels=(32, 64),
        downsample_parameters=((2, 4, 1, 1),) * 2, upsample_parameters=((2, 4, 1, 1, 0),) * 2,
        num_embeddings=16_384, embedding_dim=8,
    ).to(DEVICE)  # fmt: skip
    critics = nn.ModuleList(
        PatchDiscriminator(dims, channels=64, in_channels=1, num_layers_d=3).to(DEVICE) for dims in (2, 3)
    )

    def views(v: Tensor) -> tuple[Tensor, Tensor]:
        return v[:, :, v.shape[2] // 2], v

    def monai_step() -> None:
        x_hat, loss = theirs(x)
        critics.requires_grad_(False)
        loss = loss + 4 * F.l1_loss(x_hat, x)
        for critic, fake, real in zip(critics, views(x_hat), views(x), strict=True):
            fakes = critic(fake)
            with torch.no_grad():
                reals = critic(real)
            matching = sum(F.l1_loss(a, b) for a, b in zip(fakes[:-1], reals[:-1], strict=True))
            loss = loss - fakes[-1].mean() + matching
        loss.backward()
        critics.requires_grad_(True)
        for critic, fake, real in zip(critics, views(x_hat.detach()), views(x), strict=True):
            (F.relu(1 - critic(real)[-1]).mean() + F.relu(1 + critic(fake)[-1]).mean()).backward()
        theirs.zero_grad(set_to_none=True)
        critics.zero_grad(set_to_none=True)

    return {"MONAI default": monai_step, "medldm": step}


def unets(grid: tuple[int, ...]) -> dict[str, Callable]:
    """Semantic and plain 3D U-Net under 64 map channels, and MONAI's SPADEDiffusionModelUNet by its defaults
    at the widths of the plain one.
    """
    from monai.networks.nets import SPADEDiffusionModelUNet

    z, spade = torch.randn(1, 8, *grid, device=DEVICE), torch.randn(1, 64, *grid, device=DEVICE)
    t, condition = torch.tensor([500.0], device=DEVICE), Condition(spade=spade)
    theirs = SPADEDiffusionModelUNet(
        3, 8, 8, label_nc=64, channels=(64, 128, 256), attention_levels=(False, False, True),
        num_res_blocks=2, num_head_channels=32,
    ).to(DEVICE)  # fmt: skip
    loss = lambda: F.mse_loss(theirs(z, t, seg=spade).float(), z)  # noqa: E731
    variants: dict[str, Callable] = {"MONAI default": partial(train_step, theirs, loss, torch.enable_grad)}
    for name in ("unet3d", "unet_semantic"):
        ours = compose_part(f"network/{name}")(3, in_channels=8, out_channels=8, spade_channels=64).to(DEVICE)

        def ours_loss(network: nn.Module = ours) -> Tensor:
            return F.mse_loss(network(z, t, condition).float(), z)

        variants[f"medldm {name}"] = partial(train_step, ours, ours_loss, best_precision)
    return variants


def cached_latents(shape: tuple[int, ...]) -> dict[str, Callable]:
    """One step of the semantic U-Net on a volume: encoded each step, or the latents of `medldm encode`."""
    autoencoder = compose_part("network/vqgan3d")(3, image_channels=1).to(DEVICE).eval()
    x = torch.randn(1, 1, *shape, device=DEVICE)
    network = compose_part("network/unet_semantic")(3, in_channels=8, out_channels=8, spade_channels=64).to(
        DEVICE
    )
    with torch.no_grad():
        cached = autoencoder.encode(x)
    t, condition = (
        torch.tensor([500.0], device=DEVICE),
        Condition(spade=torch.randn(1, 64, *cached.shape[2:]).to(x)),
    )

    def loss(encodes: bool) -> Tensor:
        with torch.no_grad():
            z = autoencoder.encode(x) if encodes else cached
        return F.mse_loss(network(z, t, condition).float(), z)

    return {
        name: partial(train_step, network, partial(loss, encodes), best_precision)
        for name, encodes in (("encoding each step", True), ("cached latents", False))
    }


def tiled_work(size: int, tile: int, num_classes: int | None) -> tuple[float, float]:
    """GFLOP of decoding size^3 voxels at once and in tiles; counted from shapes alone."""
    with FakeTensorMode():
        build = compose_part("network/vqgan3d")
        network = build(3, image_channels=1, decoder_map_channels=num_classes).eval()
        z, mask = torch.randn(1, 8, *(size // 4,) * 3), None
        if num_classes:
            mask = torch.randn(1, num_classes, *(size,) * 3)
        work = []
        for decode in (network.decode, TiledAutoencoder(network, tile).decode):
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                decode(z, mask)
            work.append(counter.get_total_flops() / 1e9)
    return work[0], work[1]


def traced(tick: Callable) -> list[Measured]:
    """Work of tiled decoding over that of the whole, and peaks of training in GiB: nothing is computed."""
    results = []
    for name, classes in (("plain", None), ("SPADE", 37)):
        whole, tiles = tiled_work(128, 64, classes)
        ratio = tiles / whole
        row = "tiled decoding, 128^3 in tiles of 64"
        results.append(Measured(row, f"{name} decoder", ratio, (ratio, ratio), "of the work", tiles))
        tick()
    for shape, batch in (((128, 128, 128), 1), ((32, 256, 256), 2)):
        for name, sees_map in (("plain", "false"), ("SPADE", "true")):
            peak = memory.vqgan_memory(shape, batch, f"model.decoder_sees_map={sees_map}")
            row = f"VQ-GAN training, {batch} x {'x'.join(map(str, shape))}, bf16"
            results.append(Measured(row, f"{name} decoder", sum(peak), peak, "GiB"))
            tick()
    return results
