"""Measures how much of its latents an autoencoder's decoder uses: the share that survives decoding and
encoding.

A channel that the decoder ignores is noise for stage two, which spends capacity on it all the same. Since
stage two trains for hours, this is measured before, when latents are cached.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medldm.data.loading.dataset import CaseDataset
from medldm.files import read_json
from medldm.inference import autocast, to_device
from medldm.models.common import TrainedModule
from medldm.networks.tiling import TiledAutoencoder

log = logging.getLogger(__name__)
MOSTLY_NOISE = 0.5  # there is a warning for channels below this share


def surviving_shares(pairs: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """(C,) float64, of pairs of latents (B, C, *s) before and after decoding and encoding: 1 - mean squared
    difference / variance. 1 means that they return unchanged, 0 is the score of each channel's mean.
    """
    count, sums = 0, 0
    for before, after in pairs:
        h, again = (x.double().transpose(0, 1).flatten(1) for x in (before, after))
        sums = sums + torch.stack([h.sum(1), h.square().sum(1), (again - h).square().sum(1)])
        count += h.shape[1]
    total, squares, differences = sums / count
    return 1 - differences / (squares - total.square()).clamp_min(1e-12)


def returned(
    module: TrainedModule, dataset: CaseDataset, positions: list[int], *, tile: int | None, precision: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """The latents of each item, and what they are after decoding and encoding."""
    autoencoder = module.autoencoder
    through = autoencoder if tile is None else TiledAutoencoder(autoencoder, tile)
    for position in positions:
        batch = to_device(dataset.__getitems__([(0, position)]), module.device)
        with torch.no_grad(), autocast(module.device, precision):
            h = through.encode(batch["image"])
            image = through.decode(autoencoder.quantize(h.to(module.device)).z)
            again = through.encode(image.to(module.device))
        yield h.float().cpu(), again.float().cpu()


def earlier_audit(folder: Path) -> dict[str, Any] | None:
    """The audit that latents.json holds, where nothing has changed since."""
    path = folder / "latents.json"
    return read_json(path, "delete it and encode again").get("audit") if path.is_file() else None


def audit_latents(
    module: TrainedModule,
    dataset: CaseDataset,
    count: int,
    *,
    tile: int | None = None,
    precision: str = "auto",
) -> dict[str, Any] | None:
    """The surviving share of each channel over at most `count` items, evenly spread. None for a count of 0,
    and for a decoder that sees the class map, which decides a part of the image.
    """
    if not count or module.autoencoder.decoder_map_channels is not None:
        return None
    step = max(1, len(dataset) // count)
    positions = list(range(0, len(dataset), step))[:count]
    shares = surviving_shares(returned(module, dataset, positions, tile=tile, precision=precision)).tolist()
    text = ", ".join(f"{share:.2f}" for share in shares)
    log.info("of the latents' variance survives decoding and encoding, by channel: %s", text)
    for channel, share in enumerate(shares):
        if share < MOSTLY_NOISE:
            log.warning(
                "channel %d of the latents: %.2f of its variance survives; the rest is noise to stage two",
                channel,
                share,
            )
    return {"num_images": len(positions), "surviving_variance": [round(share, 6) for share in shares]}
