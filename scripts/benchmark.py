"""Compares the speed and memory of medldm with MONAI's: the same work, in one process, in turns.

python scripts/benchmark.py                         all rows that need no checkpoint
python scripts/benchmark.py quantizer unet --json out.json --limit 300
python scripts/benchmark.py sampler --checkpoint runs/.../best.ckpt --data DATA
python scripts/benchmark.py --check                 kernels, bytes and roofline time have not grown

Rows: quantizer, memory, vqvae, unet, msspade, loader, ssim, crop, vqgan3d, unet3d, latents3d, traced3d,
sampling_time, sampler. Each is printed when it ends and added to the JSON file then, so a job that is cut
off keeps what it has. A row that takes longer than --limit seconds, or lacks a package (MONAI's attention
needs `pip install einops`), is skipped, and the output says so. A GPU is used where there is one. Peak
extra memory is, on a CPU, the largest sum of tensors alive that a step made (scratch inside a kernel is not
seen), on a GPU the allocator's own peak; traced3d follows shapes alone and computes nothing.

--check counts one training step of whole experiments from shapes alone, compares the counts with
scripts/benchmark/counts.json, and ends with status 1 where one has grown. --check --update writes that file.
"""

import argparse
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "benchmark"))

import counting
import measuring
import rows
import torch
from measuring import DEVICE, Measured

from medldm.files import write_json


class OutOfTime(Exception):  # noqa: N818 - not an error: the row is skipped
    """A row took longer than its limit."""


@contextmanager
def limited(seconds: float | None) -> Iterator[None]:
    """A context that raises OutOfTime after so many seconds, once the operation that runs then has ended."""

    def stop(*_: object) -> None:
        raise OutOfTime(f"took longer than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds or 0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


HEADER = (
    f"{'row':<38} {'variant':<36} {'median':>16} {'least..most':>18} {'GFLOP':>7} {'of peak':>8} "
    f"{'extra MiB':>9} {'speed-up':>8} {'less memory':>11}"
)


def line(r: Measured) -> str:
    cells = [
        "" if value is None else form.format(value)
        for value, form in (
            (r.gflop, "{:.0f}"), (r.peak_share, "{:.1%}"), (r.memory_mib, "{:.1f}"), (r.ratio, "{:.2f}x"),
            (r.memory_ratio, "{:.1f}x"),
        )
    ]  # fmt: skip
    median, spread = f"{r.value:.4g} {r.unit}", f"{r.spread[0]:.3g}..{r.spread[1]:.3g}"
    gflop, share, extra, faster, smaller = cells
    return (
        f"{r.row:<38} {r.variant:<36} {median:>16} {spread:>18} {gflop:>7} {share:>8} {extra:>9} {faster:>8} "
        f"{smaller:>11}"
    )


def read_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of these arguments, or of the command line. Without a row, all rows run that need no
    checkpoint.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*rows.ROWS, *rows.ON_REQUEST]
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(known)}")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--clock", choices=measuring.CLOCKS, default="wall", help="cpu, with --threads 1, on a busy machine"
    )
    parser.add_argument("--limit", type=float, help="seconds that a row may take; none by default")
    parser.add_argument("--batch-size", type=int, help="of vqvae (1), unet (2) and msspade (8)")
    parser.add_argument("--latent-edge", type=int, default=6, help="voxels of the latents, for msspade")
    parser.add_argument("--compile", action="store_true", help="measure torch.compile too")
    parser.add_argument("--checkpoint", help="stage two, for sampler")
    parser.add_argument("--data", help="prepared folder, for sampler and loader")
    parser.add_argument("--num-cases", type=int, default=4, help="of the test split, for sampler")
    parser.add_argument("--max-slices", type=int, default=4, help="of each case, for sampler")
    parser.add_argument("--seed", type=int, default=0, help="of the starting noise, for sampler")
    parser.add_argument("--json", type=Path, help="written anew after every row")
    parser.add_argument("--check", action="store_true", help="the guard of counts, instead of measuring")
    parser.add_argument("--update", action="store_true", help="with --check: write the counts")
    options = parser.parse_args(arguments)
    options.rows = options.rows or list(rows.ROWS)
    for name in options.rows:  # argparse of Python 3.11 would refuse an empty list where there are choices
        if name not in known:
            parser.error(f"{name} is none of {', '.join(known)}")
    if "sampler" in options.rows and not (options.checkpoint and options.data):
        parser.error("sampler needs --checkpoint and --data")
    if options.update and not options.check:
        parser.error("--update goes with --check")
    return options


def set_up(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    measuring.choose_clock(options.clock)
    if DEVICE.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True


def tell(text: str) -> None:
    print(text, flush=True)


def measure(options: argparse.Namespace) -> dict:
    """Measures all rows and prints each as it ends. Returns the content of the JSON file."""
    peaks = {name: measuring.matmul_peak(getattr(torch, name)) for name in ("float32", "bfloat16")}
    with measuring.best_precision():
        used = "bfloat16" if torch.is_autocast_enabled(DEVICE.type) else "float32"
    content = {"peaks": peaks, "precision": used, "rows": [], "skipped": {}}
    tell(f"{DEVICE}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    tell(", ".join(f"{name} matmul peak {peak:.1f} GFLOP/s" for name, peak in peaks.items()))
    tell(HEADER)
    for name in options.rows:
        try:
            with limited(options.limit):
                for result in rows.run(name, options, peaks[used], lambda: None):
                    content["rows"].append(result._asdict())
                    tell(line(result))
        except (OutOfTime, ImportError, torch.OutOfMemoryError) as reason:
            content["skipped"][name] = str(reason)
            tell(f"{name}: skipped, {reason}")
        if options.json:
            write_json(options.json, content)
    return content


def main() -> None:
    options = read_options()
    if options.check:
        sys.exit(0 if counting.check(update=options.update, tell=tell) else 1)
    set_up(options)
    measure(options)
    if options.json:
        tell(str(options.json))


if __name__ == "__main__":
    main()
