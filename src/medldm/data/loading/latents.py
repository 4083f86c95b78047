"""Whether the latent cache of `medldm encode` beside the prepared cases is whole, and of these images."""

import logging
import shlex
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np

from medldm.data.loading.dataset import array_digests
from medldm.errors import InputError
from medldm.files import inside, replacing, writing_hdf5
from medldm.fingerprints import array_digest

log = logging.getLogger(__name__)


def encode_command(checkpoint: str | Path | None, root: str | Path, spatial_dims: int | None) -> str:
    """The command that makes or renews a cache, for messages."""
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


def reason_to_encode(path: Path, image: str | None) -> str | None:
    """Why the latents of a case must be made, None where those that stand are of this image; `image` is its
    digest, None where an older medldm prepared it: then whatever stands is taken.
    """
    if not path.is_file():
        return "not there yet"
    try:
        with h5py.File(path, "r") as file:
            stated = file.attrs.get("image_digest")
    except OSError:
        return "damaged"
    if image is None or stated == image:
        return None
    return "of images as prepared before" if stated else "of unknown images (an older medldm made them)"


def num_left(folder: Path, images: Mapping[str, str | None]) -> int:
    """How many of the cases, by their names and the digests of their images, lack latents."""
    return sum(reason_to_encode(inside(folder, f"{n}.h5"), image) is not None for n, image in images.items())


def write_latents(path: Path, latents: np.ndarray, encoder: str, image: str | None) -> None:
    """One case's file; `image` is the digest of the image that was encoded, where it is known."""
    with replacing(path) as aside, writing_hdf5(aside) as file:
        file.create_dataset("latents", data=latents, chunks=(1, *latents.shape[1:]))
        file.attrs.update(encoder_sha256=encoder, latents_digest=array_digest(latents))
        if image is not None:
            file.attrs["image_digest"] = image
