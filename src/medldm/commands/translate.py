"""medldm translate: other modalities of one volume, from the volume alone.

  medldm translate checkpoint=runs/.../best.ckpt source=t1.nii.gz source_modality=t1 \\
      targets=[t2,flair] output=DIR
  medldm translate ... fast=true                  without diffusion: seconds
  medldm translate ... sampler.num_steps=200 sampler.eta=1 seed=3

The source is prepared as the training data were (orientation, crop, percentiles); all targets are made in
one batch, and each is written as <source file>_<source>_to_<target>.nii.gz on the source's own grid, with its
affine. A source whose voxels differ by a fifth along an axis of the body is resampled, an axis that does not
divide is padded, and both are undone; voxels that are not finite become the least finite one. All is logged.
units: an MR contrast has no units of its own. `unit` writes [0, 1], the target's lower and upper percentile
of preparation; `training` the median range of that modality in the training data; `source` the source's.
Keys: targets (null: every other modality), fast, units, sampler.*, weights (ema or raw), seed, device,
precision (auto, bf16-mixed, 32-true), compile.
Also writes provenance.json, with an entry for every image of the folder. Prints the files.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from medldm.build import load_module
from medldm.commands import clean_after_failure, run_command
from medldm.data.case import stem_of
from medldm.data.preparation.volume_transforms import restore_volume
from medldm.data.raw.readers import files_of
from medldm.devices import find_hardware, inference_precision, pick_device
from medldm.diffusion.sampler import check_guidance, override_sampler
from medldm.errors import InputError, told_of
from medldm.files import inside, safe_name, write_json
from medldm.fingerprints import content_of
from medldm.held_out import stages_of
from medldm.locks import one_writer
from medldm.models.protocols import Request
from medldm.outputs import write_nifti
from medldm.sampling import compile_networks, predictor_of
from medldm.schemas import Provenance, read_checked
from medldm.translating import choose_targets, prepare_source, range_in, translate

log = logging.getLogger(__name__)
WAIT = 60.0  # seconds for another translation that writes into the same folder
OUTPUT_UNITS = ("unit", "training", "source")


def load_translator(cfg: Any) -> Any:
    device = pick_device(cfg.device)
    inference_precision(cfg.precision, device)  # names an unknown one before anything is done
    module = load_module(cfg.checkpoint, weights=cfg.weights)
    diffuses = module.conditioner is not None and "source" in module.conditioner.batch_keys
    if module.translation is None and not diffuses:
        raise InputError(f"{cfg.checkpoint}: translates nothing; give one of ALDM's msspade or ldm")
    if cfg.fast and module.translation is None:
        raise InputError("fast=true: the checkpoint has no MS-SPADE; set fast=false")
    sampler = OmegaConf.to_container(cfg.sampler)
    if sampler.pop("guide") is not None:
        raise InputError("sampler.guide: `medldm translate` has no guide; sample with `medldm sample`")
    is_given = any(value is not None for value in sampler.values())
    if cfg.fast and is_given:
        raise InputError("sampler: has no effect with fast=true, which leaves out the diffusion; drop one")
    if diffuses:
        with told_of("sampler"):
            module.sampler = override_sampler(module.sampler, sampler)
            check_guidance(module.sampler, module.conditioner)
    elif is_given:
        raise InputError("sampler: the checkpoint has no diffusion; give one of an ldm experiment")
    module = module.to(device)
    output = predictor_of(module, stage="spade" if cfg.fast else None).output
    compile_networks(module, output, cfg.compile, hardware=find_hardware(device.type))
    return module


@clean_after_failure("output", alone=False)
def task(cfg: Any) -> None:
    if cfg.units not in OUTPUT_UNITS:
        raise InputError(f"units={cfg.units} is none of {', '.join(OUTPUT_UNITS)}")
    module = load_translator(cfg)
    known = module.facts["label_values"]
    given = None if cfg.targets is None else [str(name) for name in cfg.targets]
    targets = choose_targets(known, str(cfg.source_modality), given)
    labels = [known.index(name) for name in targets]
    volume = prepare_source(str(cfg.source), module.facts)
    names = [safe_name(f"{stem_of(cfg.source)}_{cfg.source_modality}_to_{name}") for name in targets]
    x = torch.from_numpy(volume.image).float()[None]
    request = Request(cfg.seed, precision=cfg.precision)
    images = translate(
        module, x, str(cfg.source_modality), targets, names=names, fast=bool(cfg.fast), request=request
    )
    seen = trained_on(str(cfg.source), module, cfg.checkpoint)
    output = Path(cfg.output)
    for name, label, image in zip(names, labels, images.numpy(), strict=True):
        limits = range_in(cfg.units, module.facts, label, volume.intensity_range)
        record = volume.record() | {"intensity_range": list(limits)}
        path = inside(output, f"{name}.nii.gz")
        write_nifti(path, *restore_volume(image, record))
        print(path)
    about = {
        "checkpoint": str(cfg.checkpoint),
        "checkpoint_sha256": module.checkpoint_sha256,
        "source": str(Path(cfg.source).resolve()),
        "source_sha256": content_of(Path(cfg.source), files_of(cfg.source))["sha256"],
        "source_modality": str(cfg.source_modality),
        "targets": targets,
        "fast": bool(cfg.fast),
        "units": cfg.units,
        "weights": cfg.weights,
        "sampler": None if cfg.fast or module.sampler is None else str(module.sampler),
        "seed": cfg.seed,
        "precision": inference_precision(cfg.precision, module.device),
        "torch": torch.__version__,
        **seen,
    }
    path = output / "provenance.json"
    with one_writer(output, wait=WAIT):
        others = read_checked(path, Provenance, "delete it").get("images", {}) if path.is_file() else {}
        write_json(path, about | {"images": others | {f"{name}.nii.gz": about for name in names}})


def trained_on(source: str, module: Any, checkpoint: str) -> dict[str, list[str]]:
    """The subject whose image the source is, if a stage of the checkpoint was trained on it, and the stages
    that do not say: a translation of a training image says little about new ones.
    """
    identity = content_of(Path(source), files_of(source))["sha256"][:16]
    subjects, unrecorded = set(), []
    for stage, record in stages_of(module.description):
        if record is None:
            unrecorded.append(stage)
            continue
        found = [name for name, known in (record["images"] or {}).items() if identity in known]
        if found and not subjects:
            log.warning(
                "%s: the %s of %s was trained on it (subject %s)", source, stage, checkpoint, found[0]
            )
        subjects |= set(found)
    return {"training_subjects": sorted(subjects), "unrecorded_stages": unrecorded}


def main() -> None:
    run_command(task, "translate")


if __name__ == "__main__":
    main()
