"""Rows of the quantiser: {variant: callable} of the same training step in medldm and in MONAI."""

from collections.abc import Callable
from functools import partial

import torch
from measuring import DEVICE, train_step
from torch import Tensor


def quantizer(code_dim: int) -> dict[str, Callable]:
    """One training step over 2 x 32^3 tokens with 8,192 codes; MONAI has no faster setting."""
    from monai.networks.layers.vector_quantizer import EMAQuantizer
    from monai.networks.layers.vector_quantizer import VectorQuantizer as MonaiQuantizer

    from medldm.networks.quantizer import VectorQuantizer

    ours = VectorQuantizer(8192, code_dim, ema_decay=0.99, init="normal").to(DEVICE).train()
    theirs = MonaiQuantizer(EMAQuantizer(3, 8192, code_dim)).to(DEVICE).train()
    x = torch.randn(2, code_dim, 32, 32, 32, device=DEVICE, requires_grad=True)

    def ours_loss() -> Tensor:
        quantized = ours(x)
        return quantized.z.mean() + quantized.loss

    def theirs_loss() -> Tensor:
        loss, z = theirs(x)
        return z.mean() + loss

    full = torch.enable_grad
    return {
        "MONAI EMAQuantizer": partial(train_step, theirs, theirs_loss, full),
        "medldm": partial(train_step, ours, ours_loss, full),
    }


def memory() -> dict[str, Callable]:
    """32,768 tokens and 16,384 codes in training: a full distance matrix would hold 2 GiB."""
    from medldm.networks.quantizer import VectorQuantizer

    module = VectorQuantizer(16384, 4, ema_decay=0.99, restart_threshold=0.1).to(DEVICE).train()
    x = torch.randn(32, 4, 32, 32, device=DEVICE, requires_grad=True)

    def loss() -> Tensor:
        quantized = module(x)
        return quantized.z.mean() + quantized.loss

    return {"medldm": partial(train_step, module, loss, torch.enable_grad)}
