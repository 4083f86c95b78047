"""Files that are whole or absent, and what is said of a disk that takes no more."""

import errno
import os
import time

import h5py
import pytest

from medldm.errors import InputError
from medldm.files import ABANDONED, replacing, this_host, writing_hdf5

DEAD = 2**22 + 1  # no process can have this number: /proc/sys/kernel/pid_max is at most 2**22


def test_what_a_killed_process_left_of_the_same_file_goes(tmp_path):
    left, elsewhere, alive, old, other = (
        tmp_path / f".{name}.tmp"
        for name in (
            f"a.json.{this_host()}-{DEAD}",
            f"a.json.0123abcd-{DEAD}",
            f"a.json.{this_host()}-{os.getppid()}",
            "a.json.0123abcd-7",
            f"b.json.{this_host()}-{DEAD}",
        )
    )
    for path in (left, elsewhere, alive, old, other):
        path.write_text("half")
    os.utime(old, (time.time() - ABANDONED - 60,) * 2)
    with replacing(tmp_path / "a.json") as aside:
        aside.write_text("whole")
    assert (tmp_path / "a.json").read_text() == "whole"
    assert not left.exists() and not old.exists()
    assert elsewhere.exists() and alive.exists() and other.exists()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "the disk is full"),
        (OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)), "quota"),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), "read-only"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES)), "permission"),
        (
            RuntimeError("[enforce fail at inline_container.cc:664] . PytorchStreamWriter failed writing"),
            "full",
        ),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 155200 vs 155088"), "full"),
        (RuntimeError("Can't decrement id ref count (file write failed: errno = 28, error ...)"), "full"),
    ],
)
def test_a_disk_that_takes_no_more_is_told_in_one_line_and_the_old_file_stays(tmp_path, error, words):
    path = tmp_path / "a.json"
    path.write_text("old")
    line = f"a.json: not written: .*{words}.*run the same command again"
    with pytest.raises(InputError, match=line), replacing(path) as aside:
        aside.write_text("new")
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_another_error_is_not_taken_for_the_disk_s(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), replacing(tmp_path / "a") as aside:
        aside.write_text("new")
        raise RuntimeError("shapes differ")


def test_hdf5_is_written_in_one_piece(tmp_path):
    path = tmp_path / "a.h5"
    with writing_hdf5(path) as file:
        file["x"] = [1, 2, 3]
        assert not path.exists()
    with h5py.File(path) as file:
        assert file["x"][()].tolist() == [1, 2, 3]


def test_a_full_device_gives_one_error_and_no_crash(tmp_path):
    path = tmp_path / "a.h5"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"), writing_hdf5(path) as file:
        file["x"] = list(range(10_000))
