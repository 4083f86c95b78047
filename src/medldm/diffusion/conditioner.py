"""From a batch to what the denoiser is conditioned on, with the dropping that guidance needs."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.batch import Batch, check_labels, expand_as, spatial_shape
from medldm.diffusion.latent import latent_shape
from medldm.diffusion.schedule import at_least_float32
from medldm.errors import InputError
from medldm.networks.layers import conv, group_norm


class Condition(NamedTuple):
    """What a denoiser may use besides z_t and t."""

    concat: Tensor | None = None  # (B, Cc, *s), concatenated to z_t
    embedding: Tensor | None = None  # (B, E), added to the time embedding
    spade: Tensor | None = None  # (B, Cs, *any), read by SPADE norms
    context: Tensor | None = None  # (B, L, Dc), for cross-attention


def in_float32(condition: Condition) -> Condition:
    """Fit for a network in any precision: autocast rounds float32, and full precision does not take bf16."""
    return Condition(*(None if x is None else at_least_float32(x) for x in condition))


def concatenate(first: Condition, second: Condition) -> Condition:
    """Both along the batch axis, as one condition of 2B; the two have the same fields."""
    pairs = zip(first, second, strict=True)
    return Condition(*(None if a is None else torch.cat([a, b]) for a, b in pairs))


class Conditioner(Protocol):
    """What the U-Net is built from (the four sizes) and called with.

    `groups` names what can be dropped separately. `drop` is (B, len(groups)) bool, True where a sample loses
    that group, or None to keep all. The null of guidance is `drop` all True: the very thing that training
    dropped to, where `trains_null`. `dropped_groups` are those that training drops at all.
    """

    groups: tuple[str, ...]
    attributes: tuple[str, ...]  # embedded ones, and those of them that may be unknown
    null_attributes: tuple[str, ...]
    dropped_groups: tuple[str, ...]
    trains_null: bool
    concat_channels: int
    spade_channels: int
    embedding_dim: int
    context_dim: int

    def sample_drop(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Tensor: ...

    def drop_groups(
        self, batch_size: int, names: tuple[str, ...] | None = None, device: torch.device | None = None
    ) -> Tensor: ...

    def __call__(
        self, batch: Batch, first_stage: nn.Module | None = None, drop: Tensor | None = None
    ) -> Condition: ...


class NearestEncoder(nn.Module):
    """Nearest down-sampling, then a 1x1 convolution: keeps one pixel of f^d. For parity only."""

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.downsampling = downsampling
        self.project = conv(len(downsampling), in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, planes: Tensor) -> Tensor:
        return self.project(
            F.interpolate(planes, latent_shape(spatial_shape(planes), self.downsampling), mode="nearest")
        )


class Rescaler(nn.Module):
    """CompVis's SpatialRescaler: linear interpolation by 0.5 per factor of two, then a 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.strides = stage_strides(downsampling)
        self.mode = {2: "bilinear", 3: "trilinear"}[len(downsampling)]
        self.project = conv(len(downsampling), in_channels, out_channels, kernel_size=1, bias=False)

    def forward(self, planes: Tensor) -> Tensor:
        for strides in self.strides:
            planes = F.interpolate(
                planes, latent_shape(spatial_shape(planes), strides), mode=self.mode, align_corners=False
            )
        return self.project(planes)


class Unshuffle(nn.Module):
    """Every pixel of a latent cell becomes a channel, then a 1x1 convolution. Shi et al. 2016."""

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.downsampling = downsampling
        cell = math.prod(downsampling)
        self.project = conv(len(downsampling), in_channels * cell, out_channels, kernel_size=1)

    def forward(self, planes: Tensor) -> Tensor:
        return self.project(unshuffle(planes, self.downsampling))


class SegConv(nn.Module):
    """Med-LSDM's encoder of the map: convolution, ReLU and maximum per factor of two, widths 64, 128, 256 ..,
    and a last convolution and ReLU.

    Convolutions see one slice of a volume (1 x 3 x 3), and every output cell stands over its own block of the
    map: the published padding shifted the depth by a slice for each convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        dims, layers, width = len(downsampling), [], in_channels
        kernel = (1,) * (dims - 2) + (3, 3)
        padding = tuple(size // 2 for size in kernel)
        pool = getattr(nn, f"MaxPool{dims}d")
        for stage, strides in enumerate(stage_strides(downsampling)):
            hidden = 64 * 2**stage
            layers += [conv(dims, width, hidden, kernel, padding=padding), nn.ReLU(), pool(strides)]
            width = hidden
        layers += [conv(dims, width, out_channels, kernel, padding=padding), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, planes: Tensor) -> Tensor:
        return self.layers(planes)


class AreaEncoder(nn.Module):
    """The share of every plane in each latent cell: nothing learned, and no class lost."""

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        self.pool = getattr(nn, f"AvgPool{len(downsampling)}d")(downsampling)

    def forward(self, planes: Tensor) -> Tensor:
        return self.pool(planes)


class StridedCNN(nn.Module):
    """Convolutions of stride 2, GroupNorm and SiLU down to the latent grid, widths 32, 64, 128, 128 ..."""

    def __init__(self, in_channels: int, out_channels: int, downsampling: tuple[int, ...]) -> None:
        super().__init__()
        dims, layers, width = len(downsampling), [], in_channels
        for stage, strides in enumerate(stage_strides(downsampling)):
            hidden = min(32 * 2**stage, 128)
            layers += [
                conv(dims, width, hidden, kernel_size=3, stride=strides, padding=1),
                group_norm(hidden, groups=8),
                nn.SiLU(),
            ]
            width = hidden
        layers.append(conv(dims, width, out_channels, kernel_size=3, padding=1))
        self.layers = nn.Sequential(*layers)

    def forward(self, planes: Tensor) -> Tensor:
        return self.layers(planes)


SPATIAL_ENCODERS = {
    "nearest_1x1": NearestEncoder,
    "rescaler": Rescaler,
    "unshuffle": Unshuffle,
    "strided_cnn": StridedCNN,
    "segconv": SegConv,
    "area": AreaEncoder,  # as many channels as planes, whatever is asked for
}


class SpatialConditioner(nn.Module):
    """Edges and a one-hot mask as planes on the image grid, and attributes of the sample as embeddings.

    Planes are [edges, one-hot classes], as many as are used. `encoder` brings them to the latent grid for
    `concat`; `spade` is "planes" for the planes themselves as the SPADE map, "map_latent" for the latents of
    a map autoencoder (`model.map_stage`), or an encoder's name for `spade_out_channels` learned ones on the
    latent grid; None switches either off. Embeddings (view, phase, label, slice position) are summed to
    `embedding_dim`.

    Groups that drop: "edges", "mask", "attributes". Each sample loses edges with `drop_edges_prob`, the mask
    with `drop_mask_prob`, independently, and everything with `drop_all_prob`. A dropped plane is all zeros,
    which no real one-hot mask is; a dropped attribute contributes its learned null (index 0) or, for the
    slice position, nothing. An unknown attribute (-1, and NaN for the slice position) counts as dropped.
    Several labels of an image (`labels`) enter as the sum of their embeddings. `use_*` "auto" embeds an
    attribute where the dataset states it.

    What a dataset decides (`num_*`, `downsampling`, `spatial_dims`, `embedding_dim`, and
    `unknown_attributes`, those that some training image does not state) is passed by the model, not by a
    config. `lone_position` is the place of a slice without a stack for models that were trained with one.
    """

    def __init__(
        self,
        num_classes: int | None,
        *,
        downsampling: tuple[int, ...],
        spatial_dims: int | None = None,
        encoder: str | None = "strided_cnn",
        out_channels: int = 8,
        spade: str | None = None,
        spade_out_channels: int = 64,
        use_edges: bool = True,
        use_mask: bool = True,
        drop_edges_prob: float = 0.0,
        drop_mask_prob: float = 0.0,
        drop_all_prob: float = 0.0,
        use_view: bool | str = False,
        use_phase: bool | str = False,
        use_label: bool | str = False,
        use_slice_position: bool | str = False,
        num_views: int = 0,
        num_phases: int = 0,
        num_labels: int = 0,
        map_latent_channels: int = 0,
        embedding_dim: int = 0,
        unknown_attributes: Sequence[str] = (),
        lone_position: float | None = None,
        parity: bool = False,
    ) -> None:
        super().__init__()
        downsampling = tuple(int(factor) for factor in downsampling)
        if spatial_dims not in (None, len(downsampling)):
            raise ValueError(
                f"downsampling={downsampling} does not have one factor for each of {spatial_dims} axes"
            )
        if use_mask and not num_classes:
            raise InputError("model.conditioner.use_mask=true but the dataset has no masks; set it to false")
        if use_edges and "nearest_1x1" in (encoder, spade) and not parity:
            raise InputError(
                "model.conditioner: nearest_1x1 loses nine edge cells in ten; "
                "choose strided_cnn, unshuffle or rescaler, or set model.conditioner.parity=true"
            )
        if parity and "nearest_1x1" not in (encoder, spade):
            raise InputError(
                "model.conditioner.parity=true has an effect with nearest_1x1 alone; set it to false"
            )
        self.downsampling = downsampling
        self.num_classes = num_classes if use_mask else 0
        self.use_edges, self.use_mask = use_edges, use_mask
        self.context_dim = 0

        num_planes = int(use_edges) + self.num_classes
        if not num_planes and (encoder or spade):
            raise InputError(
                "model.conditioner: neither edges nor mask are used; set encoder=null and spade=null"
            )
        self.encoder = build_encoder(encoder, num_planes, out_channels, downsampling)
        self.concat_channels = encoded_channels(encoder, num_planes, out_channels)
        if (spade == "map_latent") != bool(map_latent_channels):
            raise InputError(
                "model.conditioner.spade=map_latent and model.map_stage belong together: give both or neither"
            )
        self.spade = spade
        learned = None if spade in ("planes", "map_latent") else spade
        self.spade_encoder = build_encoder(learned, num_planes, spade_out_channels, downsampling)
        fixed = {"planes": num_planes, "map_latent": map_latent_channels}
        self.spade_channels = fixed.get(spade, encoded_channels(spade, num_planes, spade_out_channels))

        counts = {"view": num_views, "phase": num_phases, "label": num_labels}
        uses = {
            "view": use_view,
            "phase": use_phase,
            "label": use_label,
            "slice_position": use_slice_position,
        }
        for name, use in uses.items():
            if use not in (True, False, "auto"):
                raise InputError(f"model.conditioner.use_{name}={use} is none of true, false, auto")
            if use is True and counts.get(name) == 0:
                raise InputError(
                    f"model.conditioner.use_{name}=true but the dataset has no {name}; set it to false"
                )
        counts = {name: count for name, count in counts.items() if count and uses[name]}
        uses_attributes = bool(counts) or bool(use_slice_position)
        if uses_attributes and embedding_dim < 1:
            raise ValueError(
                f"embedding_dim={embedding_dim}: embeddings of attributes need the size of the time embedding"
            )
        self.embedding_dim = embedding_dim if uses_attributes else 0
        self.embeddings = nn.ModuleDict(
            {name: nn.Embedding(count + 1, embedding_dim) for name, count in counts.items()}
        )
        self.position = scalar_mlp(embedding_dim) if use_slice_position else None
        self.needs_position, self.lone_position = use_slice_position is True, lone_position
        self.unknown_attributes = tuple(unknown_attributes)

        used = {"edges": use_edges, "mask": use_mask, "attributes": uses_attributes}
        self.groups = tuple(name for name, is_used in used.items() if is_used)
        probs = {"edges": drop_edges_prob, "mask": drop_mask_prob, "attributes": 0.0}
        for key, prob in {**probs, "all": drop_all_prob}.items():
            if not 0 <= prob <= 1:
                raise InputError(f"model.conditioner.drop_{key}_prob={prob} must lie in [0, 1]")
            if prob and key != "all" and key not in self.groups:
                raise InputError(f"model.conditioner.drop_{key}_prob={prob} but use_{key}=false; set it to 0")
        self.drop_probs = tuple(probs[name] for name in self.groups)
        self.drop_all_prob = drop_all_prob

    @property
    def attributes(self) -> tuple[str, ...]:
        """What is embedded of view, phase, label and slice_position."""
        return (*self.embeddings, *(("slice_position",) if self.position is not None else ()))

    @property
    def null_attributes(self) -> tuple[str, ...]:
        """Those of `attributes` whose null training has seen: only these may be unknown."""
        seen = self.attributes if self.drop_all_prob > 0 else self.unknown_attributes
        seen = (*seen, *(("slice_position",) if self.lone_position is not None else ()))
        return tuple(name for name in self.attributes if name in seen)

    @property
    def dropped_groups(self) -> tuple[str, ...]:
        """Groups that training drops, each at some time: attributes also by being unknown."""
        has_null = self.attributes == self.null_attributes
        pairs = zip(self.groups, self.drop_probs, strict=True)
        return tuple(
            name for name, prob in pairs if prob or self.drop_all_prob or (name == "attributes" and has_null)
        )

    @property
    def trains_null(self) -> bool:
        """Whether training ever drops all groups of a sample at once: together, or each by itself."""
        return bool(self.groups) and self.dropped_groups == self.groups

    @property
    def batch_keys(self) -> tuple[str, ...]:
        """Arrays of a batch that conditions are made of."""
        used = {"mask": self.use_mask, "edges": self.use_edges}
        return tuple(key for key, is_used in used.items() if is_used)

    def sample_drop(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Tensor:
        """(B, len(groups)) bool: what each sample of a training batch loses."""
        u = torch.rand(batch_size, len(self.groups) + 1, generator=generator, device=device)
        columns = [u[:, i] < prob for i, prob in enumerate((*self.drop_probs, self.drop_all_prob))]
        return (
            torch.stack([column | columns[-1] for column in columns[:-1]], dim=1)
            if self.groups
            else u[:, :0] < 0
        )

    def drop_groups(
        self, batch_size: int, names: tuple[str, ...] | None = None, device: torch.device | None = None
    ) -> Tensor:
        """(B, len(groups)) bool that drops `names` for every sample; None drops all: the null of guidance."""
        return fixed_drop(self.groups, batch_size, names, device)

    def forward(
        self, batch: Batch, first_stage: nn.Module | None = None, drop: Tensor | None = None
    ) -> Condition:
        """Condition of a batch; `drop` is (B, len(groups)), or (B,) to drop whole samples."""
        dropped = {}
        if drop is not None:
            drop = drop[:, None].expand(-1, len(self.groups)) if drop.ndim == 1 else drop
            dropped = dict(zip(self.groups, drop.unbind(1), strict=True))
        needs_planes = self.encoder or self.spade not in (None, "map_latent")
        planes = self.planes(batch, dropped) if needs_planes else None
        return Condition(
            concat=self.encoder(planes) if self.encoder else None,
            embedding=self.embed(batch, dropped.get("attributes")) if self.embedding_dim else None,
            spade=self.spade_map(batch, planes, dropped.get("mask")),
        )

    def spade_map(self, batch: Batch, planes: Tensor | None, drop: Tensor | None) -> Tensor | None:
        if self.spade == "map_latent":
            return keep(batch["map_latent"], drop)
        return self.spade_encoder(planes) if self.spade_encoder else planes if self.spade else None

    def planes(self, batch: Batch, dropped: dict[str, Tensor]) -> Tensor:
        """(B, edges + classes, *S) float32 in {0, 1}, zero where dropped; edges, if used, are channel 0."""
        reference = require(batch, "edges" if self.use_edges else "mask")
        latent_shape(spatial_shape(reference), self.downsampling)  # raises where the grid does not divide
        first_class = int(self.use_edges)
        shape = (len(reference), first_class + self.num_classes, *spatial_shape(reference))
        planes = torch.zeros(shape, dtype=torch.float32, device=reference.device)
        if self.use_edges:
            planes[:, :1] = keep(require(batch, "edges").float(), dropped.get("edges"))
        if self.use_mask:
            mask = require(batch, "mask").long()
            check_labels(mask, self.num_classes)
            kept = keep(torch.ones_like(mask, dtype=torch.float32), dropped.get("mask"))
            planes[:, first_class:].scatter_(1, mask, kept)
        return planes

    def embed(self, batch: Batch, drop: Tensor | None) -> Tensor | None:
        """(B, embedding_dim), to be added to the time embedding; None where the batch states nothing."""
        terms = []
        for name, embedding in self.embeddings.items():
            if name == "label" and "labels" in batch:
                terms.append(embed_several(embedding.weight, batch["labels"], drop))
                continue
            index = require(batch, name).long() + 1
            terms.append(embedding(index if drop is None else index.masked_fill(drop, 0)))
        if self.position is not None and (self.needs_position or "slice_position" in batch):
            position = require(batch, "slice_position").float()
            if self.lone_position is not None:
                position = position.nan_to_num(self.lone_position)
            unknown = position.isnan() if drop is None else position.isnan() | drop
            terms.append(keep(self.position(position.nan_to_num()[:, None]), unknown))
        return sum(terms) if terms else None


class NullConditioner(nn.Module):
    """No condition at all; takes and disregards what a model passes to every conditioner."""

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
        """(B, 0)."""
        return fixed_drop((), batch_size, None, device)

    def drop_groups(
        self, batch_size: int, names: tuple[str, ...] | None = None, device: torch.device | None = None
    ) -> Tensor:
        """(B, 0)."""
        return fixed_drop((), batch_size, names, device)

    def forward(
        self, batch: Batch, first_stage: nn.Module | None = None, drop: Tensor | None = None
    ) -> Condition:
        return Condition()


def embed_several(table: Tensor, labels: Tensor, drop: Tensor | None) -> Tensor:
    """The sum of the rows of a (1 + K, E) table that (B, K) labels mark, or its null, row 0, where they mark
    none or are dropped.
    """
    unknown = labels.sum(1) == 0
    unknown = unknown if drop is None else unknown | drop
    return torch.where(unknown[:, None], table[0], labels.to(table.dtype) @ table[1:])


def fixed_drop(
    groups: tuple[str, ...], batch_size: int, names: tuple[str, ...] | None, device: torch.device | None
) -> Tensor:
    """(B, len(groups)) bool, True in the columns of `names`, or everywhere for None."""
    names = groups if names is None else tuple(names)
    unknown = [name for name in names if name not in groups]
    if unknown:
        raise InputError(
            f"drop: the model has no condition {unknown[0]}; it has {', '.join(groups) or 'none'}"
        )
    drop = torch.zeros(batch_size, len(groups), dtype=torch.bool, device=device)
    for name in names:
        drop[:, groups.index(name)] = True
    return drop


def check_drop(conditioner: Conditioner, names: tuple[str, ...]) -> None:
    """InputError for a condition that the model has not, or that training never withheld: what stands in its
    place was never learned.
    """
    conditioner.drop_groups(1, names)
    unseen = [name for name in names if name not in conditioner.dropped_groups]
    if unseen:
        raise InputError(
            f"drop=[{unseen[0]}]: training never withheld it; train with model.conditioner.drop_all_prob=0.1"
        )


def build_encoder(
    name: str | None, in_channels: int, out_channels: int, downsampling: tuple[int, ...]
) -> nn.Module | None:
    if name is None:
        return None
    if name not in SPATIAL_ENCODERS:
        raise InputError(f"model.conditioner: encoder '{name}' is none of {', '.join(SPATIAL_ENCODERS)}")
    return SPATIAL_ENCODERS[name](in_channels, out_channels, downsampling)


def encoded_channels(name: str | None, num_planes: int, out_channels: int) -> int:
    return 0 if name is None else num_planes if name == "area" else out_channels


def scalar_mlp(embedding_dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(1, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))


def require(batch: Batch, key: str) -> Tensor:
    if key not in batch:
        raise InputError(
            f"the data has no `{key}`, which the conditioner uses; give it, or choose a conditioner without "
            "it (model.conditioner.use_*)"
        )
    return batch[key]


def keep(x: Tensor, drop: Tensor | None) -> Tensor:
    """`x` with the dropped samples (B,) set to zero."""
    return x if drop is None else x.masked_fill(expand_as(drop, x), 0)


def stage_strides(downsampling: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Strides of one and two with product `downsampling`: (1, 4, 8) -> (1, 2, 2), (1, 2, 2), (1, 1, 2)."""
    exponents = [factor.bit_length() - 1 for factor in downsampling]
    if any(factor != 2**exponent for factor, exponent in zip(downsampling, exponents, strict=True)):
        raise ValueError(
            f"downsampling={downsampling} must be powers of two; choose the encoder unshuffle instead"
        )
    return [tuple(2 if stage < e else 1 for e in exponents) for stage in range(max(exponents))]


def unshuffle(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """(B, C, *S) -> (B, C prod(f), *S/f) for any number of axes and a factor for each."""
    dims = len(factors)
    cells = [
        size for pair in zip(latent_shape(spatial_shape(x), factors), factors, strict=True) for size in pair
    ]
    x = x.reshape(*x.shape[:2], *cells)  # (B, C, s1, f1, s2, f2 ..)
    grid, within = range(2, 2 + 2 * dims, 2), range(3, 3 + 2 * dims, 2)
    return x.permute(0, 1, *within, *grid).flatten(1, 1 + dims)
