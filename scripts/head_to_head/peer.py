"""What every other library is given: the same images, clock and files.

A library is a `Peer`: its two networks, their losses and its sampler. What is ours is the loop of updates,
the clock that ends a stage and the files.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from medldm.files import replacing

BATCH_SIZE = 16
LEARNING_RATE = 1e-4
FULL_WIDTH = 256  # of `width`, at which a library's own sizes are taken


class Peer(ABC):
    """Two stages of a library without conditions. Images are (B, 1, H, W) in [-1, 1].

    `first` and `second` are its networks; stage one is trained by `reconstruction`, stage two by `denoising`.
    `width` narrows both networks below `FULL_WIDTH`.
    """

    first: nn.Module
    second: nn.Module
    stages: tuple[str, str]  # what is trained, as it is printed

    @abstractmethod
    def __init__(self, side: int, width: int) -> None: ...

    @abstractmethod
    def reconstruction(self, x: Tensor) -> Tensor:
        """The loss of stage one."""

    @abstractmethod
    def measure(self, x: Tensor) -> None:
        """Between the stages, without gradients: keep shape and deviation of the latents of `x`."""

    @abstractmethod
    def denoising(self, x: Tensor) -> Tensor:
        """The loss of stage two."""

    @abstractmethod
    def generate(self, num: int, num_steps: int) -> Tensor:
        """`num` images, called without gradients."""


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


def run(
    build: Callable[[int, int], Peer],
    folder: Path,
    train: Tensor,
    num: int,
    seconds: float,
    device: torch.device,
    width: int,
    num_steps: int,
) -> Tensor:
    """Trains each stage for half of the time; then generates `num` images (N, 1, H, W) in [-1, 1]."""
    torch.manual_seed(0)
    peer = build(train.shape[-1], width)
    data = batches(train, device, seed=0)
    losses = (peer.reconstruction, peer.denoising)
    for stage, network, loss_of in zip(peer.stages, (peer.first, peer.second), losses, strict=True):
        network.to(device)
        path = folder / f"{'first' if network is peer.first else 'second'}.pt"
        said = kept(path, network, lambda n=network, f=loss_of: train_for(seconds / 2, n, f, data))
        print(f"{stage}: {said}", flush=True)
        torch.manual_seed(0)  # so that a continued run is an uninterrupted one from here on
        if network is peer.first:
            with torch.no_grad():
                peer.measure(train[:BATCH_SIZE].to(device))
    with torch.no_grad():
        parts = torch.arange(num).split(BATCH_SIZE)
        made = [peer.generate(len(part), num_steps).float().cpu() for part in parts]
    return torch.cat(made).clamp(-1, 1)
