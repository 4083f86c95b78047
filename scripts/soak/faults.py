"""What can happen to a command while it runs, and how to tell whether it came through."""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from world import COMMANDS, World, contents, copy_world, start, wait_for

TMPFS = ("mount", "-t", "tmpfs", "soak")
SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "interrupt": signal.SIGINT, "usr1": signal.SIGUSR1}
FAULTS = (*SIGNALS, "disk", "read_only", "neighbour", "clock", "moved")
LOG = "log.txt"
LATER = 1.05  # moments reach so far beyond an undisturbed run's time


@dataclass(frozen=True)
class Undisturbed:
    """A command's run without a fault: its result is what every trial must end with."""

    world: World
    name: str
    folder: Path
    seconds: float
    result: dict[str, str]
    size: int  # bytes of the result


@dataclass(frozen=True)
class Trial:
    outcome: str  # equal | told | wrong | skipped
    words: str = ""
    folder: Path | None = None
    was_late: bool = False  # the command had ended before the fault came


def faults_of(name: str) -> tuple[str, ...]:
    """Faults that mean something for this command."""
    is_training = COMMANDS[name].task == "train"
    return tuple(f for f in FAULTS if is_training or f not in ("usr1", "moved"))


def launch(world: World, name: str, folder: Path, again: bool = False, log: Path | None = None) -> int:
    command = COMMANDS[name]
    folder.mkdir(parents=True, exist_ok=True)
    if command.copies:
        copy_world(getattr(world, command.copies), folder / command.copies)
    overrides = command.overrides(world, folder) + list(command.again if again else ())
    return start(command.task, overrides, log or folder / LOG)


def undisturbed(world: World, name: str, root: Path) -> Undisturbed:
    """Run twice: the second must equal the first, else no trial could be judged."""
    results = []
    for run in ("first", "second"):
        folder = root / name / run
        shutil.rmtree(folder, ignore_errors=True)
        begun = time.monotonic()
        if (status := wait_for(launch(world, name, folder))) != 0:
            raise SystemExit(f"{name} ended with {status}: {(folder / 'log.txt').read_text()}")
        seconds = time.monotonic() - begun
        results.append(contents(folder / COMMANDS[name].result))
    if results[0] != results[1]:
        raise SystemExit(f"{name}: two undisturbed runs differ in {differences(*results)}")
    size = sum(p.stat().st_size for p in (folder / COMMANDS[name].result).rglob("*") if p.is_file())
    return Undisturbed(world, name, root / name, seconds, results[0], size)


def differences(expected: dict[str, str], found: dict[str, str]) -> str:
    names = sorted(k for k in expected.keys() | found.keys() if expected.get(k) != found.get(k))
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def run_trial(fault: str, run: Undisturbed, number: int, moments: random.Random) -> Trial:
    folder = run.folder / f"{fault}_{number}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.with_name(f"{folder.name}_{LOG}").unlink(missing_ok=True)
    moment = moments.uniform(0, run.seconds * LATER)
    if fault in ("disk", "read_only", "neighbour"):
        trial = {"disk": full_disk, "read_only": read_only, "neighbour": neighbour}[fault](
            run, folder, moments
        )
    else:
        between = {"clock": from_tomorrow, "moved": move}.get(fault)
        trial = disturbed(run, folder, SIGNALS.get(fault, signal.SIGKILL), moment, between)
    if trial.outcome in ("equal", "told"):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(folder.with_name(folder.name + "_moved"), ignore_errors=True)
    return trial


def disturbed(
    run: Undisturbed, folder: Path, number: int, moment: float, between: Callable[[Path], Path] | None
) -> Trial:
    """A signal to the command's whole session after `moment` seconds, then the command again."""
    child = launch(run.world, run.name, folder)
    time.sleep(moment)
    was_late = os.waitpid(child, os.WNOHANG) != (0, 0)
    if not was_late:
        try:
            os.killpg(child, number)
        except ProcessLookupError:  # it has no session of its own yet
            os.kill(child, number)
        wait_for(child)
    if between is not None:
        folder = between(folder)
    return judge_restart(run, folder, was_late)


def judge_restart(run: Undisturbed, folder: Path, was_late: bool = False) -> Trial:
    has_run = any((folder / COMMANDS[run.name].result).glob("*"))
    status = wait_for(launch(run.world, run.name, folder, again=has_run))
    if status != 0:
        return Trial("wrong", f"the restart ended with {status}: {last_line(folder / LOG)}", folder, was_late)
    return judge(run, folder, was_late)


def judge(run: Undisturbed, folder: Path, was_late: bool = False) -> Trial:
    result = folder / COMMANDS[run.name].result
    if left := [p.name for p in result.rglob("*") if p.name.endswith((".tmp", ".partial"))]:
        return Trial("wrong", f"left over: {', '.join(left[:3])}", folder, was_late)
    found = contents(result)
    if found != run.result:
        return Trial("wrong", f"differs in {differences(run.result, found)}", folder, was_late)
    return Trial("equal", "", folder, was_late)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no word"


def is_told(log: Path, status: int) -> bool:
    """One line of the command's own and no traceback."""
    text = log.read_text(errors="replace")
    return status == 2 and "Traceback" not in text and last_line(log).startswith("medldm ")


def from_tomorrow(folder: Path) -> Path:
    """What a clock that goes back looks like: files are younger than now."""
    tomorrow = time.time() + 86_400
    for path in folder.rglob("*"):
        os.utime(path, (tomorrow, tomorrow))
    return folder


def move(folder: Path) -> Path:
    moved = folder.with_name(folder.name + "_moved")
    shutil.rmtree(moved, ignore_errors=True)
    return Path(shutil.move(folder, moved))


def full_disk(run: Undisturbed, folder: Path, moments: random.Random) -> Trial:
    """A tmpfs that holds a random share of the result; then it grows, and the command is started again."""
    folder.mkdir(parents=True)
    before = 0
    if copies := COMMANDS[run.name].copies:
        before = sum(p.stat().st_size for p in getattr(run.world, copies).rglob("*") if p.is_file())
    size = int(before * 1.1 + moments.uniform(0.02, 0.9) * (run.size - before)) + 65_536
    if subprocess.run([*TMPFS, "-o", f"size={size}", str(folder)], capture_output=True).returncode != 0:
        return Trial("skipped", "no right to mount a tmpfs")
    try:
        log = folder.with_name(f"{folder.name}_{LOG}")
        status = wait_for(launch(run.world, run.name, folder, log=log))
        was_late = status == 0
        subprocess.run(["mount", "-o", "remount,size=1G", str(folder)], check=True)
        if not was_late and not is_told(log, status):
            return Trial("wrong", f"a full disk ended with {status}: {last_line(log)}", log)
        log.unlink()
        return judge_restart(run, folder, was_late)
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def read_only(run: Undisturbed, folder: Path, moments: random.Random) -> Trial:
    """A file system that takes no writes: the command says so, and comes out whole once it takes them."""
    folder.mkdir(parents=True)
    if subprocess.run([*TMPFS, str(folder)], capture_output=True).returncode != 0:
        return Trial("skipped", "no right to mount a tmpfs")
    try:
        if copies := COMMANDS[run.name].copies:
            copy_world(getattr(run.world, copies), folder / copies)
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        log = folder.with_name(f"{folder.name}_{LOG}")
        status = wait_for(launch(run.world, run.name, folder, log=log))
        subprocess.run(["mount", "-o", "remount,rw", str(folder)], check=True)
        if not is_told(log, status):
            return Trial("wrong", f"a read-only folder ended with {status}: {last_line(log)}", log)
        log.unlink()
        return judge_restart(run, folder)
    finally:
        subprocess.run(["umount", str(folder)], check=False)


def neighbour(run: Undisturbed, folder: Path, moments: random.Random) -> Trial:
    """Two at once: both end well or one is told that it is the second, and the result is whole."""
    children = [launch(run.world, run.name, folder)]
    time.sleep(moments.uniform(0, run.seconds / 2))
    children.append(launch(run.world, run.name, folder))
    statuses = [wait_for(child) for child in children]
    if 0 not in statuses or set(statuses) - {0, 2}:
        return Trial("wrong", f"two at once ended with {statuses}: {last_line(folder / LOG)}", folder)
    trial = judge(run, folder)
    return Trial("told", "", folder) if trial.outcome == "equal" and 2 in statuses else trial
