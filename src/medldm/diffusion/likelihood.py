"""Likelihoods of images under the output of a decoder: -log p(x | z_0) in nats, and the image to show.

Images x are in [-1, 1]; y = (x + 1) / 2 is the grey level in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

TARGETS = ("soft", "dynamic", "threshold")
CHUNK = 1 << 16  # number of values of which all levels are held in memory at a time


def grey(x: Tensor) -> Tensor:
    """[-1, 1] -> [0, 1], float32."""
    return ((x.float() + 1) / 2).clamp(0, 1)


def binary_entropy(y: Tensor) -> Tensor:
    """The entropy in nats of a coin that shows heads with probability y; it is 0 at 0 and at 1."""
    return -(torch.special.xlogy(y, y) + torch.special.xlogy(1 - y, 1 - y))


class Bernoulli(nn.Module):
    """Independent coins with the decoder's logits.

    `target` "soft" scores the grey levels themselves by cross-entropy. That is no likelihood of grey images,
    and never below their binary entropy (`entropy_floor`). "dynamic" draws 0 or 1 for each pixel at every
    step, with the grey level as probability, and the model sees these; "threshold" cuts at one half. A cast
    to integers, as some code has it, would make every grey level 0.
    """

    def __init__(self, target: str) -> None:
        super().__init__()
        if target not in TARGETS:
            raise ValueError(f"target={target} is none of {', '.join(TARGETS)}")
        self.target = target
        self.is_random = target == "dynamic"

    def observe(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """The image as the model sees it, in [-1, 1]; `u` is uniform in [0, 1) where `is_random`."""
        if self.target == "soft":
            return x
        y = grey(x) > u if self.target == "dynamic" else grey(x) >= 0.5
        return 2 * y.to(x.dtype) - 1

    def nats(self, output: Tensor, x: Tensor, gamma_0: Tensor) -> Tensor:
        """(B,) for an observed image."""
        terms = F.binary_cross_entropy_with_logits(output.float(), grey(x), reduction="none")
        return terms.flatten(1).sum(1)

    def expected(self, output: Tensor) -> Tensor:
        """The mean of an observed image, with gradients."""
        return 2 * torch.sigmoid(output.float()) - 1

    def mean(self, output: Tensor) -> Tensor:
        """The image to show, in [-1, 1]."""
        return self.expected(output)

    def entropy_floor(self, x: Tensor) -> Tensor:
        """(B,) The mean over observations of the least nats that any decoder can reach on an image."""
        if self.target == "threshold":
            return x.new_zeros(len(x))
        return binary_entropy(grey(x).double()).flatten(1).sum(1).float()


class DiscretizedGaussian(nn.Module):
    """A normal density on V grey levels f(v) = 2 (v + 1/2) / V - 1 that sums to one, so that bits per
    dimension are those of a code.

    With `scale` "learned", one variance serves all pixels, and each level has the mass of the normal in its
    bin, where the outer bins are open (Ho et al. 2020); the cost does not grow with V. "schedule" takes the
    variance exp(gamma_0) around z_0 / alpha_0 and normalises the density over the levels: the pixel model of
    Kingma et al. 2021.
    """

    is_random = False

    def __init__(self, *, num_levels: int = 256, scale: str = "learned") -> None:
        super().__init__()
        if scale not in ("learned", "schedule"):
            raise ValueError(f"scale={scale} is none of learned, schedule")
        self.num_levels = num_levels
        self.log_variance = nn.Parameter(torch.tensor(-4.0)) if scale == "learned" else None

    def level(self, x: Tensor) -> Tensor:
        """The nearest of the levels 0 to V - 1 of a value in [-1, 1], from the darkest to the brightest."""
        return (grey(x) * (self.num_levels - 1)).round().long()

    def value(self, level: Tensor) -> Tensor:
        return 2 * (level.float() + 0.5) / self.num_levels - 1

    def observe(self, x: Tensor, u: Tensor | None = None) -> Tensor:
        """The image rounded to its V levels."""
        return self.value(self.level(x)).to(x.dtype)

    def nats(self, output: Tensor, x: Tensor, gamma_0: Tensor) -> Tensor:
        """(B,) for an observed image."""
        if self.log_variance is not None:
            return self.bin_nats(output.float(), x).flatten(1).sum(1)
        mean, level = output.float().flatten(), self.level_of_value(x).flatten()
        parts = [
            checkpoint(self.chunk_nats, m, v, gamma_0, use_reentrant=False)
            for m, v in zip(mean.split(CHUNK), level.split(CHUNK), strict=True)
        ]
        return torch.cat(parts).reshape(len(x), -1).sum(1)

    def bin_nats(self, mean: Tensor, x: Tensor) -> Tensor:
        """-log of the mass between the edges of a level, computed in the lower tail, where it is precise."""
        level = self.level_of_value(x)
        gap = self.value(level) - mean
        # Levels above the mean are mirrored: mass(a, b) = mass(-b, -a).
        sign = torch.where(gap > 0, -1.0, 1.0)
        inverse = torch.exp(-self.log_variance.float() / 2)
        low, high = ((sign * gap + side / self.num_levels) * inverse for side in (-1.0, 1.0))
        first, last = level == 0, level == self.num_levels - 1
        opens_low = torch.where(sign > 0, first, last)
        opens_high = torch.where(sign > 0, last, first)
        log_high = torch.special.log_ndtr(high).masked_fill(opens_high, 0.0)
        log_ratio = (torch.special.log_ndtr(low) - log_high).masked_fill(opens_low, -torch.inf)
        return -(log_high + torch.log(-torch.expm1(log_ratio.clamp(max=-1e-7))))

    def chunk_nats(self, mean: Tensor, level: Tensor, log_variance: Tensor) -> Tensor:
        levels = self.value(torch.arange(self.num_levels, device=mean.device))
        logits = -0.5 * ((mean[:, None] - levels) * torch.exp(-log_variance.float() / 2)).square()
        return F.cross_entropy(logits, level, reduction="none")

    def level_of_value(self, x: Tensor) -> Tensor:
        """The inverse of `value` on observed images."""
        return ((x.float() + 1) * self.num_levels / 2 - 0.5).round().long().clamp(0, self.num_levels - 1)

    def expected(self, output: Tensor) -> Tensor:
        """The mean of an observed image, with gradients: not rounded to a level."""
        return output.float()

    def mean(self, output: Tensor) -> Tensor:
        """The most likely level as an image whose extremes are -1 and 1."""
        return 2 * self.level_of_value(output).float() / (self.num_levels - 1) - 1

    def entropy_floor(self, x: Tensor) -> Tensor:
        """Zero, since a decoder may be certain of every level."""
        return x.new_zeros(len(x))
