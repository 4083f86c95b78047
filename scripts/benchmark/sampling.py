"""Compares few steps with 1,000 ancestral ones: same model, same starting noise, paired metrics."""

import time
from argparse import Namespace
from collections.abc import Callable

import torch
from measuring import DEVICE, Measured


def compare_samplers(options: Namespace, tick: Callable[[], object]) -> list[Measured]:
    from medldm.build import load_module
    from medldm.data.loading.datamodule import CaseDataModule
    from medldm.diffusion.sampler import AncestralSampler, DPMSolverSampler
    from medldm.inference import case_batches, items_by_case
    from medldm.metrics.image import nmse_var, psnr, ssim
    from medldm.sampling import Request, predictor_of, spread

    module = load_module(options.checkpoint).to(DEVICE).eval()
    predictor = predictor_of(module)
    keys = tuple(dict.fromkeys((*predictor.keys, "image")))
    data = CaseDataModule(options.data, batch_size=1, keys=keys)
    dataset = data.dataset("test")
    samplers = {
        "ancestral, 1,000 steps": AncestralSampler(num_steps=1000),
        "ancestral, 20 steps": AncestralSampler(num_steps=20),
        "DPM-Solver++, 20 steps": DPMSolverSampler(num_steps=20, eta=1.0),  # configs/model/sampler/dpm_solver
        "DPM-Solver++, 20 steps, deterministic": DPMSolverSampler(num_steps=20),
    }
    scores: dict[str, dict[str, list]] = {
        name: {"ssim": [], "psnr": [], "nmse_var": [], "seconds": []} for name in samplers
    }
    cases = list(items_by_case(dataset.items).values())[: options.num_cases]
    positions = [position for case in cases for position in spread(case, options.max_slices)]
    for batch in case_batches(dataset, positions, 16):
        real = (batch["image"].float() + 1) / 2
        for name, sampler in samplers.items():
            start = time.perf_counter()
            module.sampler = sampler
            images = predictor(batch, tuple(real.shape[2:]), Request(options.seed))
            fake, took = (images + 1) / 2, time.perf_counter() - start
            for metric, function in {"ssim": ssim, "psnr": psnr, "nmse_var": nmse_var}.items():
                scores[name][metric] += function(fake, real).tolist()
            scores[name]["seconds"].append(took / len(real))
            tick()
    return [row for metric in scores[name] for row in rows_of(metric, scores)]


def rows_of(metric: str, scores: dict[str, dict[str, list]]) -> list[Measured]:
    """Mean of a metric with each sampler; ratio: the reference's mean over this one's."""
    means = {name: float(torch.tensor(values[metric]).mean()) for name, values in scores.items()}
    first = next(iter(means.values()))
    unit = "s a slice" if metric == "seconds" else f"(n={len(next(iter(scores.values()))['ssim'])})"
    return [
        Measured(
            metric,
            name,
            mean,
            (min(scores[name][metric]), max(scores[name][metric])),
            unit,
            ratio=first / mean,
        )
        for name, mean in means.items()
    ]
