"""Attention over a volume in two steps: within each slice, then along depth. Ho et al. 2022."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.devices import full_precision
from medldm.networks.biased import Biased, parted
from medldm.networks.compiling import is_compiling
from medldm.networks.layers import attend, zero_init
from medldm.networks.norms import as_summed, group_norm

NUM_PLACES = 512  # along depth, for which angles are computed once
PAYS = 4  # so many times more tokens (or columns) than channels are needed for products in another order
MAX_DISTANCE = 32  # of slices; all larger distances have the same relative bias


def linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention over tokens (B, L, C) at a cost that is linear in L, with a softmax over the channels of q
    and one over the tokens of k. Shen et al. 2021, "Efficient attention".
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in (q, k, v))  # (B, L, heads, c)
    with full_precision(q.device):  # in the type of q and k; the kernel sums in float32
        q, k = q.softmax(-1) * q.shape[-1] ** -0.5, k.softmax(1)
    summary = torch.einsum("blhc,blhd->bhcd", k, v)
    return torch.einsum("blhc,bhcd->blhd", q, summary).flatten(2)


def folded_linear_attention(tokens: Tensor, qkv: nn.Linear, out: nn.Linear, num_heads: int) -> Tensor:
    """`out(linear_attention(*qkv(tokens).chunk(3, -1), num_heads))` of tokens (B, L, C) without the bias of
    `out`, where of queries, keys, values and the result of attention only the queries are ever written.
    Values and result are linear in what the products around them make: (k^T v) = (k^T tokens) Wv and q (k^T
    v) Wo = q ((k^T v) Wo). And k^T tokens with a softmax over the tokens is attention: each row of Wk is a
    query, and the tokens are both keys and values. It pays where L is much larger than C.
    """
    to_q, to_k, to_v = qkv.weight.chunk(3)  # (heads c, C) each
    q = F.linear(tokens, to_q).unflatten(-1, (num_heads, -1))  # (B, L, heads, c)
    with full_precision(q.device):
        scale, q = q.shape[-1] ** -0.5, q.softmax(-1).flatten(2)
    rows, places = to_k.expand(len(tokens), 1, -1, -1), tokens[:, None]
    summary = F.scaled_dot_product_attention(rows, places, places, scale=1.0).squeeze(1)  # (B, heads c, C)
    summary = summary.unflatten(1, (num_heads, -1))  # (B, heads, c of k, C)
    summary = torch.einsum("bhkc,hvc->bhkv", summary, to_v.unflatten(0, (num_heads, -1)))
    summary = torch.einsum("bhkv,ohv->bhko", scale * summary, out.weight.unflatten(1, (num_heads, -1)))
    return torch.bmm(q, summary.flatten(1, 2))


class Rotary(nn.Module):
    """Turns each pair of channels of x (B, L, heads, c) by an angle that grows along L, so that products of
    two tokens depend on their distance and not on their places. Su et al. 2021, "RoFormer".
    """

    def __init__(self, head_channels: int) -> None:
        super().__init__()
        self.half = head_channels // 2
        cos, sin = self.table(NUM_PLACES, torch.device("cpu"))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)

    def table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosine and sine of the angles, each (L, 1, c // 2)."""
        frequencies = 10_000.0 ** (-torch.arange(self.half, device=device) / self.half)
        angles = torch.arange(length, device=device)[:, None] * frequencies
        return angles.cos()[:, None], angles.sin()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        cos, sin = (table.to(x.dtype) for table in self.angles(x.shape[1], x.device))
        a, b, *rest = x.split(self.half, dim=-1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos, *rest], dim=-1)

    def angles(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        if length > NUM_PLACES:
            return self.table(length, device)
        return self.cos[:length], self.sin[:length]

    def turned(self, weight: Tensor, num_heads: int, length: int) -> Tensor:
        """(L, C, heads c): for each place the weight (heads c, C) whose product is turned for that place."""
        cos, sin = (table[..., None] for table in self.angles(length, weight.device))  # (L, 1, c // 2, 1)
        exact = weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(0, (num_heads, -1))
        a, b, *rest = exact.split(self.half, dim=1)
        rest = [x.expand(length, *x.shape) for x in rest]
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos, *rest], dim=2)  # (L, heads, c, C)
        return turned.flatten(1, 2).transpose(1, 2).to(weight.dtype)


def distance_buckets(distance: Tensor, num_buckets: int) -> Tensor:
    """The bucket of each signed distance (int64) of two tokens: near distances have a bucket each, far
    ones share them. Raffel et al. 2020, "T5".
    """
    half, exact = num_buckets // 2, num_buckets // 4
    near = distance.abs()
    share = torch.log(near.clamp(min=1) / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(near < exact, near, far) + half * (distance > 0)


def with_offset(x: Tensor, offset: Tensor | None, layer: nn.Module, apart: bool) -> Tensor | Biased:
    """x, to which the bias of `layer` has not been added where `apart`, and `offset` has not."""
    bias = as_summed(layer.bias)[None] if apart else None
    offset = bias if offset is None else offset if bias is None else offset + bias
    return x if offset is None else Biased(x, offset)


class SliceAttention(nn.Module):
    """Attention within each slice. kind: "linear", as Ho et al. have it, or "full", with scaled
    dot products.
    """

    def __init__(self, channels: int, *, kind: str, num_heads: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.attend = {"linear": linear_attention, "full": attend}[kind]
        self.num_heads, width = num_heads, num_heads * head_channels
        self.norm = group_norm(channels, groups=groups)
        self.qkv = nn.Linear(channels, 3 * width, bias=False)
        self.out = nn.Linear(width, channels)

    def forward(self, x: Tensor | Biased) -> Tensor | Biased:
        """(B, C, D, H, W) -> the same shape; where a compiler follows, before its bias is added."""
        x, offset = parted(x)
        tokens = self.norm(x, offset=offset).movedim(1, -1)  # (B, D, H, W, C)
        flat, apart = tokens.flatten(0, 1).flatten(1, 2), is_compiling()  # (B D, H W, C)
        if self.attend is linear_attention and apart and flat.shape[1] > PAYS * flat.shape[2]:
            out = folded_linear_attention(flat, self.qkv, self.out, self.num_heads)
        else:
            out = self.attend(*self.qkv(flat).chunk(3, dim=-1), self.num_heads)
            out = F.linear(out, self.out.weight) if apart else self.out(out)
        return with_offset(x + out.reshape(tokens.shape).movedim(-1, 1), offset, self.out, apart)


class DepthAttention(nn.Module):
    """Attention along the first spatial axis, at every position of a slice. Positions are rotary, so that any
    number of slices is possible.

    relative_bias: a learned bias for each distance as well, as Med-LSDM has it.
    """

    num_buckets = 32

    def __init__(
        self, channels: int, *, num_heads: int, head_channels: int, groups: int, relative_bias: bool
    ) -> None:
        super().__init__()
        self.num_heads, width = num_heads, num_heads * head_channels
        self.norm = group_norm(channels, groups=groups)
        self.qkv = nn.Linear(channels, 3 * width, bias=False)
        self.out = nn.Linear(width, channels)
        self.bias = nn.Embedding(self.num_buckets, num_heads) if relative_bias else None
        self.rotary = Rotary(head_channels)

    def forward(self, x: Tensor | Biased) -> Tensor | Biased:
        """(B, C, D, H, W) -> the same shape; where a compiler follows, before its bias is added."""
        x, offset = parted(x)
        normed, apart = self.norm(x, offset=offset), is_compiling()
        if apart and x[:, 0, 0].numel() > PAYS * x.shape[1]:
            return with_offset(x + self.turned_by_weights(normed), offset, self.out, apart)
        tokens = normed.permute(0, 3, 4, 2, 1)  # (B, H, W, D, C)
        qkv = self.qkv(tokens.flatten(0, 2)).unflatten(-1, (3 * self.num_heads, -1))  # (B H W, D, 3 heads, c)
        qk, v = qkv.split([2 * self.num_heads, self.num_heads], dim=2)
        q, k = self.rotary(qk).transpose(1, 2).chunk(2, dim=1)  # (B H W, heads, D, c) each
        bias = self.relative(x.shape[2], q)
        out = (
            F.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=bias).transpose(1, 2).flatten(2)
        )
        out = F.linear(out, self.out.weight) if apart else self.out(out)
        return with_offset(x + out.reshape(tokens.shape).permute(0, 4, 3, 1, 2), offset, self.out, apart)

    def relative(self, length: int, q: Tensor) -> Tensor | None:
        """The learned bias of each distance, (heads, D, D)."""
        if self.bias is None:
            return None
        places = torch.arange(length, device=q.device)
        buckets = distance_buckets(places - places[:, None], self.num_buckets)
        return self.bias(buckets).permute(2, 0, 1).to(q.dtype)

    def turned_by_weights(self, x: Tensor) -> Tensor:
        """The attention of a normed x before its bias is added, where the angles turn a weight for each slice
        instead of all queries and keys. Slices come first in memory, (D, B H W, heads c), and nothing is
        copied.
        """
        tokens = x.permute(2, 0, 3, 4, 1)  # (D, B, H, W, C)
        rows = tokens.flatten(1, 3)
        to_qk, to_v = self.qkv.weight.tensor_split([2 * self.qkv.weight.shape[0] // 3])
        turned = self.rotary.turned(to_qk, 2 * self.num_heads, len(rows))
        q, k = (rows @ weight for weight in turned.chunk(2, dim=-1))
        v = F.linear(rows, to_v)
        heads = (y.unflatten(-1, (self.num_heads, -1)).permute(1, 2, 0, 3) for y in (q, k, v))
        out = F.scaled_dot_product_attention(*heads, attn_mask=self.relative(len(rows), q))
        out = F.linear(out.permute(2, 0, 1, 3).flatten(2), self.out.weight)  # (D, B H W, C)
        return out.reshape(tokens.shape).permute(1, 4, 0, 2, 3)


class FactorisedAttention(nn.Module):
    """Attention within slices, then along depth.

    spatial: the kind within slices, "linear" or "full", or "none" for depth alone.
    zero_init_last: both start as the identity.
    """

    is_block = takes_biased = True

    def __init__(
        self,
        channels: int,
        *,
        spatial: str = "linear",
        num_heads: int = 8,
        head_channels: int = 32,
        norm_groups: int = 8,
        relative_bias: bool = False,
        zero_init_last: bool = True,
    ) -> None:
        super().__init__()
        if spatial not in ("linear", "full", "none"):
            raise ValueError(f"spatial attention '{spatial}' is none of linear, full, none")
        shape = {"num_heads": num_heads, "head_channels": head_channels, "groups": norm_groups}
        self.slices = None if spatial == "none" else SliceAttention(channels, kind=spatial, **shape)
        self.depth = DepthAttention(channels, relative_bias=relative_bias, **shape)
        for part in (self.slices, self.depth) if zero_init_last else ():
            if part is not None:
                zero_init(part.out)

    def forward(self, x: Tensor | Biased, context: Tensor | None = None) -> Tensor:
        """(B, C, D, H, W) -> the same shape; `context`, which other kinds of attention take, is not used.

        Raises ValueError for images.
        """
        value, _ = parted(x)
        if value.ndim != 5:
            raise ValueError(f"factorised attention is for volumes (B, C, D, H, W), not {tuple(value.shape)}")
        out = self.depth(x if self.slices is None else self.slices(x))
        return out.summed() if isinstance(out, Biased) else out
