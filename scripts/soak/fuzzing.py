"""Thousands of changed inputs, in processes that may crash, hang or run out of memory without harm."""

import math
import multiprocessing
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import torch
from commandlines import Places, cells
from mutations import Fuzzer, outcome_of

KINDS = (
    "readers", "folders", "manifests", "indexes", "splits", "texts", "recipes",
    "checkpoints", "resumes", "records", "overrides",
)  # fmt: skip
COMMANDS = KINDS[-4:]  # kinds for which whole commands run
PATIENCE = 60  # seconds for one input
MEMORY = 2 * 2**30  # bytes of address space beyond those at the start
PER_PROCESS = 200  # inputs that one process tries,
PER_PROCESS_OF_COMMANDS = 40  # and commands
OUTCOMES = ("worked", "told", "traceback", "crash", "hang")


class Inputs(NamedTuple):
    """Valid inputs of one kind, and the folder for changed ones."""

    kind: str
    folder: Path
    places: Places
    order: int  # a seed


def fuzz(inputs: Inputs, count: int, seed: int, seconds: float = math.inf) -> dict:
    """Counts of outcomes of `count` inputs, or of as many as there is time for, and the first input of each
    sort that ended badly.
    """
    counts: Counter[str] = Counter()
    bad: dict[str, str] = {}
    done, part, begun = 0, 0, time.monotonic()
    if inputs.kind == "overrides":
        cells(inputs.places, inputs.folder / "out", inputs.order)  # once, before processes fork
    while done < count and time.monotonic() - begun < seconds:
        part += 1
        number = min(PER_PROCESS_OF_COMMANDS if inputs.kind in COMMANDS else PER_PROCESS, count - done)
        own, first = seed * 100_003 + part, done
        for outcome, tried in in_process(inputs, number, own, first):
            counts[outcome if outcome in ("worked", "told") else sort_of(outcome)] += 1
            done += 1
            if outcome not in ("worked", "told"):
                bad.setdefault(outcome, f"seed {own}, input {tried}")
    return {"kind": inputs.kind, "n": done, **{name: counts[name] for name in OUTCOMES}, "bad": bad}


def sort_of(outcome: str) -> str:
    return outcome.partition(" ")[0] if outcome.startswith(("crash", "hang")) else "traceback"


def in_process(inputs: Inputs, count: int, seed: int, first: int) -> Iterator[tuple[str, int]]:
    """(outcome, number) of each input of one process; the last is a crash or a hang where it did not end."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_tries, args=(theirs, inputs, count, seed, first))
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


def run_tries(pipe: Connection, inputs: Inputs, count: int, seed: int, first: int) -> None:
    sys.stderr = sys.stdout = open("/dev/null", "w")  # noqa: SIM115
    warnings.simplefilter("ignore")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    torch.set_num_threads(1)
    fuzzer = Fuzzer(inputs.folder, seed, inputs.places.data, inputs.places, first, inputs.order)
    for one in islice(fuzzer.tries(inputs.kind), count):
        signal.alarm(PATIENCE)
        pipe.send(outcome_of(one))
        signal.alarm(0)
