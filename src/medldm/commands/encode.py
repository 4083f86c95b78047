"""medldm encode: cache the latents of a whole prepared dataset, so that stage two never touches images.

  medldm encode checkpoint=runs/.../best.ckpt data.root=DATA

The checkpoint is of an autoencoder, or of a translator that holds one.
Writes DATA/latents/<first 12 digits of the autoencoder's sha256>/<case>.h5 with the latents before
quantisation (float16), and latents.json when all are there. Run it again to continue, or to renew those
whose images were prepared again. tile=96 encodes volumes in tiles, with the same result in less memory.
audit=16 images are decoded and encoded again: how much of each channel's variance survives stands in
latents.json, and what does not is noise to stage two.
shard=2/4 encodes the second quarter of the cases (array, tasks: by the element of a SLURM array, the task of
srun -n); the last share to end writes latents.json.
Then: medldm train experiment=.../ldm data.latents=auto.
"""

import logging
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from medldm.asked import refuse_other_recipe
from medldm.auditing import audit_latents, earlier_audit
from medldm.build import load_module
from medldm.checkpoints import encoder_sha256
from medldm.commands import run_command
from medldm.data import build_datamodule
from medldm.data.loading.dataset import CaseDataset, array_digests
from medldm.data.loading.latents import num_left, reason_to_encode, write_latents
from medldm.devices import inference_precision, pick_device
from medldm.errors import InputError
from medldm.files import inside, nothing_empty, write_json
from medldm.held_out import check_held_out, seen_subjects
from medldm.inference import autocast, case_batches, items_by_case, to_device
from medldm.locks import one_writer
from medldm.models.common import TrainedModule
from medldm.networks.tiling import TiledAutoencoder
from medldm.overrides import typed_overrides
from medldm.progress import tracked
from medldm.shards import read_shard

log = logging.getLogger(__name__)


def encode_case(
    module: TrainedModule,
    dataset: CaseDataset,
    positions: list[int],
    batch_size: int,
    device: torch.device,
    tile: int | None = None,
    precision: str = "auto",
) -> np.ndarray:
    """(N, Cz, *s) float16 latents of a case's items in order."""
    autoencoder = module.autoencoder
    encode = (autoencoder if tile is None else TiledAutoencoder(autoencoder, tile)).encode
    with torch.no_grad(), autocast(device, precision):
        batches = case_batches(dataset, positions, batch_size)
        parts = [encode(to_device(batch, device)["image"]).float().cpu().numpy() for batch in batches]
    latents = np.concatenate(parts)
    if not np.isfinite(latents).all() or np.abs(latents).max() > np.finfo(np.float16).max:
        raise InputError("checkpoint: its latents do not fit float16; it has diverged, train it again")
    return latents.astype(np.float16)


def pending_cases(dataset: CaseDataset, cases: dict[int, list[int]], folder: Path) -> dict[int, list[int]]:
    """The cases whose latents are missing, or are of other images. The log tells what is renewed."""
    entries = {case: dataset.cases[case] for case in cases}
    if not all(array_digests(entry) for entry in entries.values()):
        log.warning(
            "%s: prepared by an older medldm, which did not record what the cases hold; latents are kept by "
            "the cases' names",
            dataset.root,
        )
    paths = {case: inside(folder, f"{entry['id']}.h5") for case, entry in entries.items()}
    images = {case: array_digests(entry).get("image") for case, entry in entries.items()}
    why = {case: reason_to_encode(path, images[case]) for case, path in paths.items()}
    reasons = Counter(reason for case, reason in why.items() if reason and paths[case].is_file())
    for reason, count in reasons.items():
        log.warning("%s: %d of %d renewed, %s", folder, count, len(cases), reason)
    pending = {case: positions for case, positions in cases.items() if why[case]}
    if pending:  # latents.json speaks of a whole cache
        (folder / "latents.json").unlink(missing_ok=True)
    return pending


def check_encoder(module: TrainedModule, checkpoint: str) -> None:
    """InputError where the checkpoint's model encodes no images."""
    if module.encodes != "image":
        what = "not an autoencoder" if module.encodes is None else "encodes class maps"
        raise InputError(f"{checkpoint}: {what}; `medldm encode` takes an autoencoder of images")


def task(cfg: DictConfig) -> None:
    checkpoint, device = str(cfg.checkpoint), pick_device(cfg.device)
    inference_precision(cfg.precision, device)  # names an unknown one before anything is done
    module = load_module(checkpoint)
    check_encoder(module, checkpoint)
    whole_images = {"latents": None, "crop_size": None, "views": None, "pairs": None}
    data = OmegaConf.to_container(cfg.data, resolve=True) | whole_images
    datamodule = build_datamodule(data, keys=("image",), seed=cfg.seed)
    refuse_other_recipe(cfg.data, datamodule.index, typed_overrides() or ())
    dataset = datamodule.dataset("all")
    seen = seen_subjects(module.description, datamodule.index)
    check_held_out(seen, datamodule.subjects["test"], checkpoint, "test", allow=True, key="checkpoint")
    encoder = encoder_sha256(module.description, module.checkpoint_sha256)
    folder = inside(Path(data["root"]), "latents", encoder[:12], "latents.json").parent
    module.to(device)
    with nothing_empty(folder), one_writer(folder, share=read_shard(cfg.shard)):
        encode_pending(cfg, module, dataset, folder, encoder)
    print(folder)


def encode_pending(
    cfg: DictConfig, module: TrainedModule, dataset: CaseDataset, folder: Path, encoder: str
) -> None:
    """What the cache lacks of this share; once all is there, latents.json. `encoder`: its sha256."""
    precision, batch_size = inference_precision(cfg.precision, module.device), cfg.data.batch_size
    cases = items_by_case(dataset.items)
    images = {case: array_digests(dataset.cases[case]).get("image") for case in cases}
    shard = read_shard(cfg.shard)
    own = cases if shard is None else dict(shard.part(list(cases.items())))
    pending = pending_cases(dataset, own, folder)
    for case, positions in tracked(pending.items(), "encoding"):
        latents = encode_case(module, dataset, positions, batch_size, module.device, cfg.tile, precision)
        write_latents(inside(folder, f"{dataset.cases[case]['id']}.h5"), latents, encoder, images[case])
    names = {dataset.cases[case]["id"]: image for case, image in images.items()}
    if shard is not None and (left := num_left(folder, names)):
        log.info("%s: %d of %d cases are left to other shares", folder, left, len(cases))
        return
    facts = {
        "checkpoint": str(cfg.checkpoint), "checkpoint_sha256": module.checkpoint_sha256,
        "encoder_sha256": encoder, "num_cases": len(cases), "cases": names, "audit": earlier_audit(folder),
        "latent": "prequant", "dtype": "float16", "precision": precision,
        "downsampling": list(module.autoencoder.downsampling),
    }  # fmt: skip
    if pending or facts["audit"] is None:
        facts["audit"] = audit_latents(module, dataset, cfg.audit, tile=cfg.tile, precision=precision)
    write_json(folder / "latents.json", facts)


def main() -> None:
    run_command(task, "encode")


if __name__ == "__main__":
    main()
