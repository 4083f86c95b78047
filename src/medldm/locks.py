"""Locks a folder, so that one process at a time writes into it, and names that process to others.

The lock is the file `.medldm.lock` in the folder, locked by `flock`. The operating system releases that lock
when the process ends, however it ends, and NFS keeps it between machines, too. Some file systems keep such
locks within one machine, or have none. There the holder changes the time of the file every few seconds, and a
file whose time no longer changes was left behind by a process that is gone.

Several processes that share the work of one folder (`medldm.shards`) each hold a lock of their share,
`.medldm.2of4.lock`, and take the folder's own lock only while they begin.
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
BEGINNING = 60.0  # seconds for which a share waits for other shares that begin in the same folder
FINISHING = 3600.0  # seconds for which a share waits for another one that puts all shares together
HEARTBEAT = 10.0  # seconds after which a held lock is touched again
PATIENCE = 3.0  # number of heartbeats for which another machine's lock is watched
# errors of a file system without locks
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
HELD: dict[Path, "Lock"] = {}  # the locks of this process, by the real path of the folder


class Holder(NamedTuple):
    """The process that writes into a folder, as its lock names it."""

    host: str
    pid: int
    since: str
    command: str
    machine: str = ""  # `files.this_host`
    job: str | None = None  # the number of the SLURM job
    restart: int = 0  # how often SLURM has queued the job again

    def __str__(self) -> str:
        return f"`{self.command}` (process {self.pid} on {self.host}, since {self.since})"


class Lock(NamedTuple):
    """A lock that this process holds: its file, the process that took it, and what stops the heartbeat."""

    path: Path
    descriptor: int
    pid: int
    ended: threading.Event


def this_process() -> Holder:
    words = [Path(sys.argv[0]).stem if sys.argv else "python", *sys.argv[1:2]]
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    command = " ".join(words)[:80]
    return Holder(os.uname().nodename, os.getpid(), since, command, this_host(), *slurm_job())


def slurm_job() -> tuple[str | None, int]:
    """The number of the SLURM job that this process belongs to, and how often the job was queued again."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID"), int(restarts) if restarts.isdigit() else 0


@contextmanager
def one_writer(
    folder: Path | None, *, wait: float = 0.0, share: tuple[int, int] | None = None
) -> Iterator[None]:
    """A context in which no other process writes into `folder`, which is made where it does not exist. None
    locks nothing. With a `share`, such as (2, 4) for the second of four, the other shares of as many may
    write at the same time.

    InputError names the process that still holds the lock after `wait` seconds. The lock of a process that is
    gone is taken over, and so is that of the same SLURM job before it was queued again. Where this process
    holds the lock already, the context does nothing.
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
    lock = take_folder(place, wait) if share is None else take_share(place, share)
    HELD[place] = lock
    try:
        yield
    finally:
        HELD.pop(place, None)
        let_go(lock)


@contextmanager
def while_beginning(folder: Path, *, wait: float = BEGINNING) -> Iterator[None]:
    """Of the processes that share a folder one at a time runs the block, and no other begins meanwhile.
    Whoever holds the whole folder, or nothing of it, just runs it.
    """
    held = HELD.get(folder.resolve())
    if held is None or held.pid != os.getpid() or held.path.name == LOCK_FILE:
        yield
        return
    lock = take_lock(held.path.with_name(LOCK_FILE), time.monotonic() + wait)
    try:
        yield
    finally:
        let_go(lock)


def take_folder(place: Path, wait: float) -> Lock:
    """The lock of a whole folder; InputError where somebody writes a share of it."""
    lock = take_lock(place / LOCK_FILE, time.monotonic() + wait)
    try:
        for path in place.glob(".medldm.*of*.lock"):
            let_go(take_lock(path, time.monotonic()))
    except BaseException:
        let_go(lock)
        raise
    return lock


def take_share(place: Path, share: tuple[int, int]) -> Lock:
    """The lock of a share; InputError where another process writes it, the whole folder, or a share of
    another number.
    """
    number, count = share
    whole = take_lock(place / LOCK_FILE, time.monotonic() + BEGINNING)
    try:
        for path in place.glob(".medldm.*of*.lock"):
            if not path.name.endswith(f"of{count}.lock"):
                let_go(take_lock(path, time.monotonic()))
        return take_lock(place / f".medldm.{number}of{count}.lock", time.monotonic())
    finally:
        let_go(whole)


def take_lock(path: Path, deadline: float) -> Lock:
    """Takes the lock; InputError where another process still holds it at the `deadline`."""
    while True:
        with disk_in_one_line(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        is_free = try_lock(descriptor)
        holder = read_holder(path)
        if is_free and not is_same_file(descriptor, path):  # its holder has just deleted it
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
    """The holder that a lock names; None where it names nobody."""
    try:
        stated = json.loads(path.read_text())
        return Holder(**{key: stated[key] for key in Holder._fields})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def lives_elsewhere(holder: Holder, path: Path) -> bool:
    """Whether the process that a lock names still runs, where the file system cannot tell. A process of
    another machine does if it touches the file within `PATIENCE` heartbeats.
    """
    job, restart = slurm_job()
    if job is not None and holder.job == job and holder.restart < restart:
        return False
    if holder.machine == this_host():
        return holder.pid != os.getpid() and not has_locks(path) and is_alive(str(holder.pid))
    before = touched(path)
    log.warning("%s: names %s; checking whether that still runs", path, holder)
    end = time.monotonic() + PATIENCE * HEARTBEAT
    while time.monotonic() < end:
        time.sleep(min(1.0, HEARTBEAT / 4))
        if touched(path) != before:
            return True
    return False


def has_locks(path: Path) -> bool:
    """Whether the file system has locks."""
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
    """Names this process in the lock, and touches the file from now on."""
    with disk_in_one_line(path):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(this_process()._asdict()).encode(), 0)
    ended = threading.Event()
    threading.Thread(target=keep_touching, args=(descriptor, ended), daemon=True, name="lock").start()
    return Lock(path, descriptor, os.getpid(), ended)


def keep_touching(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT):
        with suppress(OSError):
            os.utime(descriptor)


def let_go(lock: Lock) -> None:
    """Deletes the lock and closes it. A forked process leaves this to its parent, which took the lock."""
    if lock.pid != os.getpid():
        return
    lock.ended.set()
    with suppress(OSError):
        if is_same_file(lock.descriptor, lock.path):
            lock.path.unlink()
    with suppress(OSError):
        os.close(lock.descriptor)


def leave_in_child() -> None:
    """Closes locks in a forked process, such as a loader's worker: it would keep the lock of a
    killed parent.
    """
    for lock in HELD.values():
        with suppress(OSError):
            os.close(lock.descriptor)
    HELD.clear()


os.register_at_fork(after_in_child=leave_in_child)
