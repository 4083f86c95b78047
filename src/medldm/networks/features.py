"""Feature networks for distribution metrics and LPIPS: built lazily, never downloaded, each under its name.

Only Inception with the weights everyone uses gives a number called FID; every other network gives
`frechet_<name>`. A new network is one entry in `FEATURE_NETS`.
"""

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.errors import InputError
from medldm.networks.medicalnet import MedicalNet, load_medicalnet


class WeightsFile(NamedTuple):
    """A file that cannot be shipped: accepted names, the start of its sha256, and where people get it."""

    names: tuple[str, ...]
    sha256: str
    source: str


INCEPTION_WEIGHTS = WeightsFile(
    ("pt_inception-2015-12-05-6726825d.pth", "weights-inception-2015-12-05-6726825d.pth"),
    "6726825d",
    "pytorch-fid release 'fid_weights' or torch-fidelity release 'v0.2.0'",
)
LPIPS_WEIGHTS = {
    "vgg": WeightsFile(("vgg16-397923af.pth",), "397923af", "torchvision VGG16_Weights.DEFAULT"),
    "alex": WeightsFile(("alexnet-owt-7be5be79.pth",), "7be5be79", "torchvision AlexNet_Weights.DEFAULT"),
}
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


def search_dirs(weights_dir: Path | str | None) -> list[Path]:
    """`weights_dir` first, then torch's own cache folder."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [Path(weights_dir), hub] if weights_dir else [hub]


def find_weights(weights: WeightsFile, weights_dir: Path | str | None) -> Path:
    """Path of the file, its hash checked; one InputError line says which file to put where."""
    folders = search_dirs(weights_dir)
    found = [folder / name for folder in folders for name in weights.names if (folder / name).is_file()]
    if not found:
        raise InputError(
            f"{weights.names[0]}: not found; put it in {' or '.join(map(str, folders))} ({weights.source}), "
            "or set paths.weights=FOLDER"
        )
    if not file_sha256(found[0]).startswith(weights.sha256):
        raise InputError(f"{found[0]}: its sha256 does not start with {weights.sha256}; fetch it again")
    return found[0]


def build_medicalnet(depth: int, weights_dir: Path | str | None = None) -> MedicalNet:
    """MedicalNet's ResNet-10 or -50, frozen, from a local file; `sha256` is the file's.

    It takes (B, 1, D, H, W) of `medicalnet.standardised` volumes and returns feature maps.
    """
    path = find_weights(MEDICALNET_WEIGHTS[depth], weights_dir)
    network = load_medicalnet(depth, path)
    network.sha256 = file_sha256(path)
    return network


def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_sha256(module: nn.Module) -> str:
    """Hash of all parameters and buffers, in name order."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def to_rgb(x: Tensor) -> Tensor:
    """(B, 1 or 3, H, W) -> (B, 3, H, W): grey is repeated."""
    if x.shape[1] not in (1, 3):
        raise InputError(f"feature network: {x.shape[1]} image channels; it takes grey or RGB")
    return x.expand(-1, 3, -1, -1)


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> 0..255, rounded to the nearest (not truncated), clamped first."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


class InceptionFeatures(nn.Module):
    """Inception-v3 of the TensorFlow port that defines FID; (B, 1|3, H, W) in [-1, 1] -> (B, sum of `sizes`).

    `sizes`: which of INCEPTION_LAYERS, side by side in this order; 2048 is what FID means.
    """

    def __init__(self, weights_path: Path, sizes: Sequence[int] = (2048,)) -> None:
        super().__init__()
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        layers = [str(size) for size in sizes]
        self.network = FeatureExtractorInceptionV3(
            "inception-v3-compat", layers, feature_extractor_weights_path=str(weights_path)
        )
        self.num_features, self.sha256 = sum(sizes), file_sha256(weights_path)

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


class FeatureNet(NamedTuple):
    """An entry; `build(weights_dir, spatial_dims, image_channels)` gives `num_features` and `sha256` too."""

    frechet_name: str
    kernel_name: str
    spatial_dims: tuple[int, ...]
    description: str
    build: Callable[..., nn.Module]


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
            raise InputError(f"medicalnet: {x.shape[1]} image channels; it takes one")
        return self.network((x.float().clamp(-1, 1) + 1) / 2).flatten(2).mean(2)


def build_medicalnet_features(
    weights_dir: Path | str | None, spatial_dims: int, image_channels: int
) -> nn.Module:
    return MedicalNetFeatures(build_medicalnet(50, weights_dir))


def inception_entry(size: int) -> FeatureNet:
    suffix = "" if size == 2048 else f"_{size}"
    return FeatureNet(
        f"fid{suffix}",
        f"kid{suffix}",
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
        (3,),
        "MedicalNet ResNet-50, global average of the last maps, 2048-d; input in [0, 1] on the prepared grid",
        build_medicalnet_features,
    ),
    "random_conv": FeatureNet(
        "frechet_random_conv",
        "kernel_random_conv",
        (2, 3),
        "three fixed-seed random 3x3 stride-2 conv layers, mean and standard deviation of each map, 224-d; "
        "not FID, comparable only on one data set",
        build_random_conv,
    ),
}
# Every set of features that has a name: one pass of Inception gives one for each of `metrics.fid_features`.
FEATURE_SETS = FEATURE_NETS | {
    f"inception_{size}": inception_entry(size) for size in INCEPTION_LAYERS if size != 2048
}


def feature_sets(name: str, fid_features: Sequence[int]) -> list[str]:
    """The names in FEATURE_SETS of what one pass of this network gives, side by side."""
    if name != "inception":
        return [name]
    return [name if size == 2048 else f"{name}_{size}" for size in fid_features]


def check_fid_features(sizes: Sequence[int], networks: Sequence[str]) -> tuple[int, ...]:
    """InputError where a width is none of Inception's, stands twice, or no Inception is there to use it."""
    known = ", ".join(map(str, INCEPTION_LAYERS))
    is_list = isinstance(sizes, Sequence) and not isinstance(sizes, str) and len(sizes) > 0
    if not is_list or any(type(size) is not int or size not in INCEPTION_LAYERS for size in sizes):
        raise InputError(f"metrics.fid_features={sizes}: give a list of {known}, for instance [64,2048]")
    if len(set(sizes)) < len(sizes):
        raise InputError(f"metrics.fid_features={sizes}: name each once")
    if tuple(sizes) != (2048,) and "inception" not in networks:
        raise InputError(
            f"metrics.fid_features={sizes}: only Inception has these; add it by metrics.features=[inception]"
        )
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
        raise InputError(f"metrics.features: no network {name!r}; choose from {', '.join(FEATURE_NETS)}")
    if spatial_dims not in FEATURE_NETS[name].spatial_dims:
        dims = " or ".join(f"{d}D" for d in FEATURE_NETS[name].spatial_dims)
        raise InputError(f"metrics.features: {name} takes {dims} images, these are {spatial_dims}D")
    network = FEATURE_NETS[name].build(weights_dir, spatial_dims, image_channels, **options)
    return network.eval().requires_grad_(False)


def torchvision_state(path: Path) -> dict[str, Tensor]:
    """`features.*` of a torchvision checkpoint, its index as key: '0.weight', ..."""
    state = torch.load(path, map_location="cpu", weights_only=True)
    return {
        key.removeprefix("features."): value for key, value in state.items() if key.startswith("features.")
    }


class LPIPS(nn.Module):
    """LPIPS (Zhang et al. 2018): (B, 1|3, H, W) in [-1, 1] twice -> (B,).

    The backbone comes from a local file, the linear heads from torchmetrics.
    """

    def __init__(self, net: str, *, weights_dir: Path | str | None = None) -> None:
        super().__init__()
        if net not in LPIPS_WEIGHTS:
            raise InputError(f"lpips: no network {net!r}; choose from {', '.join(LPIPS_WEIGHTS)}")
        path = find_weights(LPIPS_WEIGHTS[net], weights_dir)
        from torchmetrics.functional.image.lpips import _LPIPS

        self.network = _LPIPS(net=net, pnet_rand=True, eval_mode=True)
        self.load_backbone(torchvision_state(path))
        self.requires_grad_(False)
        self.sha256 = file_sha256(path)

    def load_backbone(self, state: dict[str, Tensor]) -> None:
        """Copy torchvision's convolutions into the slices of the backbone, which keep torchvision's index."""
        for slice_name, part in self.network.net.named_children():
            keys = {key: state.get(key) for key in part.state_dict()}
            if None in keys.values():
                raise InputError(f"lpips: the weights file has no tensors for {slice_name}; fetch it again")
            part.load_state_dict(keys)

    def train(self, mode: bool = True) -> "LPIPS":
        """Always in eval mode: the heads hold dropout."""
        return super().train(False)

    def forward(self, generated: Tensor, reference: Tensor) -> Tensor:
        images = (to_rgb(x.float().clamp(-1, 1)) for x in (generated, reference))
        return self.network(*images).flatten()
