"""Embeds attributes of an image as vectors that are added to the embedding of time."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from medldm.attributes import Attribute
from medldm.batch import Batch, expand_as


class ScalarEmbedding(nn.Module):
    """Embeds a number, scaled from `limits` to [-1, 1], by a small network. Its null is a learned vector."""

    def __init__(self, limits: tuple[float, float], embedding_dim: int) -> None:
        super().__init__()
        self.low, self.extent = limits[0], max(limits[1] - limits[0], 1e-6)
        self.layers = scalar_mlp(embedding_dim)
        self.null = nn.Parameter(torch.randn(embedding_dim))

    def forward(self, value: Tensor, drop: Tensor | None = None) -> Tensor:
        """The embeddings (B, E) of values (B,) in the unit of `limits`, NaN where unknown."""
        unknown = value.isnan() if drop is None else value.isnan() | drop
        scaled = 2 * (value.float().nan_to_num(self.low) - self.low) / self.extent - 1
        return torch.where(unknown[:, None], self.null, self.layers(scaled[:, None]))


class CategoryEmbedding(nn.Embedding):
    """Embeds one of K names by a table, whose row 0 is the null: for -1 and for dropped samples."""

    def __init__(self, num_names: int, embedding_dim: int) -> None:
        super().__init__(num_names + 1, embedding_dim)

    def forward(self, number: Tensor, drop: Tensor | None = None) -> Tensor:
        """The embeddings (B, E) of whole numbers (B,) from -1 on."""
        row = number.long() + 1
        return super().forward(row if drop is None else row.masked_fill(drop, 0))

    def several(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """The embeddings (B, E) of `labels` (B, K), marks of the names that hold: the sum of their rows, or
        the null where none holds.
        """
        unknown = labels.sum(1) == 0
        unknown = unknown if drop is None else unknown | drop
        return torch.where(unknown[:, None], self.weight[0], labels.to(self.weight.dtype) @ self.weight[1:])


def embed_attribute(attribute: Attribute, embedding_dim: int) -> nn.Module:
    if attribute.is_scalar:
        return ScalarEmbedding(attribute.limits, embedding_dim)
    return CategoryEmbedding(len(attribute.names), embedding_dim)


def embed_by_name(attributes: Mapping[str, Attribute], embedding_dim: int) -> dict[str, nn.Module]:
    return {name: embed_attribute(attribute, embedding_dim) for name, attribute in attributes.items()}


def unknown_values(attribute_embedding: nn.Module, batch: Batch) -> Tensor:
    """(B,) unknown values, for a batch without this attribute, on the device of that batch."""
    reference = next(value for value in batch.values() if isinstance(value, Tensor))
    value = torch.nan if isinstance(attribute_embedding, ScalarEmbedding) else -1.0
    return torch.full((len(reference),), value, device=reference.device)


def scalar_mlp(embedding_dim: int) -> nn.Module:
    return nn.Sequential(nn.Linear(1, embedding_dim), nn.SiLU(), nn.Linear(embedding_dim, embedding_dim))


def keep(x: Tensor, drop: Tensor | None) -> Tensor:
    """`x` with the dropped samples (B,) set to zero."""
    return x if drop is None else x.masked_fill(expand_as(drop, x), 0)
