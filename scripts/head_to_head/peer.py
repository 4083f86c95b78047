"""What every other library is given: the same images, clock and files.

A library is a `Peer`: its two networks, their losses and its sampler. What is ours is the loop of updates,
the clock that ends a stage and the files.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medldm.files import replacing

FULL_WIDTH = 256  # of `width`, at which a library's own sizes are taken


class Settings(NamedTuple):
    """What every library is trained with: seconds of both stages together, and the rate of Adam."""

    seconds: float
    device: torch.device
    width: int = FULL_WIDTH
    num_steps: int = 1000
    learning_rate: float = 1e-4
    batch_size: int = 16


class NotOfferedError(Exception):
    """A library has no networks for what is asked."""


class Peer(ABC):
    """Two stages of a library without conditions. Images are (B, 1, *S) in [-1, 1], S the size (H, W) or, of
    volumes, (D, H, W).

    `first` and `second` are its networks; stage one is trained by `reconstruction`, stage two by `denoising`.
    `width` narrows both networks below `FULL_WIDTH`. A library that has no networks for a size raises
    `NotOfferedError`.
    """

    first: nn.Module
    second: nn.Module
    stages: tuple[str, str]  # what is trained, as it is printed

    @abstractmethod
    def __init__(self, size: Sequence[int], width: int) -> None: ...

    @abstractmethod
    def reconstruction(self, x: Tensor) -> Tensor:
        """The loss of stage one."""

    @abstractmethod
    def rebuilt(self, x: Tensor) -> Tensor:
        """The images through the first stage and back, in [-1, 1], called without gradients."""

    @abstractmethod
    def measure(self, x: Tensor) -> None:
        """Between the stages, without gradients: keep shape and deviation of the latents of `x`."""

    @abstractmethod
    def denoising(self, x: Tensor) -> Tensor:
        """The loss of stage two."""

    @abstractmethod
    def generate(self, num: int, num_steps: int) -> Tensor:
        """`num` images, called without gradients."""


def batches(images: Tensor, settings: Settings, seed: int) -> Iterator[Tensor]:
    """Endlessly: (B, 1, *S) of shuffled epochs."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for index in torch.randperm(len(images), generator=generator).split(settings.batch_size):
            yield images[index].to(settings.device)


def train_for(
    settings: Settings, network: nn.Module, loss_of: Callable[[Tensor], Tensor], data: Iterator[Tensor]
) -> int:
    """Updates until half of the time is over; how many there were."""
    optimizer = torch.optim.Adam(network.parameters(), lr=settings.learning_rate)
    network.train()
    start, num_updates = time.monotonic(), 0
    while time.monotonic() - start < settings.seconds / 2:
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
    build: Callable[[Sequence[int], int], Peer],
    folder: Path,
    train: Tensor,
    test: Tensor,
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Trains each stage on `train` (N, 1, *S) for half of the time. Returns `test` (M, 1, *S) through the
    first stage and back, and M generated images, both in [-1, 1].
    """
    torch.manual_seed(0)
    device = settings.device
    peer = build(train.shape[2:], settings.width)
    data = batches(train, settings, seed=0)
    losses = (peer.reconstruction, peer.denoising)
    for stage, network, loss_of in zip(peer.stages, (peer.first, peer.second), losses, strict=True):
        network.to(device)
        path = folder / f"{'first' if network is peer.first else 'second'}.pt"
        said = kept(path, network, lambda n=network, f=loss_of: train_for(settings, n, f, data))
        print(f"{stage}: {said}", flush=True)
        torch.manual_seed(0)  # so that a continued run is an uninterrupted one from here on
        if network is peer.first:
            with torch.no_grad():
                peer.measure(train[: settings.batch_size].to(device))
    with torch.no_grad():
        parts = test.split(settings.batch_size)
        made = [peer.generate(len(part), settings.num_steps).float().cpu() for part in parts]
        again = [peer.rebuilt(part.to(device)).float().cpu() for part in parts]
    return torch.cat(again).clamp(-1, 1), torch.cat(made).clamp(-1, 1)
