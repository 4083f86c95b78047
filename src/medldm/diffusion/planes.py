"""Makes planes of edges and a class map, and brings them from the image grid to where the network
reads them.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from medldm.batch import Batch, check_labels, class_planes, spatial_shape
from medldm.diffusion.condition import require
from medldm.diffusion.embeddings import keep
from medldm.diffusion.latent import latent_shape

PARITY_ENCODER = "nearest_1x1"


@dataclass(frozen=True)
class PlaneOptions:
    """Which planes enter, and how they reach the network.

    `encoder` brings them to the latent grid, to be concatenated to z_t. `spade` gives the SPADE norms their
    map: "planes" are the planes themselves, "map_latent" the latents of an autoencoder of maps, and an
    encoder's name `spade_out_channels` channels that it learns on the latent grid. None switches either off.
    `parity` permits the encoder of the published code, which loses most edges.
    """

    use_edges: bool = True
    use_mask: bool = True
    encoder: str | None = "strided_cnn"
    out_channels: int = 8
    spade: str | None = None
    spade_out_channels: int = 64
    parity: bool = False

    def check(self, num_planes: int, map_latent_channels: int) -> None:
        """ValueError where the options contradict each other or do not fit the number of planes."""
        uses_parity = PARITY_ENCODER in (self.encoder, self.spade)
        if self.use_edges and uses_parity and not self.parity:
            raise ValueError(
                f"{PARITY_ENCODER} loses nine edge cells in ten; "
                "choose strided_cnn, unshuffle or rescaler, or set parity=true"
            )
        if self.parity and not uses_parity:
            raise ValueError(f"parity=true has an effect with {PARITY_ENCODER} alone; set it to false")
        if not num_planes and (self.encoder or self.spade):
            raise ValueError("neither edges nor mask are used; set encoder=null and spade=null")
        if (self.spade == "map_latent") != bool(map_latent_channels):
            raise ValueError(
                f"spade={self.spade}: spade=map_latent and a map_stage belong together; give both or neither"
            )


@dataclass(frozen=True)
class ConditionPlanes:
    """Edges and a one-hot class map as planes on the image grid: [edges, classes], as many as are used."""

    use_edges: bool
    num_classes: int  # 0 where the class map is not used
    downsampling: tuple[int, ...]

    @property
    def num_planes(self) -> int:
        return int(self.use_edges) + self.num_classes

    def __call__(
        self, batch: Batch, dropped: Mapping[str, Tensor], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """(B, num_planes, *S) in {0, 1}. Planes of samples that `dropped` marks (for each group (B,) bool)
        are zero everywhere, which a one-hot map never is.
        """
        reference = require(batch, "edges" if self.use_edges else "mask")
        latent_shape(spatial_shape(reference), self.downsampling)  # raises where the grid does not divide
        planes = []
        if self.use_edges:
            planes.append(keep(require(batch, "edges").to(dtype), dropped.get("edges")))
        if self.num_classes:
            mask = require(batch, "mask").long()
            check_labels(mask, self.num_classes)
            planes.append(class_planes(mask, self.num_classes, dtype, dropped.get("mask")))
        return planes[0] if len(planes) == 1 else torch.cat(planes, dim=1)
