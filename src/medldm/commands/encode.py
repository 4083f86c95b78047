"""medldm encode: cache the latents of a whole prepared dataset, so that stage two never touches images.

  medldm encode checkpoint=runs/.../best.ckpt data.root=DATA

The checkpoint is of an autoencoder, or of a translator that holds one.
Writes DATA/latents/<first 12 digits of the autoencoder's sha256>/<case>.h5 with the latents before
quantisation (float16), and latents.json when all are there. Run it again to continue. tile=96 encodes
volumes in tiles, with the same result in less memory. Then: medldm train experiment=.../ldm
data.latents=auto.
"""

import logging
from pathlib import Path
from typing import Any

from medldm.commands import run_command
from medldm.errors import InputError

log = logging.getLogger(__name__)


def encode_case(
    module: Any, dataset: Any, positions: list[int], batch_size: int, device: Any, tile: int | None = None
) -> Any:
    """(N, Cz, *s) float16 latents of a case's items in order."""
    import numpy as np
    import torch

    from medldm.inference import autocast, case_batches, to_device
    from medldm.networks.tiling import TiledAutoencoder

    encode = module.autoencoder.encode
    if tile is not None:
        encode = TiledAutoencoder(module.autoencoder, tile).encode
    parts = []
    with torch.no_grad(), autocast(device):
        for batch in case_batches(dataset, positions, batch_size):
            parts.append(encode(to_device(batch, device)["image"]).float().cpu().numpy())
    latents = np.concatenate(parts)
    if not np.isfinite(latents).all() or np.abs(latents).max() > np.finfo(np.float16).max:
        raise InputError(
            "checkpoint: its latents do not fit float16; the autoencoder has diverged, train it again"
        )
    return latents.astype(np.float16)


def task(cfg: Any) -> None:
    import h5py
    from omegaconf import OmegaConf
    from rich.progress import track

    from medldm.checkpoints import latents_name, load_module, sha256
    from medldm.data import build_datamodule
    from medldm.files import replacing, write_json
    from medldm.inference import items_by_case, pick_device

    checkpoint = str(cfg.checkpoint)
    module = load_module(checkpoint)
    if not hasattr(module, "autoencoder"):
        raise InputError(f"{checkpoint}: not an autoencoder; `medldm encode` takes a stage-one checkpoint")
    if getattr(module, "reconstructs", "image") == "mask":
        raise InputError(f"{checkpoint}: encodes class maps; `medldm encode` takes an autoencoder of images")
    data = OmegaConf.to_container(cfg.data, resolve=True) | {
        "latents": None,
        "crop_size": None,
        "views": None,
        "pairs": None,
    }
    datamodule = build_datamodule(data, keys=("image",), seed=cfg.seed)
    dataset = datamodule.dataset("all")
    folder = Path(data["root"]) / "latents" / latents_name(checkpoint)
    device = pick_device(cfg.device)
    module.to(device)
    cases = items_by_case(dataset.items)
    for case, positions in track(cases.items(), "encoding", total=len(cases)):
        path = folder / f"{dataset.cases[case]['id']}.h5"
        if path.is_file():
            continue
        latents = encode_case(module, dataset, positions, data["batch_size"], device, cfg.tile)
        with replacing(path) as aside, h5py.File(aside, "w") as file:
            file.create_dataset("latents", data=latents, chunks=(1, *latents.shape[1:]))
    facts = {"checkpoint": checkpoint, "checkpoint_sha256": sha256(checkpoint), "num_cases": len(cases)}
    facts |= {"latent": "prequant", "dtype": "float16", "downsampling": list(module.autoencoder.downsampling)}
    write_json(folder / "latents.json", facts)
    print(folder)


def main() -> None:
    run_command(task, "encode", __doc__)


if __name__ == "__main__":
    main()
