"""Speed and memory of medldm beside MONAI: the same work, in one process, in turns.

    python scripts/benchmark.py                         all rows that need no checkpoint
    python scripts/benchmark.py quantizer unet --json out.json
    python scripts/benchmark.py sampler --checkpoint runs/.../best.ckpt --data DATA

Rows: quantizer, memory, vqvae, unet, msspade, loader, ssim, crop, sampler. A GPU is used where there is one.
MONAI's attention needs `pip install einops`. Peak extra memory is, on a CPU, the largest sum of tensors alive
that a step made (scratch inside a kernel is not seen), on a GPU the allocator's own peak.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "benchmark"))

import evaluating  # noqa: E402
import loading  # noqa: E402
import measuring  # noqa: E402
import quantizers  # noqa: E402
import sampling  # noqa: E402
import torch  # noqa: E402
import translators  # noqa: E402
from measuring import DEVICE, Measured  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn  # noqa: E402
from rich.table import Table  # noqa: E402

import networks  # noqa: E402

ROWS = ("quantizer", "memory", "vqvae", "unet", "msspade", "loader", "ssim", "crop")
REFERENCE = {
    "quantizer": "MONAI EMAQuantizer",
    "vqvae": "MONAI default",
    "unet": "MONAI default",
    "ssim": "MONAI SSIMMetric",
    "msspade": "loop over samples",
}


def run_row(row: str, options: argparse.Namespace, peak: float, progress: Progress) -> list[Measured]:
    task = progress.add_task(row, total=None)
    tick = lambda: progress.advance(task)  # noqa: E731
    settings = {"repeats": options.repeats, "peak": peak, "reference": REFERENCE.get(row), "tick": tick}
    if row == "quantizer":
        return [
            result
            for dim in (4, 8)
            for result in measuring.compare(
                f"quantizer, {dim} channels", quantizers.quantizer(dim), **settings
            )
        ]
    if row == "memory":
        return measuring.compare("32,768 tokens x 16,384 codes", quantizers.memory(), **settings)
    if row == "vqvae":
        title = f"VQ-VAE step, {options.batch_size or 1} x 256^2"
        return measuring.compare(title, networks.vqvae(options.batch_size or 1, options.compile), **settings)
    if row == "unet":
        title = f"U-Net step, {options.batch_size or 2} x 32^2"
        return measuring.compare(title, networks.unet(options.batch_size or 2, options.compile), **settings)
    if row == "msspade":
        size, edge = options.batch_size or 8, options.latent_edge
        title = f"MS-SPADE step, {size} x {edge}^3"
        return measuring.compare(title, translators.translators(size, edge), **settings)
    if row == "ssim":
        return measuring.compare("SSIM of 96^3", evaluating.ssim_3d(), **settings)
    if row == "crop":
        read, folder = loading.crops()
        times = [measuring.seconds(read) for _ in range(50 * max(1, options.repeats))]
        folder.cleanup()
        spread = (min(times), max(times))
        return [Measured("96^3 of 144x192x144", "medldm", statistics.median(times), spread, "s")]
    if row == "sampler":
        return sampling.compare_samplers(options, tick)
    read, count, folder = loading.loader(options.data, 1500)
    read()
    rates = [count / measuring.seconds(read) for _ in range(max(3, options.repeats))]
    if folder is not None:
        folder.cleanup()
    spread = (min(rates), max(rates))
    return [Measured("loader 256^2", "medldm", statistics.median(rates), spread, "slices/s")]


def show(results: list[Measured], peaks: dict[str, float]) -> None:
    console = Console(width=150)
    console.print(f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    console.print(", ".join(f"{name} matmul peak {peak:.1f} GFLOP/s" for name, peak in peaks.items()))
    table = Table(
        "row", "variant", "median", "min..max", "GFLOP", "of peak", "extra MiB", "speed-up", "less memory"
    )
    for r in results:
        cells = [r.row, r.variant, f"{r.value:.4g} {r.unit}", f"{r.spread[0]:.3g}..{r.spread[1]:.3g}"]
        for value, form in (
            (r.gflop, "{:.0f}"), (r.peak_share, "{:.1%}"), (r.memory_mib, "{:.1f}"),
            (r.ratio, "{:.2f}x"), (r.memory_ratio, "{:.1f}x"),
        ):  # fmt: skip
            cells.append("" if value is None else form.format(value))
        table.add_row(*cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rows", nargs="*", choices=[*ROWS, "sampler"], default=list(ROWS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=measuring.CLOCKS, default="wall", help="cpu, with --threads 1, on a busy machine"
    )
    parser.add_argument("--batch-size", type=int, help="of vqvae (1), unet (2) and msspade (8)")
    parser.add_argument("--latent-edge", type=int, default=6, help="voxels of the latents, for msspade")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--checkpoint", help="stage two, for sampler")
    parser.add_argument("--data", help="prepared folder, for sampler and loader")
    parser.add_argument("--num-cases", type=int, default=4, help="of the test split, for sampler")
    parser.add_argument("--max-slices", type=int, default=4, help="of each case, for sampler")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise, for sampler")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "sampler" in options.rows and not (options.checkpoint and options.data):
        parser.error("sampler needs --checkpoint and --data")
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    measuring.choose_clock(options.clock)
    if DEVICE.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    peaks = {name: measuring.matmul_peak(getattr(torch, name)) for name in ("float32", "bfloat16")}
    with measuring.best_precision():
        used = "bfloat16" if torch.is_autocast_enabled(DEVICE.type) else "float32"
    results: list[Measured] = []
    with Progress(SpinnerColumn(), "{task.description}", TimeElapsedColumn(), transient=True) as progress:
        for row in options.rows:
            results += run_row(row, options, peaks[used], progress)
    show(results, peaks)
    if options.json:
        content = {"peaks": peaks, "precision": used, "rows": [result._asdict() for result in results]}
        options.json.write_text(json.dumps(content, indent=1))
        print(options.json)


if __name__ == "__main__":
    main()
