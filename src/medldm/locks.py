"""One folder, one writer: a lock that names its holder.

A lock is the file `.medldm.lock` in the folder, held by `flock`, which a file system lets go of when its
process ends, however it ends; on NFS it holds between machines too. Where a file system keeps such locks to
one machine, or has none, the holder's entry in the file tells: it is touched every few seconds, and one that
is not is left over.
"""

import errno
import fcntl
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from medldm.errors import InputError
from medldm.files import disk_in_one_line, is_alive, this_host

log = logging.getLogger(__name__)
LOCK_FILE = ".medldm.lock"
HEARTBEAT = 10.0  # seconds between two touches of a held lock
PATIENCE = 3.0  # heartbeats that another machine's lock is watched for
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system that has none
HELD: dict[Path, "Lock"] = {}  # of this process, by the folder's real path


class Holder(NamedTuple):
    """Who writes into a folder, as its lock says."""

    host: str
    pid: int
    since: str
    command: str
    machine: str = ""  # `files.this_host`
    job: str | None = None  # of SLURM
    restart: int = 0  # how often SLURM has queued the job again

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} on {self.host}, since {self.since})"


class Lock(NamedTuple):
    descriptor: int
    pid: int
    ended: threading.Event


def this_process() -> Holder:
    words = [Path(sys.argv[0]).stem if sys.argv else "python", *sys.argv[1:2]]
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    command = " ".join(words)[:80]
    return Holder(os.uname().nodename, os.getpid(), since, command, this_host(), *slurm_job())


def slurm_job() -> tuple[str | None, int]:
    """The number of the SLURM job that this process is of, and how often it was queued again."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID"), int(restarts) if restarts.isdigit() else 0


@contextmanager
def one_writer(folder: Path | None, *, wait: float = 0.0) -> Iterator[None]:
    """Nobody else writes into `folder`, which is made where it is not there, while the block runs. None is no
    folder.

    InputError that names the holder where somebody does, still after `wait` seconds. A lock whose process is
    gone is taken over, and so is that of the same SLURM job before it was queued again. In a process that
    holds the folder already this does nothing.
    """
    if folder is None:
        yield
        return
    try:
        with disk_in_one_line(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"{folder}: is a file, or lies below one; give a folder") from error
    place = folder.resolve()
    if place in HELD and HELD[place].pid == os.getpid():
        yield
        return
    HELD[place] = lock = take_lock(place / LOCK_FILE, time.monotonic() + wait)
    try:
        yield
    finally:
        HELD.pop(place, None)
        let_go(place / LOCK_FILE, lock)


def take_lock(path: Path, deadline: float) -> Lock:
    """The lock, or InputError where it is another's still at the `deadline`."""
    while True:
        with disk_in_one_line(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        is_free = try_lock(descriptor)
        holder = read_holder(path)
        if is_free and not is_same_file(descriptor, path):  # its holder has just taken it away
            os.close(descriptor)
            continue
        if is_free and (holder is None or not lives_elsewhere(holder, path)):
            return hold(descriptor, path)
        os.close(descriptor)
        if time.monotonic() >= deadline:
            who = "another process" if holder is None else str(holder)
            raise InputError(
                f"{path.parent}: is being written by {who}; wait for it, or give another folder; if it is "
                f"gone for certain, delete {path}"
            )
        time.sleep(0.2)


def try_lock(descriptor: int) -> bool:
    """Whether no living process holds the lock, as far as the file system knows."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    return True


def is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def read_holder(path: Path) -> Holder | None:
    """Whom a lock names; None where it names nobody."""
    try:
        stated = json.loads(path.read_text())
        return Holder(**{key: stated[key] for key in Holder._fields})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def lives_elsewhere(holder: Holder, path: Path) -> bool:
    """Whether the process that a lock names still runs, where the file system does not know. Of another
    machine that is so if it touches the file within some heartbeats.
    """
    job, restart = slurm_job()
    if job is not None and holder.job == job and holder.restart < restart:
        return False
    if holder.machine == this_host():
        return holder.pid != os.getpid() and not has_locks(path) and is_alive(str(holder.pid))
    before = touched(path)
    log.warning("%s: named by %s; looking whether it still runs", path, holder)
    end = time.monotonic() + PATIENCE * HEARTBEAT
    while time.monotonic() < end:
        time.sleep(min(1.0, HEARTBEAT / 4))
        if touched(path) != before:
            return True
    return False


def has_locks(path: Path) -> bool:
    """Whether the file system keeps locks at all."""
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:
            return False
    return True


def touched(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return None


def hold(descriptor: int, path: Path) -> Lock:
    """Name this process in the lock and touch it from now on."""
    with disk_in_one_line(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(this_process()._asdict()).encode(), 0)
    ended = threading.Event()
    threading.Thread(target=keep_touching, args=(descriptor, ended), daemon=True, name="lock").start()
    return Lock(descriptor, os.getpid(), ended)


def keep_touching(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(descriptor)


def let_go(path: Path, lock: Lock) -> None:
    """Take the lock away and close it. A forked process leaves it to the one that took it."""
    if lock.pid != os.getpid():
        return
    lock.ended.set()
    with suppress(OSError):
        if is_same_file(lock.descriptor, path):
            path.unlink()
    with suppress(OSError):
        os.close(lock.descriptor)


def leave_in_child() -> None:
    """A forked process, such as a loader's worker, does not keep a lock alive whose holder was killed."""
    for lock in HELD.values():
        with suppress(OSError):
            os.close(lock.descriptor)
    HELD.clear()


os.register_at_fork(after_in_child=leave_in_child)
