"""Thousands of changed inputs, in processes that may crash, hang or run out of memory without harm."""

import multiprocessing
import resource
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path

from mutations import Fuzzer, outcome_of

KINDS = (
    "readers", "folders", "manifests", "indexes", "splits", "texts", "recipes", "checkpoints", "overrides",
)  # fmt: skip
PATIENCE = 20  # seconds for one input
MEMORY = 2 * 2**30  # bytes of address space beyond those at the start
PER_PROCESS = 200  # inputs that one process tries
OUTCOMES = ("worked", "told", "traceback", "crash", "hang")


def fuzz(kind: str, count: int, seed: int, folder: Path, prepared: Path, checkpoint: Path, raw: Path) -> dict:
    """Counts of outcomes, and the first input of each sort that ended badly."""
    counts: Counter[str] = Counter()
    bad: dict[str, str] = {}
    done, part = 0, 0
    while done < count:
        part += 1
        settings = (
            kind,
            min(PER_PROCESS, count - done),
            seed * 100_003 + part,
            folder,
            prepared,
            checkpoint,
            raw,
        )
        for outcome, number in in_process(*settings):
            counts[outcome.partition(":")[0] if outcome in ("worked", "told") else sort_of(outcome)] += 1
            done += 1
            if outcome not in ("worked", "told"):
                bad.setdefault(outcome, f"seed {settings[2]}, input {number}")
    return {"kind": kind, "n": done, **{name: counts[name] for name in OUTCOMES}, "bad": bad}


def sort_of(outcome: str) -> str:
    return outcome.partition(" ")[0] if outcome.startswith(("crash", "hang")) else "traceback"


def in_process(
    kind: str, count: int, seed: int, folder: Path, prepared: Path, checkpoint: Path, raw: Path
) -> Iterator[tuple[str, int]]:
    """(outcome, number) of each input of one process; the last is a crash or a hang where it did not end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    arguments = (theirs, kind, count, seed, folder, prepared, checkpoint, raw)
    process = context.Process(target=run_tries, args=arguments)
    process.start()
    theirs.close()
    number = 0
    try:
        while number < count:
            if not ours.poll(PATIENCE + 30):
                yield "hang", number
                break
            yield ours.recv(), number
            number += 1
    except EOFError:
        process.join()
        name = (
            signal.Signals(-process.exitcode).name if (process.exitcode or 0) < 0 else str(process.exitcode)
        )
        yield ("hang" if name == "SIGALRM" else f"crash by {name}"), number
    finally:
        process.kill()
        process.join()


def run_tries(
    pipe: Connection,
    kind: str,
    count: int,
    seed: int,
    folder: Path,
    prepared: Path,
    checkpoint: Path,
    raw: Path,
) -> None:
    sys.stderr = sys.stdout = open("/dev/null", "w")  # noqa: SIM115
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    fuzzer = Fuzzer(folder / kind, seed, prepared, checkpoint, raw)
    for one in islice(fuzzer.tries(kind), count):
        signal.alarm(PATIENCE)
        pipe.send(outcome_of(one))
        signal.alarm(0)
