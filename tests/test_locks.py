"""One folder, one writer: who holds it is told, and what a killed process left is taken over."""

import errno
import json
import os
import signal
import threading
import time

import pytest

from medldm import locks
from medldm.errors import InputError
from medldm.locks import LOCK_FILE, one_writer, this_process

ELSEWHERE = {"host": "node7", "pid": 7, "since": "2026-11-27 12:00:00", "command": "train x", "machine": "m"}


def in_child(folder):
    """A forked process that holds the folder until it is told to end; its number."""
    ready, told = os.pipe()
    child = os.fork()
    if child == 0:
        with one_writer(folder):
            os.write(told, b"!")
            signal.pause()
    os.read(ready, 1)
    return child


def write_lock(folder, **changes):
    entry = ELSEWHERE | {"job": None, "restart": 0} | changes
    (folder / LOCK_FILE).write_text(json.dumps(entry))


@pytest.fixture
def hasty(monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT", 0.05)


def test_a_held_folder_is_refused_by_the_name_of_its_holder_and_free_once_that_is_killed(tmp_path):
    child = in_child(tmp_path)
    host = os.uname().nodename
    with pytest.raises(InputError, match=rf"being written by .*process {child} on {host}, since 20\d\d-"):
        one_writer(tmp_path).__enter__()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with one_writer(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / LOCK_FILE).exists()


def test_waiting_for_a_folder_takes_it_when_it_is_let_go(tmp_path):
    child = in_child(tmp_path)
    threading.Timer(0.3, os.kill, (child, signal.SIGKILL)).start()
    with one_writer(tmp_path, wait=20):
        pass
    os.waitpid(child, 0)


def test_a_process_may_take_a_folder_twice_and_a_forked_one_does_not_keep_it(tmp_path):
    with one_writer(tmp_path), one_writer(tmp_path / "."):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with one_writer(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_lock_of_another_machine_holds_as_long_as_it_is_touched(tmp_path, hasty):
    write_lock(tmp_path)
    ended = threading.Event()

    def touch():
        while not ended.wait(0.02):
            os.utime(tmp_path / LOCK_FILE)

    thread = threading.Thread(target=touch)
    thread.start()
    with pytest.raises(InputError, match=r"`train x` \(process 7 on node7, since 2026-11-27 12:00:00\)"):
        one_writer(tmp_path).__enter__()
    ended.set()
    thread.join()
    with one_writer(tmp_path):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["machine"] == this_process().machine


def test_a_job_that_was_queued_again_takes_its_own_lock_over_at_once(tmp_path, monkeypatch):
    write_lock(tmp_path, job="12", restart=0)
    monkeypatch.setattr(locks, "HEARTBEAT", 1000.0)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    start = time.monotonic()
    with one_writer(tmp_path):
        assert time.monotonic() - start < 5


def test_without_locks_of_the_file_system_the_process_that_is_named_decides(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(locks.fcntl, "flock", unsupported)
    write_lock(tmp_path, machine=this_process().machine, pid=os.getppid())
    with pytest.raises(InputError, match=f"process {os.getppid()}"):
        one_writer(tmp_path).__enter__()
    write_lock(tmp_path, machine=this_process().machine, pid=2**22 + 1)
    with one_writer(tmp_path):
        pass


def test_a_damaged_lock_is_nobodys_and_a_file_is_no_folder(tmp_path):
    (tmp_path / LOCK_FILE).write_text("{")
    with one_writer(tmp_path):
        pass
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file, or lies below one"):
        one_writer(tmp_path / "file/x").__enter__()
