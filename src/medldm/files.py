"""Files that are whole or absent (written beside their place, synced and renamed), safe names for them, and
walks through folders that follow links.
"""

import errno
import glob
import hashlib
import io
import json
import os
import re
import socket
import time
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import h5py
    import numpy as np

from medldm.errors import InputError

TEMPORARY = ".tmp"
ABANDONED = 86_400  # seconds after which a temporary file of another host is taken for left over
FULL_WHILE_SAVING = re.compile("StreamWriter|unexpected pos")  # what torch.save says of a full disk
AGAIN = "then run the same command again: what is finished stays"
DISK_FAULTS = {
    errno.ENOSPC: f"the disk is full; free some space, {AGAIN}",
    errno.EDQUOT: f"your quota is used up; free some space, {AGAIN}",
    errno.EROFS: f"the file system is read-only; make it writable or choose another folder, {AGAIN}",
    errno.EACCES: f"you have no permission; change it or choose another folder, {AGAIN}",
    errno.EPERM: f"it is not permitted; change that or choose another folder, {AGAIN}",
}
UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')  # in no file name of one system or another
RESERVED = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)  # by Windows
LONGEST = 180  # bytes of a name, which leaves room for what commands append to it


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes `path`'s place only if the block ends well.

    File and folder are synced: a crash at any moment leaves the old file or the new one. What a killed
    process left of the same file is removed. InputError where the disk is full or takes no writes.
    """
    with disk_in_one_line(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        temporary = path.with_name(f".{path.name}.{this_host()}-{os.getpid()}{TEMPORARY}")
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        finally:
            with suppress(OSError):  # a file system that failed meanwhile has told so already
                temporary.unlink(missing_ok=True)
        sync(path.parent)


def remove_abandoned(path: Path) -> None:
    """Remove the temporary files of `path` whose process on this host is gone, or that are a day old."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*{TEMPORARY}"):
        host, _, process = left.name.removesuffix(TEMPORARY).removeprefix(f".{path.name}.").rpartition("-")
        with suppress(OSError):  # another process may have removed it
            is_old = time.time() - left.stat().st_mtime > ABANDONED
            if is_old or (host == this_host() and not is_alive(process)):
                left.unlink()


def this_host() -> str:
    """Eight letters for this machine's name, so that temporary names stay short."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def is_alive(process: str) -> bool:
    """Whether a process of this number runs on this host; it may be another user's."""
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def disk_in_one_line(path: Path) -> Iterator[None]:
    """A disk that is full or takes no writes becomes an InputError that names `path`."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        reason = disk_fault(error)
        if reason is None and isinstance(error, RuntimeError) and FULL_WHILE_SAVING.search(str(error)):
            reason = DISK_FAULTS[errno.ENOSPC]
        if reason is None:
            raise
        raise InputError(f"{path}: not written: {reason}") from error


def disk_fault(error: BaseException) -> str | None:
    """What is wrong with the disk and how to mend it, or None where `error` has another reason."""
    number = getattr(error, "errno", None)
    if number is None and (told := re.search(r"errno = (\d+)", str(error))):  # of HDF5
        number = int(told[1])
    return DISK_FAULTS.get(number)


def sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path, mend: str) -> dict:
    """The mapping that a JSON file holds; InputError with the `mend` where it is missing or damaged."""
    if not path.is_file():
        raise InputError(f"{path}: not found; {mend}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise InputError(f"{path}: not valid JSON ({reason}); {mend}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__} in the place of a mapping; {mend}")
    return content


def write_json(path: Path, content: dict) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def leads_out(path: str) -> bool:
    """Whether a path is no name of something below a folder: absolute, by way of `..`, or no path at all."""
    steps = re.split(r"[/\\]", path)
    return not path.strip("/\\. ") or "\0" in path or ".." in steps or not steps[0]


def inside(folder: Path, *parts: str) -> Path:
    """The path of something below `folder`, made of names that anyone may have chosen. Every file that is
    named by a case, a subject or a file of somebody's is written to a path from here.

    InputError where it would lie elsewhere: by `..`, as an absolute path, or because a folder on the way is a
    link that leads out. A file that is a link is replaced, so that what it leads to stays as it is.
    """
    path = folder.joinpath(*parts)
    if any(map(leads_out, parts)):
        raise InputError(f"{path}: leads out of {folder}; nothing is written there, rename it at its origin")
    if not path.parent.resolve().is_relative_to(folder.resolve()):
        raise InputError(
            f"{path.parent}: is a link that leads out of {folder}; put the folder itself into its place"
        )
    return path


def safe_name(name: str) -> str:
    """`name` where every system takes it for one visible file inside its folder, else a name made of it:
    other characters for those that part folders or are refused, and a digest in place of what is too long.
    """
    safe = UNSAFE.sub("_", unicodedata.normalize("NFC", name))
    safe = re.sub(r"^[.\s]|[.\s]$", "_", safe) or "_"
    safe = f"_{safe}" if RESERVED.fullmatch(safe) else safe
    return safe if len(safe.encode()) <= LONGEST else with_digest(safe, name)


def with_digest(safe: str, name: str) -> str:
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).hexdigest()[:8]
    kept = safe.encode()[: LONGEST - len(digest) - 1].decode(errors="ignore")
    return f"{kept}-{digest}"


def safe_names(names: Iterable[str]) -> dict[str, str]:
    """{name: file name} of different names, different also where a disk ignores case. Those that would be
    equal there all get a digest, so that a name's file does not depend on their order.
    """
    safe = {name: safe_name(name) for name in names}
    count = Counter(value.casefold() for value in safe.values())
    return {
        name: value if count[value.casefold()] == 1 else with_digest(value, name)
        for name, value in safe.items()
    }


def is_hidden(name: str) -> bool:
    """Whether a file or folder is the system's, not the dataset's: `._scan.nii` of a Mac, `.DS_Store`..."""
    return name.startswith(".") or name == "__MACOSX"


def walk(
    folder: Path, *, with_hidden: bool = False, above: tuple[str, ...] = ()
) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of what is no folder in it) of a folder and all below it, in order. Links are followed,
    but those to a folder `above` them. InputError where a folder cannot be read.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as entries:
            kinds = {entry.name: entry.is_dir() for entry in entries}
    except OSError as error:
        raise InputError(f"{folder}: cannot be read ({error.strerror}); allow it, or take it away") from error
    names = sorted(name for name in kinds if with_hidden or not is_hidden(name))
    yield folder, [name for name in names if not kinds[name]]
    for name in names:
        if kinds[name]:
            yield from walk(folder / name, with_hidden=with_hidden, above=(*above, real))


@contextmanager
def nothing_empty(folder: Path | None) -> Iterator[None]:
    """After a failure before anything was written, `folder` is as it was before: no empty folder is left, and
    none that holds a provenance.json alone. None is no folder.
    """
    if folder is None:
        yield
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    provenance = folder / "provenance.json"
    is_new = not provenance.exists()
    try:
        yield
    except BaseException:
        if is_new and folder.is_dir() and not set(folder.iterdir()) - {provenance}:
            provenance.unlink(missing_ok=True)
        for path in made:  # the innermost first
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        raise


@contextmanager
def writing_hdf5(path: Path) -> Iterator["h5py.File"]:
    """A new HDF5 file that is made in memory and written in one piece when the block ends well.

    On a full disk the HDF5 library prints a line for every open object and may crash the interpreter, whereas
    a failed write of bytes is an OSError.
    """
    import h5py

    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        yield file
    path.write_bytes(buffer.getbuffer())


def write_nifti(path: Path, array: "np.ndarray", affine: "np.ndarray") -> None:
    """(X, Y, Z) or (X, Y, Z, N) as a compressed NIfTI file."""
    import gzip

    import nibabel

    with replacing(path) as aside:
        aside.write_bytes(gzip.compress(nibabel.Nifti1Image(array, affine).to_bytes(), compresslevel=3))
