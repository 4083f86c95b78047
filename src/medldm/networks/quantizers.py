"""Quantisers that can replace the vector quantiser, with the same interface: a call with h (B, C, *S) gives
`Quantized`, `snap` moves latents near codes to the nearest ones, and `lookup` turns indices into codes.

Finite scalar quantisation (Mentzer et al. 2023), lookup-free quantisation (Yu et al. 2024), residual vector
quantisation (Lee et al. 2022), and the Gaussian latents of Rombach et al. 2022.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.devices import full_precision
from medldm.networks.quantizer import Quantized, VectorQuantizer, perplexity_of
from medldm.ranks import all_reduce


def straight_through(h: Tensor, z: Tensor) -> Tensor:
    """z with the gradient of h."""
    return h + (z - h).detach()


class FixedCodes(nn.Module):
    """A fixed grid of codes: channel c takes one of `levels[c]` values.

    The index of a code is the number whose digits are the levels of the channels, the first channel first.
    """

    is_among_codes = (
        False  # h is not in the space of its codes, so that it cannot be decoded without quantising
    )

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.num_codes = math.prod(levels)
        factors = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("levels", torch.tensor(levels), persistent=False)
        self.register_buffer("factors", torch.tensor(factors), persistent=False)
        self.register_buffer("epoch_count", torch.zeros(self.num_codes), persistent=False)

    def index_of(self, digits: Tensor) -> Tensor:
        """(..., C) whole numbers below `levels` -> (...) int64."""
        return (digits.long() * self.factors).sum(-1)

    def digits_of(self, indices: Tensor) -> Tensor:
        """(...) -> (..., C), inverse of `index_of`."""
        return indices[..., None] // self.factors % self.levels

    def counted(self, indices: Tensor) -> Tensor:
        """Counts the codes of a batch (B, *S), in training for the epoch, too; returns their perplexity."""
        counts = torch.zeros_like(self.epoch_count)
        counts.index_add_(0, indices.flatten(), torch.ones_like(indices.flatten(), dtype=counts.dtype))
        if self.training:
            self.epoch_count += all_reduce(counts.clone())
        return perplexity_of(counts)

    def epoch_usage(self) -> Tensor:
        """The share of codes, in [0, 1], that training has used since the last call."""
        usage = (self.epoch_count > 0).float().mean()
        self.epoch_count.zero_()
        return usage


class FiniteScalarQuantizer(FixedCodes):
    """Every channel is bounded and rounded to one of its levels, evenly spaced in [-1, 1], without a loss.

    `levels` has one entry for each latent channel; [8, 5, 5, 5] are the paper's 1000 codes. An even number of
    levels has one more below 0 than above.
    """

    def __init__(self, code_dim: int, *, levels: Sequence[int]) -> None:
        if len(levels) != code_dim or min(levels) < 2:
            raise ValueError(f"levels={list(levels)} must be {code_dim} numbers of at least 2, one a channel")
        super().__init__(levels)
        reach = [(n - 1) * (1 - 1e-3) / 2 for n in levels]
        offset = [0.0 if n % 2 else 0.5 for n in levels]
        self.register_buffer("reach", torch.tensor(reach), persistent=False)
        self.register_buffer("offset", torch.tensor(offset), persistent=False)

    def bounded(self, x: Tensor) -> Tensor:
        """(..., C) -> within half a level of the levels' whole numbers; 0 stays 0."""
        return torch.tanh(x + torch.atanh(self.offset / self.reach)) * self.reach - self.offset

    def forward(self, h: Tensor) -> Quantized:
        with full_precision(h.device):
            return self.rounded(self.bounded(h.float().movedim(1, -1)))

    def rounded(self, x: Tensor) -> Quantized:
        """(B, *S, C) in units of levels."""
        whole = x.round()
        middle = self.levels // 2
        indices = self.index_of(whole + middle)
        z = (straight_through(x, whole) / middle).movedim(-1, 1)
        return Quantized(z, indices, z.new_zeros(()), self.counted(indices))

    def snap(self, z: Tensor) -> Quantized:
        lowest, middle = -(self.levels // 2), self.levels // 2
        x = z.float().movedim(1, -1) * middle
        return self.rounded(torch.minimum(torch.maximum(x, lowest), lowest + self.levels - 1))

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, *S) indices -> (B, C, *S) codes."""
        middle = self.levels // 2
        return ((self.digits_of(indices) - middle) / middle).movedim(-1, 1)

    def code_range(self) -> tuple[Tensor, Tensor]:
        """Least and largest entry of all codes."""
        middle = self.levels // 2
        return -torch.ones((), dtype=torch.float64), (
            (self.levels - 1 - middle) / middle
        ).double().max().cpu()


def sign_entropy(logits: Tensor) -> Tensor:
    """The entropy in nats of probabilities sigmoid(logits)."""
    return F.softplus(logits) - logits * torch.sigmoid(logits)


class LookupFreeQuantizer(FixedCodes):
    """Every channel becomes its sign: 2^C codes, all in use where the entropy of the batch's codes is large.

    The loss is commitment_weight |h - z|^2 + entropy_weight (mean entropy of a vector's code - entropy of the
    mean over vectors), in nats, with codes as probable as exp(-|h - code|^2 / temperature). The entropy of
    the mean is exact for up to GROUP channels; more are taken in groups of so many, as if these were
    independent.
    """

    GROUP = 10

    def __init__(
        self,
        code_dim: int,
        *,
        commitment_weight: float = 0.25,
        entropy_weight: float = 0.1,
        temperature: float = 1.0,
    ) -> None:
        if code_dim > 20 or temperature <= 0:
            raise ValueError(
                f"code_dim={code_dim} must be at most 20, for there are 2^code_dim codes, and "
                f"temperature={temperature} above 0"
            )
        super().__init__([2] * code_dim)
        self.commitment_weight, self.entropy_weight = commitment_weight, entropy_weight
        self.temperature = temperature

    def forward(self, h: Tensor) -> Quantized:
        with full_precision(h.device):
            x = h.float().movedim(1, -1)
            signs = torch.where(x > 0, 1.0, -1.0)
            indices = self.index_of(signs > 0)
            z = straight_through(x, signs).movedim(-1, 1)
            return Quantized(z, indices, self.loss(x.flatten(0, -2), signs), self.counted(indices))

    def loss(self, x: Tensor, signs: Tensor) -> Tensor:
        each, mean = self.entropies(x)
        commitment = F.mse_loss(x, signs.reshape(x.shape))
        return self.commitment_weight * commitment + self.entropy_weight * (each - mean)

    def entropies(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors (N, C) -> mean entropy of one's code, and entropy of the mean over all of them."""
        logits = 4 * x / self.temperature  # |x + 1|^2 - |x - 1|^2 = 4 x
        each = sign_entropy(logits).sum(1).mean()
        mean = sum(self.entropy_of_mean(part) for part in torch.sigmoid(logits).split(self.GROUP, dim=1))
        return each, mean

    @staticmethod
    def entropy_of_mean(share: Tensor) -> Tensor:
        """(N, C) probabilities of +1 -> entropy of the codes' joint probability, averaged over N."""
        joint = torch.ones_like(share[:, :1])  # (N, 1), then (N, 2), (N, 4) ..
        for p in share.unbind(1):
            joint = torch.cat([joint * (1 - p[:, None]), joint * p[:, None]], dim=1)
        return torch.special.entr(joint.mean(0)).sum()

    def snap(self, z: Tensor) -> Quantized:
        return self(z)

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, *S) indices -> (B, C, *S) codes of -1 and 1."""
        return (2.0 * self.digits_of(indices) - 1).movedim(-1, 1)

    def code_range(self) -> tuple[Tensor, Tensor]:
        """Least and largest entry of all codes."""
        one = torch.ones((), dtype=torch.float64)
        return -one, one


class ResidualQuantizer(nn.Module):
    """`depth` vector quantisers, each of what those before it have left; z is the sum of their codes.

    Other options are those of `VectorQuantizer`, for each of them. Losses and perplexities are averaged.
    """

    is_among_codes = True

    def __init__(self, code_dim: int, *, num_codes: int, depth: int, **options) -> None:
        super().__init__()
        if depth < 1 or num_codes**depth >= 2**63:
            raise ValueError(f"depth={depth} must be at least 1, and num_codes to its power below 2^63")
        self.parts = nn.ModuleList(VectorQuantizer(num_codes, code_dim, **options) for _ in range(depth))
        self.num_codes, self.depth = num_codes, depth
        self.register_buffer("epoch_count", torch.zeros(depth * num_codes), persistent=False)

    def forward(self, h: Tensor) -> Quantized:
        h = h.float()
        rest, total, indices = h, torch.zeros_like(h), torch.zeros((), dtype=torch.int64)
        found = []
        for k, part in enumerate(self.parts):
            found.append(part(rest))
            codes = part.lookup(found[-1].indices)
            rest, total = rest - codes.detach(), total + codes.detach()
            indices = indices + found[-1].indices * self.num_codes**k
        if self.training:
            self.epoch_count += torch.cat([part.epoch_count for part in self.parts])
            for part in self.parts:
                part.epoch_count.zero_()
        loss, perplexity = (
            torch.stack([getattr(q, name) for q in found]).mean() for name in ("loss", "perplexity")
        )
        return Quantized(straight_through(h, total), indices, loss, perplexity)

    def snap(self, z: Tensor) -> Quantized:
        """As it is: quantised once more, part by part, a sum of codes need not be the same sum again."""
        return self(z)._replace(z=z)

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, *S) indices, whose digits to the base num_codes are those of the parts -> (B, C, *S) codes."""
        return sum(
            part.lookup(indices // self.num_codes**k % self.num_codes) for k, part in enumerate(self.parts)
        )

    def code_range(self) -> tuple[Tensor, Tensor]:
        """Bounds of the entries of all codes."""
        ranges = [part.code_range() for part in self.parts]
        return sum(low for low, _ in ranges), sum(high for _, high in ranges)

    def epoch_usage(self) -> Tensor:
        """The share of the parts' codes, in [0, 1], that training has used since the last call."""
        usage = (self.epoch_count > 0).float().mean()
        self.epoch_count.zero_()
        return usage


class GaussianLatent(nn.Module):
    """No codes: a latent is normal of mean h, drawn in training and its mean elsewhere.

    The loss is `kl_weight` times the divergence from a standard normal, in nats for each latent value. The
    log variance is a linear function of the mean's channels, where Rombach et al. 2022 take both from
    features.
    """

    is_among_codes = True
    num_codes = 0

    def __init__(self, code_dim: int, *, kl_weight: float) -> None:
        super().__init__()
        self.kl_weight = kl_weight
        self.log_variance = nn.Linear(code_dim, code_dim)
        nn.init.zeros_(self.log_variance.weight)
        nn.init.constant_(self.log_variance.bias, -6.0)  # little noise at first
        self.register_buffer("epoch_count", torch.zeros(0), persistent=False)

    def forward(self, h: Tensor) -> Quantized:
        with full_precision(h.device):
            h = h.float()
            log_variance = self.log_variance(h.movedim(1, -1)).movedim(-1, 1).clamp(-30, 20)
            divergence = 0.5 * (h.square() + log_variance.exp() - 1 - log_variance).mean()
            z = h + (log_variance / 2).exp() * torch.randn_like(h) if self.training else h
            indices = torch.zeros(h[:, 0].shape, dtype=torch.int64, device=h.device)
            return Quantized(z, indices, self.kl_weight * divergence, h.new_ones(()))

    def snap(self, z: Tensor) -> Quantized:
        return self(z)

    def code_range(self) -> tuple[Tensor, Tensor]:
        raise ValueError("normalisation=codebook_range: Gaussian latents have no codes; set it to std")

    def epoch_usage(self) -> Tensor:
        """1: there is nothing to leave unused."""
        return torch.ones(())
