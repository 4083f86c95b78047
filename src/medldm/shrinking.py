"""The narrow networks that `debug=tiny` trains."""

from collections.abc import Mapping
from typing import Any

TINY_WIDTH = 16
NARROWED = [
    f"{part}_channels" for part in ("stem", "mid", "hidden", "middle", "encoder", "decoder", "spade_hidden")
]
# The largest value that a key keeps. Eight norm groups leave two channels in each: one alone cannot be
# normalised on a grid of one voxel.
LIMITS = {
    "embedding_channels": 32, "sinusoidal_channels": 16, "num_codes": 64, "num_heads": 2, "head_channels": 8,
    "start": 1, "ramp": 0, "warmup_steps": 0, "num_mid_units": 1, "num_res_blocks": 1, "num_blocks": 1,
    "num_features": 16, "norm_groups": 8,
}  # fmt: skip


def narrow(key: str, value: Any) -> Any:
    """The value of a key of a model's config, made small where it is a size."""
    if isinstance(value, Mapping):
        return {k: narrow(k, v) for k, v in value.items()}
    if key in ("channels", "up_channels") and isinstance(value, list):
        return [TINY_WIDTH] * len(value)
    if key in NARROWED and value:
        return TINY_WIDTH
    if key in LIMITS and value is not None:
        return [LIMITS[key]] * len(value) if isinstance(value, list) else min(value, LIMITS[key])
    return value


def shrink(model: Mapping[str, Any]) -> dict[str, Any]:
    """The config of the same model with narrow networks. Only sizes change, never the parts."""
    small = {key: narrow(key, value) for key, value in model.items()}
    for part in (small, small.get("objective") or {}):
        if part.get("perceptual"):
            part["perceptual"]["network"] = "random_conv"  # needs no weights
    if "first_stage" in small:  # its latents of a few voxels leave no room for more
        for part in (small.get("discriminators") or {}).values():
            part |= {"channels": part["channels"][:1], "strides": part["strides"][:1]}
    if small.get("sampler"):
        small["sampler"]["num_steps"] = 2
    return small
