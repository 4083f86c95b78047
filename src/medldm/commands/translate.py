"""medldm translate: other modalities of one volume, from the volume alone.

  medldm translate checkpoint=runs/.../best.ckpt source=t1.nii.gz source_modality=t1 \\
      targets=[t2,flair] output=DIR
  medldm translate ... fast=true                  without diffusion: seconds
  medldm translate ... sampler.num_steps=200 sampler.eta=1 seed=3

The source is prepared as the training data were (orientation, crop, percentiles); all targets are made in
one batch, and each is written as <source file>_<source>_to_<target>.nii.gz on the source's own grid, with its
affine. A source whose voxels differ by a fifth along an axis of the body is resampled, an axis that does not
divide is padded, and both are undone; voxels that are not finite become the least finite value. What was done
is said.
units: an MR contrast has no units of its own. `unit` writes [0, 1], the target's lower and upper percentile
of preparation; `training` the median range of that modality in the training data; `source` the source's.
Keys: targets (null: every other modality), fast, units, sampler.*, weights (ema or raw), seed, device,
precision (auto, bf16-mixed, 32-true).
Also writes provenance.json, with an entry for every image of the folder. Prints the files.
"""

import logging
from pathlib import Path
from typing import Any

from medldm.commands import clean_after_failure, run_command
from medldm.errors import InputError

log = logging.getLogger(__name__)
UNITS = ("unit", "training", "source")
SPACING_TOLERANCE = 0.2  # relative: beyond it the source is resampled to the voxels of training
SPACING_NOTED = 0.02  # beyond it the difference is said


def choose_targets(known: list[str] | None, source: str, targets: list[str] | None) -> list[str]:
    """The modalities to make. InputError for a name that the checkpoint does not know."""
    if not known:
        raise InputError("checkpoint: knows no modalities; give one of an msspade or ldm experiment of ALDM")
    for key, names in (("source_modality", [source]), ("targets", targets or [])):
        for name in names:
            if name not in known:
                raise InputError(
                    f"{key}: '{name}' is none of the checkpoint's modalities, {', '.join(known)}"
                )
    if targets is None:
        return [name for name in known if name != source]
    if not targets or source in targets or len(set(targets)) < len(targets):
        raise InputError(
            f"targets={targets}: name other modalities than {source}, each once, or null for all of them"
        )
    return list(targets)


def prepare_source(path: str, facts: dict[str, Any]) -> Any:
    """The source as the training data were prepared: a `Volume`."""
    import dataclasses

    import numpy as np

    from medldm.data.case import Case
    from medldm.data.preparation.recipe import recipe_of
    from medldm.data.preparation.volumes import prepare_case, read_volume

    recipe = recipe_of(facts)
    if recipe.spacing is None and recipe.in_plane_size is None and facts["spacing"]:
        raw, trained = spacing_along(read_volume(path).affine, recipe.orientation), facts["spacing"]
        apart = float(np.abs(np.divide(raw, trained) - 1).max())
        about = (path, millimetres(raw), millimetres(trained), recipe.orientation)
        if apart > SPACING_TOLERANCE:
            log.warning("%s: voxels of %s mm; resampled to those of training, %s mm (axes %s)", *about)
            recipe = dataclasses.replace(recipe, spacing=tuple(trained))
        elif apart > SPACING_NOTED:
            log.warning("%s: voxels of %s mm, in training %s mm (axes %s); taken as they are", *about)
    return prepare_case(Case("source", "source", {"image": path}), recipe)


def spacing_along(affine: Any, orientation: str) -> list[float]:
    """mm of a voxel along the body's axes, in the order of the prepared array, such as S, P and L."""
    from medldm.data.preparation.volume_transforms import axis_order
    from medldm.data.raw.grids import edges_of

    return edges_of(affine)[axis_order(affine, orientation)].tolist()


def millimetres(spacing: Any) -> str:
    return " x ".join(f"{s:.3g}" for s in spacing)


def padded(x: Any, multiples: tuple[int, ...]) -> Any:
    """(1, C, *S) with background at the ends of its axes, up to the next multiples."""
    import torch.nn.functional as F

    pads = [(-n) % m for n, m in zip(x.shape[2:], multiples, strict=True)]
    return F.pad(x, [p for pad in reversed(pads) for p in (0, pad)], value=-1.0)


def translate(module: Any, x: Any, labels: list[int], source_label: int, names: list[str], cfg: Any) -> Any:
    """(1, 1, *S) in [-1, 1] -> (K, 1, *S) float32 on the host, one for each label, as one batch."""
    import torch

    from medldm.sampling import Request, predictor_of

    predictor = predictor_of(module, stage="spade" if cfg.fast else None)
    factors = module.size_factors if predictor.is_generative else module.translation.downsampling
    size = tuple(x.shape[2:])
    x = padded(x, factors).to(module.device)
    batch = {
        "case_id": names,
        "source": x.expand(len(labels), -1, -1, -1, -1),
        "label": torch.tensor(labels, device=module.device),
        "source_label": torch.full((len(labels),), source_label, device=module.device),
    }
    images = predictor(batch, tuple(x.shape[2:]), Request(cfg.seed, precision=cfg.precision))
    return images[..., : size[0], : size[1], : size[2]]


def range_in(units: str, facts: dict[str, Any], target: int, own: tuple[float, float]) -> tuple[float, float]:
    """Lower and upper intensity of what is written."""
    if units == "training":
        return tuple(facts["intensity_ranges"][target])
    return own if units == "source" else (0.0, 1.0)


def load_translator(cfg: Any) -> Any:
    from omegaconf import OmegaConf

    from medldm.build import load_module
    from medldm.devices import inference_precision, pick_device
    from medldm.diffusion.sampler import check_guidance, override_sampler

    device = pick_device(cfg.device)
    inference_precision(cfg.precision, device)  # names an unknown one before anything is done
    module = load_module(cfg.checkpoint, weights=cfg.weights)
    diffuses = module.conditioner is not None and "source" in module.conditioner.batch_keys
    if module.translation is None and not diffuses:
        raise InputError(f"{cfg.checkpoint}: translates nothing; give one of ALDM's msspade or ldm")
    if cfg.fast and module.translation is None:
        raise InputError("fast=true: the checkpoint has no MS-SPADE; set fast=false")
    sampler = OmegaConf.to_container(cfg.sampler)
    is_given = any(value is not None for value in sampler.values())
    if cfg.fast and is_given:
        raise InputError("sampler: has no effect with fast=true, which leaves out the diffusion; drop one")
    if diffuses:
        module.sampler = override_sampler(module.sampler, sampler)
        check_guidance(module.sampler, module.conditioner)
    elif is_given:
        raise InputError("sampler: the checkpoint has no diffusion; give one of an ldm experiment")
    return module.to(device)


@clean_after_failure("output")
def task(cfg: Any) -> None:
    import torch

    from medldm.data.case import stem_of
    from medldm.data.preparation.volume_transforms import restore_volume
    from medldm.data.raw.readers import files_of
    from medldm.devices import inference_precision
    from medldm.files import read_json, safe_name, write_json
    from medldm.fingerprints import content_of
    from medldm.outputs import write_nifti

    if cfg.units not in UNITS:
        raise InputError(f"units={cfg.units} is none of {', '.join(UNITS)}")
    module = load_translator(cfg)
    known = module.facts["label_values"]
    given = None if cfg.targets is None else [str(name) for name in cfg.targets]
    targets = choose_targets(known, str(cfg.source_modality), given)
    labels = [known.index(name) for name in targets]
    volume = prepare_source(str(cfg.source), module.facts)
    names = [safe_name(f"{stem_of(cfg.source)}_{cfg.source_modality}_to_{name}") for name in targets]
    x = torch.from_numpy(volume.image).float()[None]
    images = translate(module, x, labels, known.index(cfg.source_modality), names, cfg)
    seen = trained_on(str(cfg.source), module, cfg.checkpoint)
    output = Path(cfg.output)
    for name, label, image in zip(names, labels, images.numpy(), strict=True):
        limits = range_in(cfg.units, module.facts, label, volume.intensity_range)
        record = volume.record() | {"intensity_range": list(limits)}
        path = output / f"{name}.nii.gz"
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
    others = read_json(path, "delete it").get("images", {}) if path.is_file() else {}
    write_json(path, about | {"images": others | {f"{name}.nii.gz": about for name in names}})


def trained_on(source: str, module: Any, checkpoint: str) -> dict[str, list[str]]:
    """The subject whose image the source is, if a stage of the checkpoint was trained on it, and the stages
    that do not say: a translation of a training image says little about new ones.
    """
    from medldm.data.raw.readers import files_of
    from medldm.fingerprints import content_of
    from medldm.held_out import stages_of

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
