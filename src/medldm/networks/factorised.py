"""Attention of a volume in two steps: within each slice, then along depth. Ho et al. 2022."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.networks.layers import attend, group_norm, zero_init

MAX_DISTANCE = 32  # slices beyond which the relative bias no longer tells distances apart


def linear_attention(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Attention over (B, L, C) tokens at a cost linear in L: softmax over the channels of q and the tokens
    of k. Shen et al. 2021.
    """
    q, k, v = (x.unflatten(-1, (num_heads, -1)) for x in (q, k, v))  # (B, L, heads, c)
    q = q.softmax(-1) * q.shape[-1] ** -0.5
    summary = torch.einsum("blhc,blhd->bhcd", k.softmax(1), v)
    return torch.einsum("blhc,bhcd->blhd", q, summary).flatten(2)


def rotated(x: Tensor) -> Tensor:
    """(B, L, heads, c) with each pair of channels turned by an angle that grows along L, so that products
    depend on distances alone. Su et al. 2021.
    """
    half = x.shape[-1] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=x.device) / half)
    angles = torch.arange(x.shape[1], device=x.device)[:, None] * frequencies  # (L, half)
    cos, sin = (f(angles)[:, None].to(x.dtype) for f in (torch.cos, torch.sin))
    a, b = x[..., :half], x[..., half : 2 * half]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, x[..., 2 * half :]], dim=-1)


def distance_buckets(length: int, num_buckets: int, device: torch.device) -> Tensor:
    """(L, L) bucket of each signed distance: near ones have their own, far ones share. Raffel et al. 2020."""
    positions = torch.arange(length, device=device)
    distance = positions[None] - positions[:, None]
    half, exact = num_buckets // 2, num_buckets // 4
    near = distance.abs()
    share = torch.log(near.clamp(min=1) / exact) / math.log(MAX_DISTANCE / exact)
    far = (exact + (share * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(near < exact, near, far) + half * (distance > 0)


class SliceAttention(nn.Module):
    """Within each slice: "linear" as published, or "full" (scaled dot products)."""

    def __init__(self, channels: int, *, kind: str, num_heads: int, head_channels: int, groups: int) -> None:
        super().__init__()
        self.attend = {"linear": linear_attention, "full": attend}[kind]
        self.num_heads, width = num_heads, num_heads * head_channels
        self.norm = group_norm(channels, groups=groups)
        self.qkv = nn.Linear(channels, 3 * width, bias=False)
        self.out = nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).movedim(1, -1)  # (B, D, H, W, C)
        q, k, v = self.qkv(tokens.flatten(0, 1).flatten(1, 2)).chunk(3, dim=-1)  # (B D, H W, heads c)
        out = self.out(self.attend(q, k, v, self.num_heads))
        return x + out.reshape(tokens.shape).movedim(-1, 1)


class DepthAttention(nn.Module):
    """Along the first spatial axis at every place of a slice, with rotary positions: any number of slices.

    relative_bias: also a learned bias for each distance, as Med-LSDM has it.
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

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).permute(0, 3, 4, 2, 1)  # (B, H, W, D, C)
        q, k, v = self.qkv(tokens.flatten(0, 2)).chunk(3, dim=-1)  # (B H W, D, heads c)
        q, k = (rotated(part.unflatten(-1, (self.num_heads, -1))).transpose(1, 2) for part in (q, k))
        v = v.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B H W, heads, D, c)
        bias = None
        if self.bias is not None:
            buckets = distance_buckets(x.shape[2], self.num_buckets, x.device)
            bias = self.bias(buckets).permute(2, 0, 1).to(q.dtype)  # (heads, D, D)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
        return x + self.out(out).reshape(tokens.shape).permute(0, 4, 3, 1, 2)


class FactorisedAttention(nn.Module):
    """Slices, then depth. spatial: "linear", "full" or "none" (depth alone)."""

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

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, C, D, H, W); `context` is what other kinds of attention are given."""
        if x.ndim != 5:
            raise ValueError(
                "factorised attention is for volumes; choose model/network=unet_block for images"
            )
        return self.depth(x if self.slices is None else self.slices(x))
