"""Finds the cache of latents that a second stage trains from."""

import logging
from pathlib import Path
from typing import Any

from medldm.checkpoints import encoder_sha256, latents_name
from medldm.data.loading.latents import encode_command
from medldm.errors import InputError
from medldm.schemas import Latents, read_checked

log = logging.getLogger(__name__)


def cache_of(model: dict[str, Any], resumed: dict[str, Any] | None) -> str | None:
    """The name of the cache that belongs to the encoder: to that of a resumed checkpoint's own first stage,
    wherever its file is now, or else of `model.first_stage.checkpoint`.
    """
    if resumed is not None:
        return encoder_sha256(resumed, resumed["sha256"])[:12]
    checkpoint = Path(model["first_stage"]["checkpoint"])
    return latents_name(checkpoint) if checkpoint.is_file() else None


def find_latents(data: dict[str, Any], model: dict[str, Any], resumed: dict[str, Any] | None) -> str | None:
    """The name of the latent cache. `auto` takes the one that `medldm encode` made with this encoder, if
    there is one. InputError where the cache is of another encoder, or encoding has not finished.
    """
    name = data.get("latents")
    checkpoint = model.get("first_stage", {}).get("checkpoint")
    if name is None or checkpoint is None:
        return None
    expected = cache_of(model, resumed)
    folder = Path(data["root"]) / "latents" / (expected if name == "auto" and expected else name)
    mend = f"run `{encode_command(checkpoint, data['root'], data.get('spatial_dims'))}` to its end"
    if name == "auto" and not folder.is_dir():
        log.warning("data.latents=auto: no cache of %s; every batch is encoded", checkpoint)
        return None
    facts = read_checked(folder / "latents.json", Latents, f"{mend}, or set data.latents=null")
    made_with = facts.get("encoder_sha256") or folder.name  # an older medldm states it in the name alone
    if expected is not None and made_with[:12] != expected:
        raise InputError(
            f"data.latents={name}: made with another autoencoder than {checkpoint}; set data.latents=auto"
        )
    return folder.name
