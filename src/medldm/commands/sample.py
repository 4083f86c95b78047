"""medldm sample: write generated images for the conditions of a prepared dataset.

  medldm sample checkpoint=runs/.../best.ckpt data.root=DATA output=DIR split=test
  medldm sample ... sampler.num_steps=50 sampler.guidance_scale=2 num_samples=4 drop=[edges] seed=1

Of a translation model (ALDM) it writes every ordered pair of the split, <subject>_<source>_to_<target>;
stage=spade leaves out the diffusion, stage=autoencoder writes the targets' reconstructions.
With a stage-one checkpoint it writes that autoencoder's reconstructions instead: the ceiling of stage two;
with a regression checkpoint the predictions of every pair (data.pair_labels=[[t1,t2]]) as
<subject>_<source>_to_<target>.
Keys: split (train, val, test, all), num_samples, sampler.{kind,num_steps,guidance_scale,eta,...}, drop,
edge_level, limit, max_slices, weights (ema or raw), data.batch_size, seed.
Volumes larger than those of training: windows.size=[32,256,256] (voxels; null: a whole axis) denoises in
overlapping windows, tile=64 decodes in tiles with the same result.
trajectory=20 also writes that many steps of each case as a GIF; interpolate.count=5 writes volumes between
each two neighbouring cases instead.
Writes per case HDF5 with the conditions (3D also NIfTI on the source's grid and in its units), 8-bit PNGs
and provenance.json. Run it again to continue.
"""

import logging
from pathlib import Path
from typing import Any

from medldm.commands import run_command
from medldm.errors import InputError

log = logging.getLogger(__name__)


STAGES = ("spade", "autoencoder")  # of a translation model, before its diffusion


def check_stage(module: Any, stage: str | None) -> str | None:
    """What is sampled of a translation model: null is its diffusion where it has one, else `spade`."""
    from medldm.models.translation import TranslationModule

    if stage not in (None, *STAGES):
        raise InputError(f"stage={stage} is none of null, {', '.join(STAGES)}")
    if isinstance(module, TranslationModule):
        return stage or "spade"
    if stage is not None and getattr(getattr(module, "first_stage", None), "translator", None) is None:
        raise InputError(f"stage={stage}: the checkpoint translates nothing; set it to null")
    return stage


def model_keys(module: Any, stage: str | None = None) -> tuple[str, ...]:
    """What a batch must hold: the conditions, the image of an autoencoder, the source of a regression."""
    from medldm.models.autoencoder import AutoencoderModule
    from medldm.models.segmentation import RegressionModule, SegmentationModule

    if isinstance(module, SegmentationModule):
        raise InputError("checkpoint: holds a segmenter; `medldm evaluate segmenter=CKPT` takes it")
    if stage is not None:
        return ("source", "image") if stage == "autoencoder" else ("source",)
    if isinstance(module, RegressionModule):
        return ("source",)
    if isinstance(module, AutoencoderModule):
        if module.reconstructs == "mask":
            raise InputError("checkpoint: reconstructs class maps; `medldm sample` takes models of images")
        return ("image",) if module.autoencoder.decoder_map_channels is None else ("image", "mask")
    conditioner = module.conditioner
    if hasattr(conditioner, "latents"):
        return ("source",)
    wanted = {
        "mask": getattr(conditioner, "use_mask", False),
        "edges": getattr(conditioner, "use_edges", False),
    }
    return tuple(key for key, is_used in wanted.items() if is_used) or ("image",)


def generate(module: Any, batch: dict, image_size: tuple[int, ...], options: dict[str, Any]) -> Any:
    """(B, C, *S) float32 in [-1, 1] on the host: samples, or an autoencoder's reconstructions."""
    import torch

    from medldm.inference import autocast, to_device
    from medldm.models.autoencoder import AutoencoderModule
    from medldm.models.segmentation import RegressionModule

    batch = to_device(batch, module.device)
    with torch.no_grad(), autocast(module.device):
        if isinstance(module, AutoencoderModule):
            images = reconstruct(module, batch, options["tile"])
        elif isinstance(module, RegressionModule):
            images = module(batch["source"])
        elif options["stage"] is not None:
            images = stage_output(module, batch, options["stage"], options["tile"])
        else:
            if options["tile"] is not None:
                module.first_stage.tile = options["tile"]
            shape = module.latent_shape(image_size)
            for_latents = ("windows", "callback")  # what other generative models know nothing of
            chosen = {key: options[key] for key in ("seed", "drop")}
            chosen |= {key: options[key] for key in for_latents if options[key] is not None}
            images = module.sample(batch, batch["case_id"], shape, **chosen)
    return images.float().clamp(-1, 1).cpu()


def reconstruct(module: Any, batch: dict, tile: int | None) -> Any:
    if tile is None:
        return module(batch["image"], module.decoder_map(batch))
    from medldm.networks.tiling import TiledAutoencoder

    tiled = TiledAutoencoder(module.autoencoder, tile)
    h = module.autoencoder.quantize(tiled.encode(batch["image"]).to(module.device)).z
    return tiled.decode(h, module.decoder_map(batch))


def stage_output(module: Any, batch: dict, stage: str, tile: int | None) -> Any:
    """What a stage before diffusion makes of a batch of pairs."""
    earlier = module.as_first_stage() if hasattr(module, "as_first_stage") else module.first_stage
    earlier.tile = tile
    if stage == "autoencoder":
        return earlier.reconstruct(batch["image"])
    return earlier.translate_image(batch["source"], batch["label"])


def spread(positions: list[int], count: int | None) -> list[int]:
    """At most `count` positions, evenly spread."""
    if count is None or len(positions) <= count:
        return positions
    return [positions[round(i * (len(positions) - 1) / max(1, count - 1))] for i in range(count)]


class Recorder:
    """Keeps x0_hat of the last sample of the last batch at `count` evenly spread steps, the last included."""

    def __init__(self, num_steps: int, count: int) -> None:
        self.steps = {round((k + 1) * num_steps / count) for k in range(count)}
        self.latents: list[Any] = []

    def __call__(self, step: int, x0_hat: Any) -> None:
        if step == min(self.steps):
            self.latents.clear()
        if step in self.steps:
            self.latents.append(x0_hat[-1:].clone())

    def decoded(self, module: Any, batch: dict) -> list[Any]:
        """(1, C, *S) images in [-1, 1] on the host."""
        import torch

        from medldm.inference import autocast, to_device

        last = to_device({key: value[-1:] for key, value in batch.items() if key == "mask"}, module.device)
        with torch.no_grad(), autocast(module.device):
            return [module.decode(z, last).float().clamp(-1, 1).cpu() for z in self.latents]


def windows_of(cfg: Any, module: Any) -> Any:
    if cfg.windows.size is None:
        return None
    from medldm.diffusion.windows import Windows

    return Windows.of_image(tuple(cfg.windows.size), module.first_stage.downsampling, cfg.windows.overlap)


def check_request(cfg: Any, module: Any, stage: str | None) -> None:
    """InputError for a key that this model has no use for."""
    if cfg.tile is not None and cfg.tile < 8:
        raise InputError(f"tile={cfg.tile}: give at least 8 voxels")
    is_latent = hasattr(module, "interpolate") and stage is None
    for key, is_set in (
        ("windows.size", cfg.windows.size is not None),
        ("trajectory", cfg.trajectory),
        ("interpolate.count", cfg.interpolate.count),
    ):
        if is_set and not is_latent:
            raise InputError(f"{key}: needs a latent diffusion checkpoint; set it to its default")
    if cfg.tile is not None and not (is_latent or stage or hasattr(module, "reconstructs")):
        raise InputError("tile: needs an autoencoder or latent diffusion checkpoint; set it to null")
    if is_latent:
        windows_of(cfg, module)
        if cfg.tile is not None and not hasattr(module.first_stage, "tile"):
            raise InputError("tile: this model has no first stage to decode with; set it to null")


def write_interpolations(cfg: Any, module: Any, dataset: Any, folder: Any, positions: list[int]) -> None:
    """Volumes between neighbouring cases: <output>/interpolation/<a>_to_<b>.{h5,gif}."""
    import torch
    from rich.progress import track

    from medldm.inference import autocast, to_device

    count = cfg.interpolate.count
    if count < 2 or len(positions) < 2:
        raise InputError(f"interpolate.count={count}: give 2 or more, and a split of two cases or more")
    shares = [k / (count - 1) for k in range(count)]
    module.first_stage.tile = cfg.tile
    for pair in track(list(zip(positions, positions[1:], strict=False)), "interpolating", transient=True):
        batch = to_device(dataset.__getitems__([(0, p) for p in pair]), module.device)
        options = {"time": cfg.interpolate.time, "seed": cfg.seed, "windows": windows_of(cfg, module)}
        with torch.no_grad(), autocast(module.device):
            images = module.interpolate(batch, batch["case_id"], shares, **options)
        name = "_to_".join(batch["case_id"])
        folder.write_series(f"interpolation/{name}", images.float().clamp(-1, 1).cpu(), shares)


def task(cfg: Any) -> None:
    import torch
    from omegaconf import OmegaConf
    from rich.progress import Progress

    from medldm.checkpoints import load_module
    from medldm.data import build_datamodule
    from medldm.data.splits import SUBSETS
    from medldm.diffusion.sampler import override_sampler
    from medldm.inference import case_batches, items_by_case, pick_device
    from medldm.outputs import SampleFolder

    if cfg.split not in (*SUBSETS, "all"):
        raise InputError(f"split={cfg.split} is none of {', '.join(SUBSETS)}, all")
    module = load_module(cfg.checkpoint, weights=cfg.weights).to(pick_device(cfg.device))
    stage = check_stage(module, cfg.stage)
    is_generative = hasattr(module, "sample") and stage is None
    check_request(cfg, module, stage)
    if is_generative:
        module.sampler = override_sampler(module.sampler, OmegaConf.to_container(cfg.sampler))
        module.conditioner.drop_groups(1, tuple(cfg.drop))  # names an unknown one before anything is written
    data = OmegaConf.to_container(cfg.data, resolve=True) | {"latents": None, "crop_size": None}
    keys = model_keys(module, stage)
    if cfg.interpolate.count and "image" not in keys:
        keys = ("image", *keys)
    data["pairs"] = "all" if "source" in keys else None
    datamodule = build_datamodule(data, keys=keys, seed=cfg.seed)
    check_facts(module.facts, datamodule.facts, cfg.checkpoint, data["root"])
    if "source" in keys:
        check_facts(module.facts, datamodule.facts, cfg.checkpoint, data["root"], ("label_values",))
    dataset = datamodule.dataset(cfg.split, edge_level=cfg.edge_level).as_cases()
    cases = list(items_by_case(dataset.items).items())[: cfg.limit]
    if not cases:
        raise InputError(f"split={cfg.split}: no case of {data['root']} is in it; see its splits.json")
    folder = SampleFolder(
        Path(cfg.output), dataset, describe_run(cfg, module, stage, data["root"]), png=cfg.png
    )
    if cfg.interpolate.count:
        write_interpolations(cfg, module, dataset, folder, [positions[0] for _, positions in cases])
        print(cfg.output)
        return
    seeds = [cfg.seed + 1_000_003 * k for k in range(cfg.num_samples if is_generative else 1)]
    jobs = [(case, spread(positions, cfg.max_slices)) for case, positions in cases]
    with Progress() as progress:
        total = len(seeds) * sum(len(positions) for _, positions in jobs)
        bar = progress.add_task("sampling" if is_generative else "predicting", total=total)
        for case, positions in jobs:
            if folder.has(case):
                progress.advance(bar, len(seeds) * len(positions))
                continue
            shape = tuple(dataset.cases[case].get("shape") or datamodule.facts["image_size"])
            batches = list(case_batches(dataset, positions, data["batch_size"]))
            samples = []
            for seed in seeds:
                recorder = Recorder(module.sampler.num_steps, cfg.trajectory) if cfg.trajectory else None
                options = {"seed": seed, "drop": tuple(cfg.drop), "windows": windows_of(cfg, module)}
                options |= {"tile": cfg.tile, "callback": recorder, "stage": stage}
                images = []
                for batch in batches:
                    images.append(generate(module, batch, shape[-dataset.spatial_dims :], options))
                    progress.advance(bar, len(batch["case_id"]))
                samples.append(torch.cat(images))
                if recorder is not None and seed == seeds[0]:
                    frames = recorder.decoded(module, batches[-1])
                    folder.write_gif(f"trajectory/{dataset.cases[case]['id']}", frames)
            folder.write(case, positions, samples, batches)
    print(cfg.output)


def describe_run(cfg: Any, module: Any, stage: str | None, root: str) -> dict[str, Any]:
    """What provenance.json says: everything that decides what is written."""
    import torch

    from medldm.checkpoints import sha256

    is_generative = hasattr(module, "sample") and stage is None
    return {
        "checkpoint": str(cfg.checkpoint),
        "checkpoint_sha256": sha256(cfg.checkpoint),
        "weights": cfg.weights,
        "stage": stage or type(module).__name__.removesuffix("Module").lower(),
        "decoder": describe_decoder(module),
        "condition_channels": getattr(getattr(module, "conditioner", None), "spade_channels", None),
        "sampler": describe_sampler(module) if is_generative else None,
        "condition": list(model_keys(module, stage)) if is_generative else None,
        "dropped": list(cfg.drop),
        "edge_level": cfg.edge_level,
        "seed": cfg.seed,
        "data_root": str(Path(root).resolve()),
        "split": cfg.split,
        "num_samples": cfg.num_samples,
        "max_slices": cfg.max_slices,
        "windows": [*cfg.windows.size, cfg.windows.overlap] if cfg.windows.size else None,
        "interpolate": [cfg.interpolate.count, cfg.interpolate.time] if cfg.interpolate.count else None,
        "torch": torch.__version__,
    }


def describe_decoder(module: Any) -> str | None:
    """What decodes: "spade" where it sees the map, "plain" where not, None where there is no autoencoder."""
    stage = getattr(module, "first_stage", module)
    autoencoder = getattr(stage, "autoencoder", None)
    if autoencoder is None:
        return None
    return "plain" if autoencoder.decoder_map_channels is None else "spade"


def describe_sampler(module: Any) -> dict[str, Any]:
    import dataclasses

    return {"kind": type(module.sampler).__name__} | dataclasses.asdict(module.sampler)


SAME_FACTS = ("spatial_dims", "image_channels", "num_classes")


def check_facts(
    trained: dict, prepared: dict, checkpoint: str, root: str, keys: tuple[str, ...] = SAME_FACTS
) -> None:
    """A model fits a dataset only where dimensions, channels and classes are the same."""
    for key in keys:
        if trained[key] != prepared[key]:
            raise InputError(
                f"{checkpoint}: trained with {key}={trained[key]}, but {root} has {prepared[key]}; "
                "use the data it knows"
            )


def main() -> None:
    run_command(task, "sample", __doc__)


if __name__ == "__main__":
    main()
