"""Makes the condition of a denoiser from a batch, and drops parts of it in training, as guidance needs."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from medldm.attributes import Attribute, KnownAttributes
from medldm.batch import Batch
from medldm.devices import compute_dtype
from medldm.diffusion.condition import Condition, fixed_drop, require
from medldm.diffusion.embeddings import embed_by_name, keep, scalar_mlp, unknown_values
from medldm.diffusion.encoders import build_encoder
from medldm.diffusion.planes import ConditionPlanes, PlaneOptions
from medldm.networks.compiling import Function

# attributes that have an argument `use_<name>` of their own
OLDER_USES = ("view", "phase", "label", "slice_position")


class SpatialConditioner(nn.Module):
    """Edges and a class map as planes (`PlaneOptions`), and attributes of the image as embeddings.

    Attributes are those that the data declare in index.json: view, phase, label and slice_position, chosen by
    `use_<name>`, and any other (age, sex, vendor, field strength) by `attributes`, a mapping of names to true
    (which the data must have), "auto" (embedded where they have it) or false. Their embeddings are summed to
    `embedding_dim` and added to the embedding of time.

    Groups that drop: "edges", "mask", "attributes". Each sample loses edges with `drop_edges_prob`, the mask
    with `drop_mask_prob`, independently, and everything with `drop_all_prob`. A dropped plane is all zeros; a
    dropped attribute contributes its learned null, or, for the slice position, nothing. An unknown attribute
    (-1, and NaN of a number) counts as dropped. Several labels of an image (`labels`) enter as the sum of
    their embeddings.

    The builder of a model, and no config, gives the arguments that the data decide (`num_classes`,
    `downsampling`, `known`) and those that the networks decide (`embedding_dim`, `map_latent_channels`).
    """

    def __init__(
        self,
        num_classes: int | None,
        *,
        downsampling: tuple[int, ...],
        spatial_dims: int | None = None,
        map_latent_channels: int = 0,
        known: KnownAttributes | None = None,
        embedding_dim: int = 0,
        attributes: Mapping[str, bool | str] | None = None,
        drop_edges_prob: float = 0.0,
        drop_mask_prob: float = 0.0,
        drop_all_prob: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__()
        downsampling = tuple(int(factor) for factor in downsampling)
        if spatial_dims not in (None, len(downsampling)):
            raise ValueError(
                f"downsampling={downsampling} does not have one factor for each of {spatial_dims} axes"
            )
        uses = {name: options.pop(f"use_{name}", False) for name in OLDER_USES} | dict(attributes or {})
        self.build_planes(plane_options(options), num_classes, downsampling, map_latent_channels)
        self.build_embeddings(uses, known or KnownAttributes(), embedding_dim)
        self.context_dim = 0
        probs = {"edges": drop_edges_prob, "mask": drop_mask_prob, "attributes": 0.0}
        used = {"edges": self.use_edges, "mask": self.use_mask, "attributes": bool(self.embedding_dim)}
        self.groups = tuple(name for name, is_used in used.items() if is_used)
        check_probs({**probs, "all": drop_all_prob}, self.groups)
        self.drop_probs = tuple(probs[name] for name in self.groups)
        self.drop_all_prob = drop_all_prob
        self.choose = Function(self._chosen)

    def build_planes(
        self, options: PlaneOptions, num_classes: int | None, downsampling: tuple[int, ...], map_channels: int
    ) -> None:
        """Makes the planes of edges and map, and the encoder that brings them to the latent grid."""
        if options.use_mask and not num_classes:
            raise ValueError("use_mask=true but the dataset has no masks; set it to false")
        self.use_edges, self.use_mask = options.use_edges, options.use_mask
        self.planes = ConditionPlanes(options.use_edges, num_classes if options.use_mask else 0, downsampling)
        num_planes = self.planes.num_planes
        options.check(num_planes, map_channels)
        self.encoder = build_encoder(options.encoder, num_planes, options.out_channels, downsampling)
        self.concat_channels = self.encoder.out_channels if self.encoder else 0
        self.spade = options.spade
        learned = None if options.spade in ("planes", "map_latent") else options.spade
        self.spade_encoder = build_encoder(learned, num_planes, options.spade_out_channels, downsampling)
        fixed = {"planes": num_planes, "map_latent": map_channels, None: 0}
        self.spade_channels = self.spade_encoder.out_channels if self.spade_encoder else fixed[options.spade]

    def build_embeddings(
        self, uses: Mapping[str, bool | str], known: KnownAttributes, embedding_dim: int
    ) -> None:
        """One module for each attribute that is used. That of the slice position has no null, as in earlier
        checkpoints.
        """
        chosen = chosen_attributes(uses, known.declared)
        use_position = bool(uses["slice_position"])
        if (chosen or use_position) and embedding_dim < 1:
            raise ValueError(
                f"embedding_dim={embedding_dim}: embeddings of attributes need the size of the time embedding"
            )
        self.embedding_dim = embedding_dim if chosen or use_position else 0
        older = {name: attribute for name, attribute in chosen.items() if name in OLDER_USES}
        further = {name: attribute for name, attribute in chosen.items() if name not in OLDER_USES}
        self.embeddings = nn.ModuleDict(embed_by_name(older, embedding_dim))
        self.position = scalar_mlp(embedding_dim) if use_position else None
        self.embeddings.update(embed_by_name(further, embedding_dim))
        self.needs_position, self.lone_position = uses["slice_position"] is True, known.lone_position
        self.unknown_attributes = tuple(known.unstated)

    @property
    def attributes(self) -> tuple[str, ...]:
        """The names of the attributes that are embedded."""
        return (*self.embeddings, *(("slice_position",) if self.position is not None else ()))

    @property
    def null_attributes(self) -> tuple[str, ...]:
        """Those of `attributes` whose null training has seen; values of the others must be known."""
        seen = self.attributes if self.drop_all_prob > 0 else self.unknown_attributes
        seen = (*seen, *(("slice_position",) if self.lone_position is not None else ()))
        return tuple(name for name in self.attributes if name in seen)

    @property
    def dropped_groups(self) -> tuple[str, ...]:
        """The groups that training drops now and then; unknown attributes count as dropped."""
        has_null = self.attributes == self.null_attributes
        pairs = zip(self.groups, self.drop_probs, strict=True)
        return tuple(
            name for name, prob in pairs if prob or self.drop_all_prob or (name == "attributes" and has_null)
        )

    @property
    def trains_null(self) -> bool:
        """Whether training can drop all groups of a sample at once, together or each by its own chance."""
        return bool(self.groups) and self.dropped_groups == self.groups

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """The arrays of a batch that the condition is made from."""
        used = {"mask": self.use_mask, "edges": self.use_edges}
        return tuple(key for key, is_used in used.items() if is_used)

    @property
    def halo(self) -> int | None:
        """The number of cells of the latent grid around a window that its condition depends on; None where it
        depends on the whole volume.
        """
        encoders = [encoder for encoder in (self.encoder, self.spade_encoder) if encoder is not None]
        halos = [getattr(encoder, "halo", None) for encoder in encoders]
        sees_all = None in halos or self.spade == "map_latent"
        return None if sees_all else max(halos, default=0)

    def sample_drop(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Tensor:
        """(B, len(groups)) bool, drawn at random: the groups that each sample of a training batch loses."""
        return self.choose(torch.rand(batch_size, len(self.groups) + 1, generator=generator, device=device))

    def _chosen(self, u: Tensor) -> Tensor:
        """The groups that are dropped where uniform numbers (B, len(groups) + 1) fall below their chances."""
        columns = [u[:, i] < prob for i, prob in enumerate((*self.drop_probs, self.drop_all_prob))]
        return (
            torch.stack([column | columns[-1] for column in columns[:-1]], dim=1)
            if self.groups
            else u[:, :0] < 0
        )

    def drop_groups(
        self, batch_size: int, names: tuple[str, ...] | None = None, device: torch.device | None = None
    ) -> Tensor:
        """(B, len(groups)) bool that drops `names` for every sample. None drops all, which is the null of
        guidance.
        """
        return fixed_drop(self.groups, batch_size, names, device)

    def forward(
        self, batch: Batch, first_stage: nn.Module | None = None, drop: Tensor | None = None
    ) -> Condition:
        """The condition of a batch; `drop` is (B, len(groups)), or (B,) to drop whole samples."""
        dropped = {}
        if drop is not None:
            drop = drop[:, None].expand(-1, len(self.groups)) if drop.ndim == 1 else drop
            dropped = dict(zip(self.groups, drop.unbind(1), strict=True))
        needs_planes = self.encoder or self.spade not in (None, "map_latent")
        planes = self.planes(batch, dropped, self.planes_dtype(batch)) if needs_planes else None
        return Condition(
            concat=self.encoder(planes) if self.encoder else None,
            embedding=self.embed(batch, dropped.get("attributes")) if self.embedding_dim else None,
            spade=self.spade_map(batch, planes, dropped.get("mask")),
        )

    def planes_dtype(self, batch: Batch) -> torch.dtype:
        """The data type of the convolutions that see the planes, since 0 and 1 are exact in all of them;
        float32 where an encoder takes averages first.
        """
        averages = any(getattr(e, "averages", False) for e in (self.encoder, self.spade_encoder))
        device = require(batch, "edges" if self.use_edges else "mask").device
        return torch.float32 if averages else compute_dtype(device)

    def spade_map(self, batch: Batch, planes: Tensor | None, drop: Tensor | None) -> Tensor | None:
        if self.spade == "map_latent":
            return keep(batch["map_latent"], drop)
        return self.spade_encoder(planes) if self.spade_encoder else planes if self.spade else None

    def embed(self, batch: Batch, drop: Tensor | None) -> Tensor | None:
        """(B, embedding_dim) to be added to the time embedding; None where there is nothing to embed."""
        terms = []
        for name, embedding in self.embeddings.items():
            if name == "label" and "labels" in batch:
                terms.append(embedding.several(batch["labels"], drop))
            elif name in batch or name not in self.null_attributes or name in OLDER_USES:
                terms.append(embedding(require(batch, name), drop))
            else:  # the data do not have this attribute
                terms.append(embedding(unknown_values(embedding, batch), drop))
        if self.position is not None and (self.needs_position or "slice_position" in batch):
            position = require(batch, "slice_position").float()
            if self.lone_position is not None:
                position = position.nan_to_num(self.lone_position)
            unknown = position.isnan() if drop is None else position.isnan() | drop
            terms.append(keep(self.position(position.nan_to_num()[:, None]), unknown))
        return sum(terms) if terms else None


def plane_options(options: Mapping[str, Any]) -> PlaneOptions:
    """PlaneOptions of plain values. ValueError for an option that does not exist."""
    names = {option.name for option in fields(PlaneOptions)}
    unknown = sorted(options.keys() - names)
    if unknown:
        keys = (*sorted(names), *(f"use_{name}" for name in OLDER_USES), "attributes")
        name = unknown[0]
        raise ValueError(f"{name}={options[name]}: there is no such option, but {', '.join(keys)}")
    return PlaneOptions(**options)


def chosen_attributes(
    uses: Mapping[str, bool | str], declared: Mapping[str, Attribute]
) -> dict[str, Attribute]:
    """The attributes that are embedded by a table or a network of their own, in the order of `uses`.
    ValueError for an invalid choice, and for an attribute that is asked for but not declared by the data.
    """
    for name, use in uses.items():
        key = f"use_{name}" if name in OLDER_USES else f"attributes.{name}"
        if use not in (True, False, "auto"):
            raise ValueError(f"{key}={use} is none of true, false, auto")
        if use is True and name not in declared and name != "slice_position":
            there = ", ".join(sorted(declared)) or "none"
            raise ValueError(
                f"{key}=true but the dataset has no {name} (it declares {there}); set it to false"
            )
    chosen = (name for name, use in uses.items() if use and name in declared and name != "slice_position")
    return {name: declared[name] for name in chosen}


def check_probs(probs: Mapping[str, float], groups: tuple[str, ...]) -> None:
    """ValueError for a probability outside of [0, 1], and for one of a condition that is not used."""
    for key, prob in probs.items():
        if not 0 <= prob <= 1:
            raise ValueError(f"drop_{key}_prob={prob} must lie in [0, 1]")
        if prob and key != "all" and key not in groups:
            raise ValueError(f"drop_{key}_prob={prob} but use_{key}=false; set it to 0")


class NullConditioner(nn.Module):
    """A conditioner without a condition. It takes the arguments of the others and does not use them."""

    groups: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()
    null_attributes: tuple[str, ...] = ()
    dropped_groups: tuple[str, ...] = ()
    trains_null = False
    concat_channels = spade_channels = embedding_dim = context_dim = 0

    def __init__(self, num_classes: int | None = None, **derived) -> None:
        super().__init__()

    batch_keys = ()

    def sample_drop(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Tensor:
        """(B, 0): there is nothing to drop."""
        return fixed_drop((), batch_size, None, device)

    def drop_groups(
        self, batch_size: int, names: tuple[str, ...] | None = None, device: torch.device | None = None
    ) -> Tensor:
        """(B, 0): there is nothing to drop."""
        return fixed_drop((), batch_size, names, device)

    def forward(
        self, batch: Batch, first_stage: nn.Module | None = None, drop: Tensor | None = None
    ) -> Condition:
        return Condition()
