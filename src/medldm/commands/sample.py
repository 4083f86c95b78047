"""medldm sample: write generated images for the conditions of a prepared dataset.

  medldm sample checkpoint=runs/.../best.ckpt data.root=DATA output=DIR split=test
  medldm sample ... sampler.num_steps=50 sampler.guidance_scale=2 num_samples=4 drop=[edges] seed=1

Of a translation model (ALDM) it writes every ordered pair of the split, <subject>_<source>_to_<target>;
stage=spade leaves out the diffusion, stage=autoencoder writes the targets' reconstructions.
With a stage-one checkpoint it writes that autoencoder's reconstructions instead: the ceiling of stage two;
with a regression checkpoint the predictions of every pair (data.pair_labels=[[t1,t2]]) as
<subject>_<source>_to_<target>.
A split that holds subjects which the checkpoint, or a stage inside it, was trained on is refused unless
allow_training_subjects=true.
Keys: split (train, val, test, all), num_samples, sampler.{kind,num_steps,guidance_scale,eta,...}, drop,
edge_level, limit, max_slices, weights (ema or raw), ema_length, data.batch_size, seed, device,
precision (auto, bf16-mixed, 32-true; the last step and the image itself are float32 in each).
sampler.guide=CKPT, a smaller or earlier model of the same latents, stands in the null's place in guidance.
Volumes larger than those of training: windows.size=[32,256,256] (voxels; null: a whole axis) denoises in
overlapping windows, tile=64 decodes in tiles with the same result. What the network makes of a map alone
stays in memory for windows.keep=16 windows; for others it is made again at each step, which takes less memory
and more time.
trajectory=20 also writes that many steps of each case as a GIF; interpolate.count=5 writes volumes between
each two neighbouring cases instead. video_format=mp4 makes the films MPEG-4.
Writes per case HDF5 with the conditions (3D also NIfTI on the source's grid and in its units), 8-bit PNGs
and provenance.json. Run it again to continue.
shard=2/4 takes the second quarter of the cases; array takes the element of a SLURM array, tasks the task
of srun -n. The shares write into one output, and all of them together write what one process does.

Maps of your own need no images: put them into RAW/masks, run `medldm prepare data=folder data.raw=RAW ...`
with the size, spacing and orientation of the model's data, and sample with split=all.
"""

from pathlib import Path

from omegaconf import DictConfig

from medldm.asked import refuse_other_recipe
from medldm.build import load_module
from medldm.commands import clean_after_failure, run_command
from medldm.devices import find_hardware, inference_precision, pick_device
from medldm.errors import InputError, told_of
from medldm.inference import items_by_case
from medldm.outputs import SampleFolder
from medldm.overrides import typed_command, typed_overrides
from medldm.sampling import compile_networks, predictor_of
from medldm.synthesis.provenance import describe_data, describe_run
from medldm.synthesis.request import (
    average_as_asked,
    build_dataset,
    check_latent,
    check_request,
    check_subjects,
    choose_sampler,
    give_units,
    windows_of,
)
from medldm.synthesis.writing import write_interpolations, write_samples


@clean_after_failure("output")
def task(cfg: DictConfig) -> None:
    device = pick_device(cfg.device)
    precision = inference_precision(cfg.precision, device)
    module = load_module(cfg.checkpoint, weights=cfg.weights)
    average_as_asked(cfg, module)
    module = module.to(device)
    predictor = predictor_of(module, stage=cfg.stage, tile=cfg.tile)
    check_request(cfg, predictor)
    if predictor.is_generative:
        choose_sampler(cfg, module)
    if cfg.sampler.guide is not None:
        check_latent(predictor, "sampler.guide")
        with told_of("sampler.guide"):
            module.guide_by(load_module(cfg.sampler.guide).to(device))
    compile_networks(module, predictor.output, cfg.compile, hardware=find_hardware(device.type))
    windows, keys = windows_of(cfg, module, predictor), predictor.keys
    for key, is_set in (("trajectory", cfg.trajectory), ("interpolate.count", cfg.interpolate.count)):
        if is_set:
            check_latent(predictor, key)
    if cfg.interpolate.count:
        keys = tuple(dict.fromkeys(("image", *keys)))
    dataset, datamodule = build_dataset(cfg, module, keys)
    refuse_other_recipe(cfg.data, datamodule.index, typed_overrides() or ())
    cases = list(items_by_case(dataset.items).items())[: cfg.limit]
    if not cases:
        raise InputError(f"split={cfg.split}: no case of {cfg.data.root} is in it; see its splits.json")
    about = describe_run(cfg, module, predictor, precision) | describe_data(cfg, dataset)
    about["command"] = typed_command()
    subjects = {dataset.cases[case]["subject"] for case, _ in cases}
    about |= check_subjects(cfg, module, datamodule, subjects)
    folder = SampleFolder(Path(cfg.output), dataset, about, png=cfg.png, video_format=cfg.video_format)
    if cfg.interpolate.count:
        write_interpolations(cfg, module, windows, dataset, folder, [positions[0] for _, positions in cases])
        print(cfg.output)
        return

    if datamodule.facts.get("has_images") is False:
        give_units(dataset, module.facts)
    write_samples(cfg, predictor, module, windows, folder, dict(cases), datamodule.facts["image_size"])
    print(cfg.output)


def main() -> None:
    run_command(task, "sample")


if __name__ == "__main__":
    main()
