"""The tools of an evaluation: functions of images, feature networks, LPIPS, a segmenter, edge recipes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.data.preparation.edges import EdgeRecipe
from medldm.devices import to_channels_last
from medldm.errors import InputError, told_of
from medldm.evaluation.pairs import Pair
from medldm.evaluation.regions import check_regions
from medldm.evaluation.slices import SliceFeatures, by_pieces, fold, slicewise
from medldm.metrics.image import ImageFunction
from medldm.networks.features import (
    FEATURE_NETS,
    FEATURE_SETS,
    FeatureNet,
    build_features,
    check_fid_features,
    feature_sets,
)
from medldm.networks.lpips import LPIPS

EMBEDDED_SIDE = 128  # pixels: enough to tell images apart, at a quarter of the work of 256
INCEPTION_SIZE = 2048  # of pool3
BY_SLICE = "_slices"  # a 2D network that sees the axial slices of volumes


class Segmenter(NamedTuple):
    """A trained segmenter: `segment` (B, C, *S) in [-1, 1] -> (B, 1, *S) class map."""

    segment: Callable[[Tensor], Tensor]
    class_names: Sequence[str]  # of the foreground


@dataclass
class Tools:
    """The metrics and their networks; `missing` says in one line why a metric cannot be computed.

    `axial_axis` is None for 2D images.
    """

    functions: Mapping[str, ImageFunction]
    recipe: EdgeRecipe
    view_names: Sequence[str] = ()
    tolerances: Sequence[int] = ()
    edges_given: bool = True  # whether images were made from edges that are known
    networks: dict[str, nn.Module] = field(default_factory=dict)
    fid_features: Sequence[int] = (2048,)  # the sets of features that a pass of Inception gives
    lpips: nn.Module | None = None
    segmenter: Segmenter | None = None
    axial_axis: int | None = None
    regions: Sequence[str] = ()
    train_thumbnails: Mapping[tuple[int, ...], Tensor] = field(default_factory=dict)
    # "perceptual" or "inception" -> shape of the images -> (N, D)
    train_embeddings: Mapping[str, Mapping[tuple[int, ...], Tensor]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def lpips_name(self) -> str:
        return "lpips" if self.axial_axis is None else "lpips" + BY_SLICE

    def embed(self, images: Tensor) -> Tensor:
        """(B, C, *S) -> (B, D) of LPIPS' features (`LPIPS.embed`) of images of at most 128 pixels a side; of
        volumes their mean over axial slices.
        """
        slices = images if self.axial_axis is None else fold(images, self.axial_axis)
        if max(slices.shape[2:]) > EMBEDDED_SIDE:
            size = [min(side, EMBEDDED_SIDE) for side in slices.shape[2:]]
            slices = F.interpolate(slices, size, mode="area")
        return by_pieces(self.lpips.embed, slices).view(len(images), -1, self.lpips.num_features).mean(1)

    @property
    def inception_key(self) -> str | None:
        """The network among those in use that gives Inception's pool3 features."""
        key = "inception" if self.axial_axis is None else "inception" + BY_SLICE
        return key if key in self.networks and INCEPTION_SIZE in self.fid_features else None

    def embed_by_inception(self, images: Tensor, features: Tensor | None = None) -> Tensor:
        """(B, C, *S) -> (B, 2048) pool3 features of length 1, of volumes the mean over their slices before;
        `features` are what the network gave of these images, where it was asked already.
        """
        found = self.networks[self.inception_key](images) if features is None else features
        sizes = list(self.fid_features)
        pool3 = found.float().split(sizes, -1)[sizes.index(INCEPTION_SIZE)]
        return F.normalize(pool3.reshape(len(images), -1, INCEPTION_SIZE).mean(1))

    def embedders(self) -> dict[str, Callable[[Tensor], Tensor]]:
        """In whose features training images are kept, to find copies in."""
        found = {} if self.lpips is None else {"perceptual": self.embed}
        return found if self.inception_key is None else found | {"inception": self.embed_by_inception}

    def feature_sizes(self, key: str) -> dict[str, int]:
        """The number of features of every set that a pass of a network gives, side by side."""
        names = sets_of(key, self.fid_features)
        sizes = self.fid_features if len(names) > 1 else [self.networks[key].num_features]
        return dict(zip(names, sizes, strict=True))

    def recipe_for(self, pair: Pair) -> EdgeRecipe:
        """The edge recipe of the view that the image shows."""
        view = pair.attributes.get("view")
        named = view is not None and int(view) < len(self.view_names)
        return self.recipe.for_view(self.view_names[int(view)] if named else None)

    def to(self, device: torch.device) -> "Tools":
        """Move the networks; those of 2D images run channels_last, where Inception takes two thirds of the
        time on a CPU (features equal to 2e-6 of the largest).
        """
        self.device = device
        for network in (*self.networks.values(), *([self.lpips] if self.lpips else [])):
            network.to(device)
            if all(x.ndim < 5 for x in network.parameters()):
                to_channels_last(network)
        return self


def build_tools(
    functions: Mapping[str, ImageFunction],
    *,
    recipe: EdgeRecipe,
    view_names: Sequence[str],
    tolerances: Sequence[int],
    networks: Sequence[str],
    lpips: str | None,
    weights_dir: Path | None,
    image_shape: tuple[int, ...],
    axial_axis: int | None = None,
    num_slices: int = 0,
    segmenter: Segmenter | None = None,
    regions: Sequence[str] = (),
    fid_features: Sequence[int] = (2048,),
    spacing: Sequence[float] | None = None,
) -> Tools:
    """Build the networks that can be built; what cannot is noted. An unknown name is an InputError.

    Volumes have an `axial_axis`: 2D networks and metrics then see axial slices, `num_slices` of each volume
    where features are taken. `spacing` is the size of their voxels in mm, where all have one.
    """
    bound = bind_slices(functions, axial_axis)
    tools = Tools(bound, recipe, view_names, tolerances, segmenter=segmenter)
    tools.axial_axis, tools.regions = axial_axis, check_regions(regions, functions)
    with told_of("metrics"):
        tools.fid_features = check_fid_features(fid_features, networks)
    channels = image_shape[0]
    for name in networks:
        if name not in FEATURE_NETS:
            raise InputError(f"metrics.features: no network {name!r}; choose from {', '.join(FEATURE_NETS)}")
        by_slice = axial_axis is not None and 3 not in FEATURE_NETS[name].spatial_dims
        key, dims = (name + BY_SLICE, 2) if by_slice else (name, len(image_shape) - 1)
        options = {"inception": {"fid_features": tools.fid_features}, "radiomics": {"spacing": spacing}}
        try:
            shape = {"spatial_dims": dims, "image_channels": channels}
            network = build_features(name, **shape, weights_dir=weights_dir, **options.get(name, {}))
        except InputError as error:
            for entry in map(entry_of, sets_of(key, tools.fid_features)):
                tools.missing |= dict.fromkeys(entry.names, str(error))
            continue
        tools.networks[key] = SliceFeatures(network, axial_axis, num_slices) if by_slice else network
    if lpips is not None:
        try:
            tools.lpips = LPIPS(lpips, weights_dir=weights_dir)
        except InputError as error:
            tools.missing[tools.lpips_name] = str(error)
    return tools


def sets_of(key: str, fid_features: Sequence[int]) -> list[str]:
    """The sets of features that a pass of a network in use gives, by key, side by side."""
    name = key.removesuffix(BY_SLICE)
    return [found + key.removeprefix(name) for found in feature_sets(name, fid_features)]


def entry_of(key: str) -> FeatureNet:
    """The entry of a set of features; the names of its distances end in `_slices` where it is of slices."""
    entry = FEATURE_SETS[key.removesuffix(BY_SLICE)]
    if not key.endswith(BY_SLICE):
        return entry
    names = {part: getattr(entry, part) + BY_SLICE for part in ("frechet_name", "kernel_name")}
    names["manifold_names"] = tuple(name + BY_SLICE for name in entry.manifold_names)
    return entry._replace(description=f"{entry.description}; of axial slices", **names)


def bind_slices(functions: Mapping[str, ImageFunction], axial_axis: int | None) -> dict[str, ImageFunction]:
    """The functions, those of slices bound to the axis of the volumes."""
    sliced = [name for name in functions if name.endswith(BY_SLICE)]
    if sliced and axial_axis is None:
        raise InputError(f"metrics.image: {sliced[0]} takes volumes, these images are 2D")
    return {
        name: slicewise(function, axial_axis) if name in sliced else function
        for name, function in functions.items()
    }
