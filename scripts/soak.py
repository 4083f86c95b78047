"""Disturbs every command again and again, and checks that the result equals that of an undisturbed run.

python scripts/soak.py                           200 kills, every other fault three times per command
python scripts/soak.py --kills 10 train encode   some commands
python scripts/soak.py --json soak.json          the rows as a file too, written as they come
python scripts/soak.py --fuzz 2000               instead: so many changed inputs of each kind

Each trial starts a command on tiny phantom data, disturbs it, and starts the same command again (a training
with resume=auto). Faults: `kill` is SIGKILL at a random moment; `term`, `interrupt` and `usr1` are SIGTERM,
Ctrl-C and SLURM's warning; `disk` is a file system that fills up and `read_only` one that takes no writes
(both need the right to mount a tmpfs); `neighbour` is a second process with the same output; `clock` gives
files tomorrow's times between kill and restart; `moved` moves the run folder in between.

Changed inputs are raw files, manifests, indexes, splits and recipes with bytes or entries changed at random
(`soak/mutations.py`); checkpoints that are loaded, used or resumed (`soak/strangers.py`); JSON files that
commands wrote, and command lines with bad values, every key with every kind of value in random order
(`soak/commandlines.py`). Each must work or be told in one line, never end in a traceback, a crash, a hang,
without memory, or with something left behind.

A trial is `equal` where the end is that of an undisturbed run, bit for bit. It is `told` where the second of
two neighbours ended in a single clear line. Everything else is `wrong`, and is listed with its folder, and
the exit status is 1.
"""

import argparse
import json
import math
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "soak"))

import faults
import fuzzing
import world
from rich.console import Console
from rich.table import Table

OUTCOMES = ("equal", "told", "wrong")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commands", nargs="*", metavar="COMMAND", help=f"of {', '.join(world.COMMANDS)}; all")
    parser.add_argument("--kills", type=int, default=200, help="SIGKILLs, over all commands (default 200)")
    parser.add_argument("--repeats", type=int, default=3, help="trials of every other fault and command")
    parser.add_argument("--faults", nargs="+", choices=faults.FAULTS, default=list(faults.FAULTS))
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which faults come")
    parser.add_argument("--folder", type=Path, help="where trials are made; those that fail stay there")
    parser.add_argument("--fuzz", type=int, default=0, metavar="N", help="N changed inputs of each kind")
    parser.add_argument("--seconds", type=float, default=math.inf, help="for the inputs of each kind")
    parser.add_argument("--kinds", nargs="+", choices=fuzzing.KINDS, default=list(fuzzing.KINDS))
    parser.add_argument("--json", type=Path, help="rows as a file, written as they come")
    options = parser.parse_args()
    if unknown := set(options.commands) - set(world.COMMANDS):
        parser.error(f"no command {', '.join(sorted(unknown))}; choose from {', '.join(world.COMMANDS)}")
    return options


def main() -> int:
    options = parse_arguments()
    console = Console()
    folder = Path(options.folder or tempfile.mkdtemp(prefix="soak."))
    names = options.commands or list(world.COMMANDS)
    console.print(f"trials in {folder}")
    made = world.World(folder / "world")
    if options.fuzz:
        return fuzz_all(options, made, console, folder)
    moments = random.Random(options.seed)
    rows, failures = [], []
    for name in names:
        undisturbed = faults.undisturbed(made, name, folder)
        console.print(f"{name}: {undisturbed.seconds:.1f} s undisturbed")
        for fault in options.faults:
            count = options.kills // len(names) if fault == "kill" else options.repeats
            if fault not in faults.faults_of(name) or not count:
                continue
            row, failed = repeat(fault, undisturbed, count, moments)
            rows.append(row)
            failures += failed
            console.print("  " + describe(row))
            if options.json:
                options.json.write_text(json.dumps({"rows": rows, "failures": failures}, indent=1))
    console.print(table_of(rows))
    for failure in failures:
        console.print(failure, style="red", soft_wrap=True)
    return 1 if failures else 0


def fuzz_all(options: argparse.Namespace, made: world.World, console: Console, folder: Path) -> int:
    """Prints a row for each kind of input. Returns 1 where one ended badly."""
    rows = []
    for kind in options.kinds:
        seed = options.seed * len(fuzzing.KINDS) + fuzzing.KINDS.index(kind)
        inputs = fuzzing.Inputs(kind, folder / "fuzz" / kind, made.places(), options.seed)
        rows.append(fuzzing.fuzz(inputs, options.fuzz, seed, options.seconds))
        counts = ", ".join(f"{rows[-1][name]} {name}" for name in fuzzing.OUTCOMES)
        console.print(f"{kind}: n = {rows[-1]['n']}: {counts}")
        for words, place in rows[-1]["bad"].items():
            console.print(f"  {words} ({place})", style="red", soft_wrap=True)
        if options.json:
            options.json.write_text(json.dumps({"fuzz": rows}, indent=1))
    return int(any(row["bad"] for row in rows))


def repeat(
    fault: str, undisturbed: faults.Undisturbed, count: int, moments: random.Random
) -> tuple[dict, list[str]]:
    """One row of the table, and a line for each trial that went wrong."""
    outcomes: Counter[str] = Counter()
    failed = []
    for number in range(count):
        trial = faults.run_trial(fault, undisturbed, number, moments)
        if trial.outcome == "skipped":
            return {"command": undisturbed.name, "fault": fault, "skipped": trial.words}, []
        outcomes[trial.outcome] += 1
        outcomes["late"] += trial.was_late
        if trial.outcome == "wrong":
            failed.append(f"{undisturbed.name}, {fault} {number}: {trial.words} ({trial.folder})")
    counts = {outcome: outcomes[outcome] for outcome in (*OUTCOMES, "late")}
    return {"command": undisturbed.name, "fault": fault, "n": count, **counts}, failed


def describe(row: dict) -> str:
    if "skipped" in row:
        return f"{row['fault']}: skipped, {row['skipped']}"
    counts = ", ".join(f"{row[key]} {key}" for key in OUTCOMES if row[key])
    return f"{row['fault']}: n = {row['n']}, {counts}" + (
        f" ({row['late']} came too late)" if row["late"] else ""
    )


def table_of(rows: list[dict]) -> Table:
    table = Table("command", "fault", "n", *OUTCOMES, "too late")
    for row in rows:
        cells = [str(row.get(key, "-")) for key in ("n", *OUTCOMES, "late")]
        table.add_row(row["command"], row["fault"], *cells)
    return table


if __name__ == "__main__":
    sys.exit(main())
