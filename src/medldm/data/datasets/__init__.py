"""Published datasets and anyone's folders, one module each.

A module has `index(root, ...) -> list[Case]` and, where splits of its subjects were published,
`published_splits(subjects) -> dict[str, Split]`. Its facts (modalities, classes, ranges) are in configs/data.
"""

from collections.abc import Sequence
from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from medldm.data.splits import Split
from medldm.errors import InputError


def names_of_datasets() -> list[str]:
    return sorted(module.name for module in iter_modules(__path__))


def find_dataset(name: str) -> ModuleType:
    """The module of the dataset that `data.dataset` names. InputError where there is no such dataset."""
    known = names_of_datasets()
    if name not in known:
        raise InputError(f"data.dataset={name}: no such dataset; choose from {', '.join(known)}")
    return import_module(f"{__name__}.{name}")


def published_splits(name: str, subjects: Sequence[str]) -> dict[str, Split]:
    """The splits, by name, that were published for these subjects of a dataset; {} where there are none."""
    module = find_dataset(name) if name in names_of_datasets() else None
    return module.published_splits(subjects) if hasattr(module, "published_splits") else {}
