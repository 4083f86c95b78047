"""The condition of diffusion between modalities: the latent of the source, its translation, and the target's
class.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medldm.batch import Batch, check_stated
from medldm.diffusion.condition import Condition, fixed_drop, require
from medldm.diffusion.embeddings import keep

CONDITION_LATENTS = ("source", "spade")
LABELS = ("embedding", "token", "none")


class TranslationConditioner(nn.Module):
    """Concatenates latents in the order of `latents`: "source" is the latent of the source, which later
    releases of ALDM use, and "spade" its translation by the MS-SPADE of the first stage, which alone is in
    the paper.

    `label` says how the class of the target enters: as an "embedding" that is added to that of time; as a
    "token", a one-hot vector that is the only token of cross-attention (softmax over one key is 1, so that
    each layer learns a shift); or "none". The groups that can be dropped are "latents" (to zero, their mean)
    and "label" (to zero), both with `drop_all_prob`. The builder gives what data and first stage decide;
    further facts of the data are accepted and not used.
    """

    is_of_modalities = True
    spade_channels = 0

    def __init__(
        self,
        num_classes: int | None = None,
        *,
        latent_channels: int,
        num_labels: int,
        embedding_dim: int,
        latents: Sequence[str] = ("source", "spade"),
        label: str = "embedding",
        drop_all_prob: float = 0.0,
        **derived,
    ) -> None:
        super().__init__()
        unknown = [name for name in latents if name not in CONDITION_LATENTS]
        if unknown or not latents:
            raise ValueError(f"latents={list(latents)}: name one or both of source, spade")
        if label not in LABELS:
            raise ValueError(f"label={label} is none of {', '.join(LABELS)}")
        if not 0 <= drop_all_prob <= 1:
            raise ValueError(f"drop_all_prob={drop_all_prob} must lie in [0, 1]")
        self.latents, self.num_labels, self.drop_all_prob = tuple(latents), num_labels, drop_all_prob
        self.concat_channels = len(self.latents) * latent_channels
        self.embedding_dim = embedding_dim if label == "embedding" else 0
        self.context_dim = num_labels if label == "token" else 0
        self.embedding = nn.Embedding(num_labels, embedding_dim) if self.embedding_dim else None
        self.groups = ("latents",) if label == "none" else ("latents", "label")

    batch_keys = ("source",)
    attributes = ("label",)
    null_attributes = ()  # a translator has no null

    @property
    def dropped_groups(self) -> tuple[str, ...]:
        return self.groups if self.drop_all_prob else ()

    @property
    def trains_null(self) -> bool:
        return self.drop_all_prob > 0

    def sample_drop(
        self, batch_size: int, generator: torch.Generator | None = None, device: torch.device | None = None
    ) -> Tensor:
        """(B, len(groups)) bool, drawn at random: the samples of a training batch that lose everything."""
        u = torch.rand(batch_size, generator=generator, device=device)
        return (u < self.drop_all_prob)[:, None].expand(-1, len(self.groups))

    def drop_groups(
        self, batch_size: int, names: tuple[str, ...] | None = None, device: torch.device | None = None
    ) -> Tensor:
        """(B, len(groups)) bool that drops `names` for every sample. None drops all, which is the null of
        guidance.
        """
        return fixed_drop(self.groups, batch_size, names, device)

    def forward(
        self, batch: Batch, first_stage: nn.Module | None = None, drop: Tensor | None = None
    ) -> Condition:
        dropped = {} if drop is None else dict(zip(self.groups, drop.unbind(1), strict=True))
        label, dropped_label = require(batch, "label").long(), dropped.get("label")
        check_stated(label)
        embedding = context = None
        if self.embedding is not None:
            embedding = keep(self.embedding(label), dropped_label)
        if self.context_dim:
            context = keep(F.one_hot(label, self.num_labels).float(), dropped_label)[:, None]  # (B, 1, K)
        concat = keep(self.latent_planes(batch, first_stage, label), dropped.get("latents"))
        return Condition(concat=concat, embedding=embedding, context=context)

    def latent_planes(self, batch: Batch, first_stage: nn.Module, label: Tensor) -> Tensor:
        """(B, concat_channels, *s) The latents that are concatenated to z_t."""
        if "source_latent" in batch:
            source = first_stage.normalize(batch["source_latent"])
        else:
            source = first_stage.encode(require(batch, "source"))
        planes = {"source": source}
        if "spade" in self.latents:
            planes["spade"] = first_stage.translate(source, label)
        return torch.cat([planes[name] for name in self.latents], dim=1)
