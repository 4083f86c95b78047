"""Run folders runs/NAME/TIME: config.yaml, commands.txt, metrics.csv, checkpoints/, samples/, log."""

import logging
import os
import time
from pathlib import Path

from medldm.errors import InputError
from medldm.files import replacing

# By this variable the first rank tells those that it starts where the run is.
RUN_DIR_VARIABLE = "MEDLDM_RUN_DIR"
COMMANDS_FILE = "commands.txt"  # of a run: one line a start


def new_run_dir(parent: Path, job: int | None = None) -> Path:
    """A folder name that does not exist yet: the time, the number of the job in a sweep, whose jobs may run
    side by side, and another number where two runs start in one second.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S") + ("" if job is None else f"-job{job}")
    candidates = (parent / (stamp if i == 0 else f"{stamp}-{i}") for i in range(1000))
    return next(path for path in candidates if not path.exists())


def newest_run(parent: Path) -> Path | None:
    """The run of this experiment whose last.ckpt is the newest."""
    checkpoints = list(parent.glob("*/checkpoints/last.ckpt"))
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parents[1] if checkpoints else None


def find_run_dir(
    parent: Path, run_dir: str | None, resume: str | None, job: int | None = None
) -> tuple[Path, Path | None]:
    """(run folder, checkpoint to resume from or None) for the keys `run_dir` and `resume`; `parent` holds the
    runs of the experiment. Ranks that another one started use its folder.

    InputError where the checkpoint is not there, or where a new run would meet an earlier one, as the jobs
    of a sweep would (`job` is their number).
    """
    of_first_rank = os.environ.get(RUN_DIR_VARIABLE) if "LOCAL_RANK" in os.environ else None
    given = run_dir or of_first_rank
    if resume and resume != "auto":
        checkpoint = Path(resume)
        if not checkpoint.is_file():
            raise InputError(f"resume={checkpoint}: no such checkpoint; give a path or resume=auto")
        return Path(given) if given else checkpoint.resolve().parents[1], checkpoint
    if resume and given is None and job is not None:
        raise InputError(
            "resume=auto: the jobs of a sweep would all go on with one run; name each one's folder, as in "
            "run_dir='runs/sweep/${hydra:job.num}'"
        )
    folder = Path(given) if given else (newest_run(parent) if resume else None) or new_run_dir(parent, job)
    last = folder / "checkpoints" / "last.ckpt"
    if resume:
        return folder, last if last.is_file() else None
    if last.is_file() and of_first_rank is None:
        raise InputError(
            f"run_dir={folder} holds a run already; add resume=auto to continue it, or give another"
        )
    return folder, None


def begin(folder: Path, config: str) -> None:
    """Write the config, begin the log, and delete what a process that was killed while it saved has left."""
    for left in (folder / "checkpoints").glob(".*.tmp"):
        left.unlink(missing_ok=True)
    with replacing(folder / "config.yaml") as aside:
        aside.write_text(config)
    log_to(folder / "log")


def note_command(folder: Path, command: str | None) -> None:
    """Append the command, and when it was given, to commands.txt of a run; nothing outside a command line."""
    if command is not None:
        words = [time.strftime("%Y-%m-%d %H:%M:%S"), *command.split()]
        with open(folder / COMMANDS_FILE, "a") as file:
            print(*words, file=file)


class RunLog(logging.FileHandler):
    """The file that the log of a run goes to."""


def log_to(path: Path) -> None:
    """Also write the log of this process to a file, and no longer to that of a run before: a sweep trains one
    after the other in one process.
    """
    root = logging.getLogger()
    for earlier in [handler for handler in root.handlers if isinstance(handler, RunLog)]:
        root.removeHandler(earlier)
        earlier.close()
    handler = RunLog(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(handler)
