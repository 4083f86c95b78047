"""Writes samples, their trajectories, and volumes between two cases, case by case as they are made."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

from omegaconf import DictConfig

from medldm.data.loading.dataset import CaseDataset
from medldm.devices import inference_precision
from medldm.diffusion.windows import Windows
from medldm.errors import InputError
from medldm.files import safe_name
from medldm.models.common import TrainedModule
from medldm.outputs import SampleFolder
from medldm.progress import progress, tracked
from medldm.sampling import CaseSamples, Predictor, Recorder, Request, interpolate, sample_cases, spread
from medldm.shards import read_shard

SEED_STRIDE = 1_000_003  # between the samples of a condition


def write_interpolations(
    cfg: DictConfig,
    module: TrainedModule,
    windows: Windows | None,
    dataset: CaseDataset,
    folder: SampleFolder,
    positions: list[int],
) -> None:
    """Volumes between neighbouring cases: <output>/interpolation/<a>_to_<b>.{h5,gif} (or mp4)."""
    count = cfg.interpolate.count
    if count < 2 or len(positions) < 2:
        raise InputError(f"interpolate.count={count}: give 2 or more, and a split of two cases or more")
    shares = [k / (count - 1) for k in range(count)]
    request = Request(cfg.seed, windows=windows, precision=cfg.precision)
    for pair in tracked(list(pairwise(positions)), "interpolating", transient=True):
        batch = dataset.__getitems__([(0, p) for p in pair])
        images = interpolate(module, batch, shares, time=cfg.interpolate.time, request=request)
        folder.write_series(f"interpolation/{safe_name('_to_'.join(batch['case_id']))}", images, shares)


def write_samples(
    cfg: DictConfig,
    predictor: Predictor,
    module: TrainedModule,
    windows: Windows | None,
    folder: SampleFolder,
    cases: Mapping[int, list[int]],
    image_size: Sequence[int],
) -> None:
    """The images of all items of `cases` (case -> positions) that the folder lacks, case by case; with
    `cfg.shard` those of this process's share of the cases.
    """
    dataset, precision = folder.dataset, inference_precision(cfg.precision, module.device)

    def size_of(case: int) -> tuple[int, ...]:
        return tuple(dataset.cases[case].get("shape") or image_size)[-dataset.spatial_dims :]

    recorder = Recorder(module.sampler.num_steps, cfg.trajectory, precision) if cfg.trajectory else None
    seeds = [cfg.seed + SEED_STRIDE * k for k in range(cfg.num_samples if predictor.is_generative else 1)]
    requests = [Request(seed, tuple(cfg.drop), windows, precision=precision) for seed in seeds]
    requests[0] = requests[0]._replace(callback=recorder)
    jobs = [(case, spread(positions, cfg.max_slices)) for case, positions in cases.items()]
    shard = read_shard(cfg.shard)
    own = jobs if shard is None else shard.part(jobs)
    missing = set(folder.pending([case for case, _ in own]))
    pending = [job for job in own if job[0] in missing]
    total = len(seeds) * sum(len(positions) for _, positions in pending)
    with progress("sampling" if predictor.is_generative else "predicting", total) as advance:
        # A recorder looks at one case at a time. Else batches are those of all cases, whatever is missing.
        for part in [[job] for job in pending] if recorder else [jobs]:
            for done in sample_cases(
                predictor,
                dataset,
                part,
                wanted=missing,
                size_of=size_of,
                requests=requests,
                batch_size=cfg.data.batch_size,
                advance=advance,
            ):
                if recorder is not None:
                    write_trajectory(module, recorder, folder, done, dataset.cases[done.case]["id"])
                folder.write(done.case, done.positions, done.samples, done.batches)


def write_trajectory(
    module: TrainedModule, recorder: Recorder, folder: SampleFolder, done: CaseSamples, name: str
) -> None:
    """The steps that `recorder` saw of a case's last batch as <output>/trajectory/<name>.gif, or .mp4."""
    folder.write_video(f"trajectory/{name}", recorder.decoded(module, done.batches[-1]))
