"""Losses of the autoencoders: pixels, perceptual features, adversarial terms, feature matching."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.attributes import UNKNOWN
from medldm.batch import class_planes
from medldm.devices import full_precision
from medldm.networks.features import RandomConvFeatures, build_medicalnet
from medldm.networks.lpips import LPIPS
from medldm.networks.medicalnet import standardised
from medldm.networks.options import check_one_of
from medldm.ranks import mean_over_ranks

# of images; cross_entropy is of logits and one-hot maps, both (B, K, *S)
PIXEL_LOSSES = {"l1": F.l1_loss, "l2": F.mse_loss, "cross_entropy": F.cross_entropy}


def hinge_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """(mean relu(1 - D(x)) + mean relu(1 + D(x_hat))) / 2. Lim and Ye 2017."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Binary cross-entropy of logits. Goodfellow et al. 2014."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def lsgan_discriminator(real: Tensor, fake: Tensor) -> Tensor:
    """Squared distance of the real ones to 1 and of the fake ones to 0. Mao et al. 2017."""
    return 0.5 * ((real - 1).square().mean() + fake.square().mean())


def linear_generator(fake: Tensor) -> Tensor:
    """-mean D(x_hat), whose gradient does not vanish where the discriminator is sure. Lim and Ye 2017."""
    return -fake.mean()


def lsgan_generator(fake: Tensor) -> Tensor:
    """Squared distance of the fake ones to 1. Mao et al. 2017."""
    return (fake - 1).square().mean()


def multiclass_discriminator(real: Tensor, fake: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of K + 1 classes, of logits (B, K + 1, *s) averaged over space.

    A real sample is of its own class `label` (B,), a fake one of the last class, which is no modality's;
    ALDM's code gave the fake ones class 0, that of T1. Real samples of unknown class are left out.
    """
    num_classes = real.shape[1] - 1
    logits = (x.flatten(2).mean(2) for x in (real, fake))
    targets = (label, torch.full_like(label, num_classes))
    return 0.5 * sum(class_loss(x, y) for x, y in zip(logits, targets, strict=True))


def multiclass_generator(fake: Tensor, label: Tensor) -> Tensor:
    """Cross-entropy of the fake samples with the classes of their targets, as if they were real."""
    return class_loss(fake.flatten(2).mean(2), label)


def class_loss(logits: Tensor, label: Tensor) -> Tensor:
    """Mean cross-entropy over samples whose class is known, 0 where none is: logits (B, K), label (B,)."""
    total = F.cross_entropy(logits, label, ignore_index=UNKNOWN, reduction="sum")
    return total / (label != UNKNOWN).sum().clamp(min=1)


# name -> (loss of the discriminator, loss of the generator)
ADVERSARIAL_LOSSES = {
    "hinge": (hinge_discriminator, linear_generator),
    "vanilla": (vanilla_discriminator, linear_generator),
    "lsgan": (lsgan_discriminator, lsgan_generator),
    "multiclass": (multiclass_discriminator, multiclass_generator),  # these see the target's class
}


def feature_matching(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    """Sum over a discriminator's stages of the mean absolute difference between its features of real and fake
    images; the last entries, the logits, are left out. Wang et al. 2018, "pix2pixHD".
    """
    terms = [F.l1_loss(f, r.detach()) for r, f in zip(real[:-1], fake[:-1], strict=True)]
    return torch.stack(terms).sum()


def random_slices(x: Tensor, axis: int, index: Tensor) -> Tensor:
    """One slice of each sample: x (B, C, *S), index (B,) along the spatial `axis` -> (B, C, *S without it).
    The host does not wait for the device.
    """
    index = index.reshape(-1, *[1] * (x.ndim - 1)).expand(
        *[1 if d == axis + 2 else s for d, s in enumerate(x.shape)]
    )
    return x.gather(axis + 2, index).squeeze(axis + 2)


PERCEPTUAL_NETWORKS = ("lpips_vgg", "lpips_alex", "medicalnet_10", "medicalnet_50", "random_conv")


# The least length of an image's axes: VGG16 halves it four times, AlexNet pools three values of its seven.
SMALLEST_IMAGES = {"lpips_vgg": 16, "lpips_alex": 31}


class PerceptualLoss(nn.Module):
    """Distance between the features that a frozen network has of two images.

    network: "lpips_vgg" or "lpips_alex" for images, "medicalnet_10" or "medicalnet_50" for volumes, or
    "random_conv" for images, which needs no weights and stands in for the others in tests.
    weights_dir: the folder with the weights, None for the usual places.
    MedicalNet sees volumes brought to mean 0 and deviation 1. Its features are brought to length 1 over
    channels; their squared differences are summed over channels and averaged over space.
    The network is built at first use. It is no part of the state dict, and `train()` does not reach it: LPIPS
    has dropout, which would be switched on inside the loss.
    """

    def __init__(self, network: str = "lpips_vgg", *, weights_dir: str | None = None) -> None:
        super().__init__()
        check_one_of("network", network, PERCEPTUAL_NETWORKS)
        self.network, self.weights_dir = network, weights_dir
        self.spatial_dims = 3 if network.startswith("medicalnet") else 2
        self.smallest_size = SMALLEST_IMAGES.get(network, 1)
        self._built: list[nn.Module] = []  # a list, so that nn.Module does not register it
        self.device: torch.device | None = None  # where it is

    def build(self) -> nn.Module:
        """The frozen network. Raises InputError where its weights are not on this machine."""
        if not self._built:
            kind, _, which = self.network.partition("_")
            if kind == "lpips":
                net: nn.Module = LPIPS(which, weights_dir=self.weights_dir)
            elif kind == "medicalnet":
                net = build_medicalnet(int(which), self.weights_dir)
            else:
                net = RandomConvFeatures(2)
            self._built.append(net.eval().requires_grad_(False))
        return self._built[0]

    def forward(self, x_hat: Tensor, x: Tensor) -> Tensor:
        """Two (B, 1 or 3, *S) in [-1, 1], 2D or 3D as the network is (`spatial_dims`) -> scalar."""
        net = self.build()
        if self.device != x.device:  # once: it is not moved with the module that holds this one
            net.to(x.device)
            self.device = x.device
        if self.network == "random_conv":
            return F.mse_loss(net(x_hat), net(x))
        if self.spatial_dims == 3:
            return unit_feature_distance(net(standardised(x_hat)), net(standardised(x)))
        return net(x_hat, x).mean()


def unit_feature_distance(a: Tensor, b: Tensor) -> Tensor:
    """Two (B, C, *s) -> mean over space and batch of |a / |a| - b / |b||^2, with lengths over channels."""
    return (F.normalize(a.float()) - F.normalize(b.float())).square().sum(1).mean()


class AdversarialLoss:
    """The losses of a discriminator and its generator, and how much they count.

    kind: "hinge", "vanilla", "lsgan" or "multiclass".
    weight: of the adversarial term in the generator's loss.
    start: updates of the generator before it counts; ramp: updates over which its weight then grows to full.
    adaptive: multiplies the weight by `adaptive_weight`.
    feature_matching_weight: of `feature_matching` in the generator's loss.
    """

    def __init__(
        self,
        kind: str = "hinge",
        *,
        weight: float = 1.0,
        start: int = 0,
        ramp: int = 0,
        adaptive: bool = False,
        feature_matching_weight: float = 0.0,
    ) -> None:
        check_one_of("kind", kind, tuple(ADVERSARIAL_LOSSES))
        self.discriminator, self.generator = ADVERSARIAL_LOSSES[kind]
        self.uses_label = kind == "multiclass"
        self.weight, self.start, self.ramp, self.adaptive = weight, start, ramp, adaptive
        self.feature_matching_weight = feature_matching_weight

    def discriminator_loss(self, real: Tensor, fake: Tensor, label: Tensor | None = None) -> Tensor:
        """Of logits, in float32."""
        real, fake = real.float(), fake.float()
        return self.discriminator(real, fake, label) if self.uses_label else self.discriminator(real, fake)

    def generator_loss(self, fake: Tensor, label: Tensor | None = None) -> Tensor:
        """Of logits, in float32."""
        fake = fake.float()
        return self.generator(fake, label) if self.uses_label else self.generator(fake)

    def factor(self, update: int) -> float:
        """0 before `start`, then rising to 1 over `ramp` updates."""
        if update < self.start:
            return 0.0
        return 1.0 if self.ramp == 0 else min(1.0, (update - self.start + 1) / self.ramp)


def weighted(weight: float | Tensor, term: Tensor) -> Tensor:
    """Their product, without a kernel where the weight is 1."""
    return term if isinstance(weight, int | float) and weight == 1 else weight * term


def total(terms: Sequence[Tensor]) -> Tensor:
    """The sum of scalars, by as few kernels as that takes."""
    return torch.stack(list(terms)).sum() if len(terms) > 2 else sum(terms[1:], terms[0])


def norm_ratio(reconstruction: Tensor, adversarial: Tensor) -> Tensor:
    """|a| / |b| of two gradients, in [0, 1e4]."""
    return (reconstruction.norm() / (adversarial.norm() + 1e-4)).clamp(0, 1e4)


def adaptive_weight(
    reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor, *, ratio: Callable = norm_ratio
) -> Tensor:
    """|gradient of the reconstruction| / |gradient of the adversarial loss| at the last layer, in [0, 1e4].
    Eq. 7, Esser et al. 2021.

    The gradients are those of the global batch, so that all processes get the same weight. ratio:
    `norm_ratio`, or a block that computes it.
    """
    gradients = (
        mean_over_ranks(torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float())
        for loss in (reconstruction, adversarial)
    )
    return ratio(*gradients).detach()


# ---- what a segmenter makes of images: one value (B,) for each ----


def feature_distances(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """Features (B, C, *s) of several layers, of two images each -> (B,): |f / |f| - g / |g||^2 with lengths
    over channels, averaged over space and layers. As LPIPS (Zhang et al. 2018) without learned weights.
    """
    terms = [
        (F.normalize(f.float()) - F.normalize(g.float())).square().sum(1).flatten(1).mean(1)
        for f, g in zip(a, b, strict=True)
    ]
    return torch.stack(terms).mean(0)


def map_errors(logits: Tensor, mask: Tensor) -> Tensor:
    """Logits (B, K, *S) against a class map (B, 1, *S) -> (B,): cross-entropy averaged over voxels, plus 1
    minus soft Dice averaged over the foreground classes that the map of the sample holds.
    """
    logits = logits.float()
    entropy = F.cross_entropy(logits, mask[:, 0].long(), reduction="none").flatten(1).mean(1)
    planes = class_planes(mask, logits.shape[1], torch.float32)[:, 1:].flatten(2)
    found = logits.softmax(1)[:, 1:].flatten(2)
    wanted = planes.sum(2)
    dice = 2 * (found * planes).sum(2) / (found.sum(2) + wanted).clamp(min=1e-5)
    is_there = (wanted > 0).float()
    missed = ((1 - dice) * is_there).sum(1) / is_there.sum(1).clamp(min=1)
    return entropy + missed


def region_sums(features: Tensor, mask: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Sums of features (B, C, *s) over the regions of a class map (B, 1, *S), (B, K, C), and the sizes of the
    regions (B, K). A cell of the features counts to each class as much as the class has of it.
    """
    shares = F.interpolate(
        class_planes(mask, num_classes, torch.float32), size=features.shape[2:], mode="area"
    )
    with full_precision(features.device):
        sums = torch.einsum("bcv,bkv->bkc", features.float().flatten(2), shares.flatten(2))
    return sums, shares.flatten(2).sum(2)


def region_contrast(
    generated: Tensor, real: Tensor, mask: Tensor, num_classes: int, temperature: float
) -> Tensor:
    """Features (B, C, *s) of generated and of real images under one map (B, 1, *S) -> (B,): InfoNCE over
    regions.

    Each region of a generated image is to be told by its mean feature: its own class's mean over all real
    images of the batch is the positive, those of the other classes in the batch are the negatives; similarity
    is the cosine over `temperature`. Averaged over the regions of a sample. With N classes in the batch and
    features that are all alike it is log N. Of real features gradients are not taken. van den Oord et al.
    2018; classes in the place of instances as in Khosla et al. 2020, regions as in Wang et al. 2021.
    """
    queries, sizes = region_sums(generated, mask, num_classes)
    keys, areas = (x.sum(0) for x in region_sums(real.detach(), mask, num_classes))  # (K, C), (K,)
    with full_precision(generated.device):
        similarity = F.normalize(queries, dim=2) @ F.normalize(keys, dim=1).T / temperature  # (B, K, K)
    similarity = similarity.masked_fill(areas == 0, -1e9)  # finite: rows of absent classes are dropped below
    errors = -similarity.log_softmax(2).diagonal(dim1=1, dim2=2)
    is_there = (sizes > 0).float()
    return (errors * is_there).sum(1) / is_there.sum(1).clamp(min=1)
