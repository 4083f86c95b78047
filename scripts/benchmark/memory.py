"""Peak memory of a training step, computed without a GPU and without computing: shapes alone are followed.

Parameters, gradients and two moments of Adam are counted apart from what a step makes: activations kept for
the backward pass, and every other tensor alive at the worst moment. Scratch inside a kernel and the
allocator's fragments are not seen.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from measuring import PeakMemory
from omegaconf import OmegaConf
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers import compose_config, num_parameters  # noqa: E402


class Peak(NamedTuple):
    step_gib: float  # the most that tensors made by one step hold at a time
    state_gib: float  # weights, gradients and moments in float32, buffers

    @property
    def total_gib(self) -> float:
        return self.step_gib + self.state_gib


class RandomVGG(torch.nn.Module):
    """LPIPS' backbone with weights of any kind: its activations are what counts."""

    def __init__(self) -> None:
        super().__init__()
        from torchmetrics.functional.image.lpips import _LPIPS

        self.network = _LPIPS(net="vgg", pnet_rand=True, eval_mode=True).requires_grad_(False)

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        rgb = (v.expand(-1, 3, -1, -1) for v in (x_hat, x))
        return self.network(*rgb)


def build_vqgan(*overrides: str) -> torch.nn.Module:
    """The module of configs/experiment/medlsdm/autopet_vqgan, in training mode."""
    from medldm.build import build_autoencoder_module

    cfg = compose_config("train", "experiment=medlsdm/autopet_vqgan", "data.root=-", *overrides)
    model = OmegaConf.to_container(cfg.model, resolve=True)
    module = build_autoencoder_module(model, {"spatial_dims": 3, "image_channels": 1, "num_classes": 37})
    module._trainer = SimpleNamespace(world_size=1, global_step=0, global_rank=0)
    module.draw_slices = lambda x, _: (0, torch.zeros(len(x), dtype=torch.long, device=x.device))
    return module.train()


def vqgan_losses(module: torch.nn.Module, batch: dict) -> None:
    """The generator's backward pass and the discriminators', as AdversarialModule.training_step has them."""
    module.discriminators.requires_grad_(False)
    step = module.generator_step(batch, 0, 1.0)
    step.losses["loss"].backward()
    module.discriminators.requires_grad_(True)
    module.discriminator_loss(step.real, step.fake.detach(), step.slices).backward()


def vqgan(shape: tuple[int, ...], batch_size: int, *overrides: str) -> Peak:
    """Stage one with both discriminators, feature matching and LPIPS, under bf16 autocast."""
    module, mode = build_vqgan(*overrides), FakeTensorMode()
    make_fake(module, mode)
    with mode:
        network = RandomVGG()
        module.perceptual.forward = lambda x_hat, x: network(x_hat, x).mean()
        if module.autoencoder.decoder_map_channels:  # a look at the labels needs labels
            module.decoder_map = lambda _: torch.zeros(batch_size, 37, *shape)
        batch = {"image": torch.randn(batch_size, 1, *shape)}
        with torch.autocast("cpu", torch.bfloat16):
            return traced(partial(vqgan_losses, module, batch), module)


def make_fake(module: torch.nn.Module, mode: FakeTensorMode) -> None:
    """The module's tensors without their values; to be called before the mode is entered."""
    for part in module.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = mode.from_tensor(value)
        for name, value in part._buffers.items():
            part._buffers[name] = None if value is None else mode.from_tensor(value)


def traced(step: Callable[[], None], module: torch.nn.Module) -> Peak:
    with PeakMemory() as memory:
        step()
    gradients = sum(p.numel() for p in module.parameters() if p.grad is not None)
    moments = 2 * sum(p.numel() for p in module.parameters() if p.requires_grad)
    state = num_parameters(module) + moments + sum(b.numel() for b in module.buffers())
    return Peak((memory.peak - 4 * gradients) / 2**30, 4 * (state + gradients) / 2**30)
