"""The bound, its floor and the shortcut of a Medical VDM on held-out images, as JSON.

python scripts/measure_medvdm.py CHECKPOINT DATA_ROOT [--split test] [--steps 250] [--limit 64]
python scripts/measure_medvdm.py CHECKPOINT DATA_ROOT --against OTHER    # and the difference, image by image
"""

import argparse
import json
import math

import torch

from medldm.batch import spatial_shape
from medldm.build import load_module
from medldm.data import build_datamodule
from medldm.fingerprints import file_sha256
from medldm.inference import pick_device, to_device
from medldm.metrics.image import psnr, ssim


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("root")
    parser.add_argument("--against", help="a second checkpoint, measured on the same images and noise")
    parser.add_argument("--split", default="test")
    parser.add_argument("--steps", type=int, default=250, help="T of the bound")
    parser.add_argument("--limit", type=int, default=64, help="images, evenly spread over the split")
    parser.add_argument("--batch-size", type=int, default=16)
    return parser.parse_args()


def measure(module, batch: dict, steps: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Values (B,) of one batch, in bits per dimension of the image."""
    x, condition = batch["image"], module.condition(batch)
    bound = module.vlb_exact(x, condition, num_timesteps=steps, generator=generator)
    floor = module.likelihood.entropy_floor(x)
    terms = {
        **bound._asdict(),
        "total": bound.total,
        "entropy_floor": floor,
        "recon_gap": bound.recon - floor,
    }
    values = {f"bpd_{name}": nats / (x[0].numel() * math.log(2)) for name, nats in terms.items()}
    x_hat = module.shortcut(x, condition, generator).clamp(-1, 1)
    real, fake = (x.float() + 1) / 2, (x_hat + 1) / 2
    values |= {"psnr": psnr(fake, real), "ssim": ssim(fake, real, data_range=1.0)}
    return {name: value.double().cpu() for name, value in values.items()}


def measure_checkpoint(path: str, args: argparse.Namespace) -> tuple[dict, dict[str, torch.Tensor]]:
    """Measures a checkpoint. Returns the summary, and its values image by image."""
    device = pick_device()
    module = load_module(path).to(device)
    data = {"root": args.root, "batch_size": args.batch_size}
    dataset = build_datamodule(data, keys=("image",), seed=0).dataset(args.split)
    count = min(args.limit, len(dataset))
    chosen = [round(i * (len(dataset) - 1) / max(1, count - 1)) for i in range(count)]
    generator = torch.Generator(device).manual_seed(0)
    parts: list[dict[str, torch.Tensor]] = []
    with torch.no_grad():
        for start in range(0, count, args.batch_size):
            batch = dataset.__getitems__([(0, i) for i in chosen[start : start + args.batch_size]])
            parts.append(measure(module, to_device(batch, device), args.steps, generator))
    facts = {
        "checkpoint_sha256": file_sha256(path),
        "split": args.split,
        "n": count,
        "image_size": list(spatial_shape(batch["image"])),
        "bound_steps": args.steps,
        "likelihood": type(module.likelihood).__name__,
        "gamma": [float(module.schedule.gamma(torch.tensor(v, device=device))) for v in (0.0, 1.0)],
    }
    return facts, {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def summarise(columns: dict[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    return {
        name: {"mean": column.mean().item(), "standard_error": column.std().item() / len(column) ** 0.5}
        for name, column in columns.items()
    }


def main() -> None:
    args = parse()
    facts, columns = measure_checkpoint(args.checkpoint, args)
    result = facts | summarise(columns)
    if args.against:
        other_facts, other = measure_checkpoint(args.against, args)
        difference = {name: columns[name] - other[name] for name in columns}
        result |= {"against": other_facts | summarise(other), "difference": summarise(difference)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
