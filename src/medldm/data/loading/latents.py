"""The latent cache of `medldm encode` beside the prepared cases: is it whole, and of these images?"""

import logging
import shlex
from pathlib import Path

from medldm.data.loading.dataset import array_digests
from medldm.errors import InputError

log = logging.getLogger(__name__)


def encode_command(checkpoint: str | Path | None, root: str | Path, spatial_dims: int | None) -> str:
    """What makes or renews a cache, for messages."""
    words = ["medldm", "encode", f"checkpoint={checkpoint}", f"data.root={root}"]
    return shlex.join([*words, *(["data.spatial_dims=3"] if spatial_dims == 3 else [])])


def check_latents(folder: Path, facts: dict, index: dict) -> None:
    """`facts` is the folder's latents.json. InputError where the cache lacks cases of the index, or was made
    from other images than those that the index speaks of.
    """
    mend = (
        f"run `{encode_command(facts.get('checkpoint', 'CKPT'), folder.parents[1], index['spatial_dims'])}`"
    )
    images = {case["id"]: array_digests(case).get("image") for case in index["cases"]}
    cached = facts.get("cases")
    if cached is None and any(images.values()):
        raise InputError(f"{folder}: does not say which images it was made from; {mend}")
    if cached is None:
        log.warning(
            "%s: an older medldm did not record which images it was made from; taken as it lies", folder
        )
        return
    missing = [case for case in images if case not in cached]
    if missing:
        raise InputError(f"{folder}: incomplete, lacks case {missing[0]}; {mend}")
    stale = [case for case, image in images.items() if image is not None and cached[case] != image]
    if stale:
        raise InputError(
            f"{folder}: {len(stale)} of {len(images)} cases ({stale[0]}, ...) were prepared anew "
            f"since it was made; {mend}"
        )
