"""Batches of pairs and narrow translation models, made without data."""

from functools import partial
from typing import Any

import torch

from medldm.shrinking import shrink
from tests.helpers import compose_config

K = 3
FACTS_3D = {
    "spatial_dims": 3,
    "image_channels": 1,
    "num_classes": None,
    "num_views": None,
    "num_phases": None,
    "num_labels": K,
    "label_values": ["t1", "t2", "pd"],
}
VQGAN, MSSPADE, LDM, JOINT = (
    f"experiment=aldm/brats_{name}" for name in ("vqgan", "msspade", "ldm", "joint")
)


def make_pairs(count: int, size: int = 2, edge: int = 16) -> list[dict[str, Any]]:
    """Random pairs: the target's class is never the source's."""
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randint, generator=generator)
    batches = []
    for _ in range(count):
        label = draw(0, K, (size,))
        images = [torch.rand(size, 1, edge, edge, edge, generator=generator) * 2 - 1 for _ in range(2)]
        batches.append(
            {
                "image": images[0],
                "source": images[1],
                "label": label,
                "source_label": (label + draw(1, K, (size,))) % K,
                "case_id": [f"s{i}" for i in range(size)],
            }
        )
    return batches


def model_config(*overrides: str) -> dict[str, Any]:
    from omegaconf import OmegaConf

    cfg = compose_config("train", "debug=tiny", *overrides)
    return shrink(OmegaConf.to_container(cfg.model, resolve=True))


def describe_stage(
    *overrides: str, first_stage: dict | None = None, sha256: str = "0" * 64
) -> dict[str, Any]:
    """A description as a checkpoint of this experiment holds it."""
    model = model_config(*overrides)
    description = {"format": 1, "stage": model["kind"], "model": model, "facts": FACTS_3D, "sha256": sha256}
    return description | ({"first_stage": first_stage} if first_stage else {})


def build_stage(*overrides: str, first_stage: dict, seed: int = 0) -> Any:
    """The narrow module of an experiment on fresh earlier stages."""
    from medldm.build import build_module

    torch.manual_seed(seed)
    return build_module(model_config(*overrides), FACTS_3D, first_stage)
