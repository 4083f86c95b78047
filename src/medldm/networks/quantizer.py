"""Vector quantisation with a learned or a moving-average codebook.

van den Oord et al. 2017 (straight-through, codebook and commitment terms), Razavi et al. 2019 (moving
average), Dhariwal et al. 2020 (restart of unused codes).
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.devices import CHUNK_ELEMENTS, CODES_PER_BLOCK, full_precision
from medldm.networks.compiling import Function
from medldm.ranks import all_reduce, num_ranks, rank


class Quantized(NamedTuple):
    """What a quantiser returns."""

    z: Tensor  # (B, C, *S) nearest codes; gradients pass straight through to the input
    indices: Tensor  # (B, *S) int64
    loss: Tensor  # scalar: codebook and commitment terms
    perplexity: Tensor  # scalar: exp of the entropy of this batch's codes


@contextlib.contextmanager
def exact_matmul() -> Iterator[None]:
    """A context in which products of float32 do not use TF32, whose mantissa of ten bits would change which
    code is the nearest.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def extended(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor]:
    """(x, 1) of each row, (N, C + 1), and (-e, |e|^2 / 2) of each code, (K, C + 1)."""
    return (
        F.pad(x, (0, 1), value=1.0),
        torch.cat([-codebook, codebook.square().sum(1, keepdim=True) / 2], dim=1),
    )


def nearest_codes(x: Tensor, codebook: Tensor, *, extend: Callable = extended) -> Tensor:
    """The nearest code (L2) of each row: x (N, C), codebook (K, C) -> indices (N,) int64.

    The N x K matrix of distances is never held as a whole. argmin |x - e|^2 = argmin (|e|^2 / 2 - x e), which
    is one product of (-e, |e|^2 / 2) with (x, 1). The minimum is vectorised and argmin is not, so the minima
    of blocks of codes are found first. Of codes that are equally near the first one is taken. extend:
    `extended`, or a block that computes it.
    """
    rows, codes = extend(x, codebook)
    kind = x.device.type
    block, filler = CODES_PER_BLOCK.get(kind, 0), 0
    if block and (filler := -len(codes) % block):
        never = F.pad(codes.new_full((filler, 1), torch.inf), (x.shape[1], 0))
        codes = torch.cat([codes, never])
    columns = max(1, CHUNK_ELEMENTS.get(kind, 2**24) // len(codes))
    nearest = partial(nearest_in_blocks, block=block) if block else nearest_at_once
    with exact_matmul():
        found = [nearest(codes, part) for part in rows.split(columns)]
    return torch.cat(found)


def nearest_at_once(codes: Tensor, x: Tensor) -> Tensor:
    """Rows (x, 1) of shape (n, C + 1), codes (-e, |e|^2 / 2) of shape (K, C + 1) -> (n,)."""
    return (x @ codes.t()).argmin(1)


def nearest_in_blocks(codes: Tensor, x: Tensor, block: int) -> Tensor:
    """As `nearest_at_once`, by the minima of `block` codes each; K is a multiple of it."""
    products = codes @ x.t()
    distances = products.view(-1, block, len(x))  # (K / block, block, n)
    chosen = distances.amin(1).argmin(0)  # (n,)
    within = distances[chosen, :, torch.arange(len(x), device=x.device)].argmin(1)
    return chosen * block + within


def perplexity_of(counts: Tensor) -> Tensor:
    """exp of the entropy of codes that occur `counts` times."""
    frequency = counts / counts.sum()
    return torch.exp(-torch.special.xlogy(frequency, frequency).sum())


class VectorQuantizer(nn.Module):
    """Replaces each vector along the channel axis of (B, C, *S) by the nearest of K = `num_codes` codes.

    It computes in float32, also under autocast.
    ema_decay: None learns the codebook by gradient; a number, such as 0.99, sets it to moving averages of the
    vectors instead, without a codebook term in the loss.
    restart_threshold: a code whose moving count falls below it is moved to a vector of the current batch.
    init: "uniform" in [-1/K, 1/K], "normal", or "data", the vectors of the first training batch.
    legacy_beta: puts `commitment_weight` on the codebook term, and 1 on the commitment, as the code of
    CompVis and of ALDM does.
    The flag "initialised" and all statistics are buffers, so that a resumed run goes on with its codebook.
    """

    is_among_codes = True  # h and its codes are in the same space

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        commitment_weight: float = 0.25,
        codebook_weight: float = 1.0,
        ema_decay: float | None = None,
        restart_threshold: float = 0.0,
        init: str = "uniform",
        legacy_beta: bool = False,
    ) -> None:
        super().__init__()
        if init not in ("uniform", "normal", "data"):
            raise ValueError(f"the codebook's init '{init}' is none of uniform, normal, data")
        self.num_codes, self.code_dim = num_codes, code_dim
        self.commitment_weight, self.codebook_weight = commitment_weight, codebook_weight
        if legacy_beta:
            self.commitment_weight, self.codebook_weight = 1.0, commitment_weight
        self.ema_decay, self.restart_threshold = ema_decay, restart_threshold
        codebook = torch.empty(num_codes, code_dim)
        codebook = (
            codebook.uniform_(-1 / num_codes, 1 / num_codes) if init == "uniform" else codebook.normal_()
        )
        if ema_decay is None:
            self.codebook = nn.Parameter(codebook)
        else:
            self.register_buffer("codebook", codebook)
            self.register_buffer("code_sum", codebook.clone())
        self.register_buffer("code_count", torch.ones(num_codes))
        self.register_buffer("initialised", torch.tensor(init != "data"))
        self.register_buffer("num_updates", torch.tensor(0))
        self.register_buffer("epoch_count", torch.zeros(num_codes), persistent=False)
        self.initialise, self.finish = Function(self._initialise), Function(self._finish)
        self.extend = Function(extended)

    def forward(self, h: Tensor) -> Quantized:
        """The codes of h (B, C, *S). In training mode the statistics are updated."""
        with full_precision(h.device):
            return self._forward(h.float())

    def _forward(self, h: Tensor) -> Quantized:
        x = h.movedim(1, -1).reshape(-1, self.code_dim)  # (N, C)
        with torch.no_grad():
            if self.training:
                self.initialise(x)
            indices = nearest_codes(x, self.codebook, extend=self.extend)
        return self.finish(h, x, indices)

    def _finish(self, h: Tensor, x: Tensor, indices: Tensor) -> Quantized:
        with torch.no_grad():
            counts = torch.zeros_like(self.code_count)
            counts.index_add_(0, indices, torch.ones_like(x[:, 0]))
        codes = F.embedding(indices, self.codebook)
        loss = self._loss(x, codes)
        z = (x + (codes - x).detach()).reshape(h.movedim(1, -1).shape).movedim(-1, 1)
        if self.training:
            self._update(x.detach(), indices, counts)
        return Quantized(z, indices.reshape(h.shape[:1] + h.shape[2:]), loss, perplexity_of(counts))

    def _loss(self, x: Tensor, codes: Tensor) -> Tensor:
        loss = self.commitment_weight * F.mse_loss(x, codes.detach())
        if self.ema_decay is None:
            loss = loss + self.codebook_weight * F.mse_loss(codes, x.detach())
        return loss

    def snap(self, z: Tensor) -> Quantized:
        """The nearest codes of latents that are near codes already, here the same as of any h."""
        return self(z)

    def code_range(self) -> tuple[Tensor, Tensor]:
        """Least and largest entry of all codes, float64."""
        return self.codebook.detach().double().aminmax()

    def lookup(self, indices: Tensor) -> Tensor:
        """(B, *S) indices -> (B, C, *S) codes."""
        return F.embedding(indices, self.codebook).movedim(-1, 1)

    def epoch_usage(self) -> Tensor:
        """The share of codes, in [0, 1], that training has used since the last call."""
        usage = (self.epoch_count > 0).float().mean()
        self.epoch_count.zero_()
        return usage

    # Buffers change in place and the host never reads their values, so that no step waits for the device.

    def _initialise(self, x: Tensor) -> None:
        self._replace(~self.initialised.expand(self.num_codes), x)
        self.initialised.fill_(True)

    def _update(self, x: Tensor, indices: Tensor, counts: Tensor) -> None:
        self.num_updates += 1
        counts = all_reduce(counts.clone())
        self.epoch_count += counts
        decay = 0.99 if self.ema_decay is None else self.ema_decay
        self.code_count.lerp_(counts, 1 - decay)
        if self.ema_decay is not None:
            sums = torch.zeros_like(self.code_sum).index_add_(0, indices, x)
            self.code_sum.lerp_(all_reduce(sums), 1 - decay)
            total = self.code_count.sum()
            smoothed = (self.code_count + 1e-7) / (total + self.num_codes * 1e-7) * total  # Laplace smoothing
            self.codebook.copy_(self.code_sum / smoothed[:, None])
        if self.restart_threshold > 0:
            self._replace(self.code_count < self.restart_threshold, x)

    def _replace(self, chosen: Tensor, x: Tensor) -> None:
        """Moves the chosen codes (K,) to input vectors, and restarts their statistics."""
        vectors = self._candidates(x)
        self.codebook.data.copy_(torch.where(chosen[:, None], vectors, self.codebook))
        self.code_count.copy_(torch.where(chosen, 1.0, self.code_count))
        if self.ema_decay is not None:
            self.code_sum.copy_(torch.where(chosen[:, None], vectors, self.code_sum))

    def _candidates(self, x: Tensor) -> Tensor:
        """One input vector for each code, (K, C), the same on every rank.

        Which vector a code gets is a hash of the code's number and the update's. It needs no random state, so
        a resumed run chooses the same, and it spreads the codes evenly over the batch. Every rank fills in
        the vectors that it holds, and the sum over ranks is complete.
        """
        total = num_ranks() * len(x)
        step = next(
            s for s in range(round(total * 0.6180339887) | 1, 2 * total + 3) if math.gcd(s, total) == 1
        )
        position = torch.arange(self.num_codes, device=x.device) * step + self.num_updates * 7919
        position = position % total - rank() * len(x)
        is_mine = (position >= 0) & (position < len(x))
        return all_reduce(x[position.clamp(0, len(x) - 1)] * is_mine[:, None])
