"""Pictures of Medical VDM in training: samples, reconstructions, its schedule, and images with
growing noise.
"""

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from medldm.batch import spatial_shape
from medldm.diffusion.sampler import Sampler
from medldm.models.common import seed_of
from medldm.plots import grid, points_figure, schedule_figure

if TYPE_CHECKING:
    from medldm.models.variational import VariationalModule

PICTURE_STEPS = 100  # sampling steps at most where a picture is only for looking at
NOISING_TIMES = 9  # pictures of the forward-noising strip
NUM_POINTS = 1000  # of a scatter plot, where data are points


def picture_sampler(module: "VariationalModule") -> Sampler:
    return dataclasses.replace(module.sampler, num_steps=min(module.sampler.num_steps, PICTURE_STEPS))


@torch.no_grad()
def picture_rows(module: "VariationalModule", batch: dict) -> list[Tensor]:
    """Rows for the sample grid: real images, the shortcut, recon(0.8), samples. None for points."""
    x = batch["image"]
    if x.ndim < 4:
        return []
    condition, sampler = module.condition(batch), picture_sampler(module)
    names = [f"grid{i}" for i in range(len(x))]
    generator = torch.Generator(x.device).manual_seed(seed_of(module.seed, "picture"))
    return [
        x,
        module.shortcut(x, condition, generator),
        module.recon(x, condition, sampler=sampler, generator=generator),
        module.sample(batch, names, module.latent_shape(spatial_shape(x)), sampler=sampler),
    ]


@torch.no_grad()
def figures_of(module: "VariationalModule", batch: dict) -> dict[str, Tensor]:
    """More pictures by name, (3, H, W) uint8: the schedule, and forward noising or, of points, their plot."""
    x = batch["image"]
    figures = {"schedule": schedule_figure(module.schedule)}
    if x.ndim < 4:
        names = [f"point{i}" for i in range(NUM_POINTS)]
        labels = torch.full((NUM_POINTS,), -1, device=x.device)
        points = module.sample({"label": labels}, names, (), sampler=picture_sampler(module))
        return figures | {"points": points_figure(x, points)}
    return figures | {"noising": noising_strip(module, batch)}


def noising_strip(module: "VariationalModule", batch: dict) -> Tensor:
    """One image noised more and more: what its latent decodes to, and what the network makes of it."""
    one = {k: v[:1] for k, v in batch.items() if isinstance(v, Tensor)}
    x, condition = one["image"], module.condition(one)
    f = module.encode(module.likelihood.observe(x, torch.full_like(x, 0.5)), condition)
    generator = torch.Generator(x.device).manual_seed(seed_of(module.seed, "noising"))
    noise = torch.randn(f.shape, device=f.device, generator=generator)
    noised, denoised = [x], [x]
    for t in torch.linspace(0, 1, NOISING_TIMES, dtype=torch.float64, device=x.device):
        gamma = module.schedule.gamma(t.expand(1))
        z_t = module.schedule.add_noise(f, noise, gamma)
        alpha = module.schedule.scales(gamma, f).alpha
        noised.append(module.expected_image(z_t / alpha, condition))
        denoised.append(module.expected_image(module.predict(z_t, t.expand(1), condition)[1], condition))
    return grid([torch.cat(noised), torch.cat(denoised)])
