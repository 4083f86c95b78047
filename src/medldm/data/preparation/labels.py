"""Raw labels of a class map become the classes of a dataset."""

from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medldm.data.preparation.casts import exact
from medldm.errors import InputError

NUM_STORABLE = 2**16  # classes that a stored map can number


def as_classes(x: np.ndarray, what: str) -> np.ndarray:
    """Class numbers in the smallest of uint8 and uint16 that holds them. InputError where neither does."""
    return exact(x, np.uint8 if x.size == 0 or x.max() < 256 else np.uint16, what)


@dataclass(frozen=True)
class Labels:
    """Known classes: `names[i]` belongs to class i; `mapping` sends raw label values to classes."""

    names: tuple[str, ...] | None = None
    mapping: Mapping[int, int] | None = None

    def __post_init__(self) -> None:
        for value in (self.mapping or {}).values():
            if value not in range(NUM_STORABLE):
                raise InputError(
                    f"data.preprocess.labels.mapping: {value} is no class; give whole numbers from 0 to "
                    f"{NUM_STORABLE - 1}"
                )

    def __call__(self, mask: np.ndarray, path: str | Path) -> np.ndarray:
        """Raw labels -> uint8 or uint16 classes; InputError on a value that is negative, fractional, not
        finite or unknown.
        """
        if not np.issubdtype(mask.dtype, np.integer):
            if not np.isfinite(mask).all():
                raise InputError(
                    f"{path}: the mask holds {np.size(mask) - int(np.isfinite(mask).sum())} values that are "
                    "no numbers (NaN); write the background's class there"
                )
            if np.abs(mask - np.rint(mask)).max() > 1e-3:
                raise InputError(
                    f"{path}: a mask must hold whole class numbers; resample it by nearest neighbour"
                )
        rounded = np.rint(mask)
        values = np.unique(rounded).astype(np.int64)
        if self.mapping is not None:
            return self.remap(rounded, values, path)
        known = range(len(self.names)) if self.names is not None else range(NUM_STORABLE)
        self.reject(values, known, path, f"0..{len(known) - 1}")
        return as_classes(rounded, path)

    def remap(self, mask: np.ndarray, values: np.ndarray, path: str | Path) -> np.ndarray:
        self.reject(values, self.mapping, path, str(sorted(self.mapping)))
        out = np.zeros(mask.shape, np.uint8 if max(self.mapping.values()) < 256 else np.uint16)
        for value in values.tolist():
            out[mask == value] = self.mapping[value]
        return out

    def reject(self, values: np.ndarray, known: Container[int], path: str | Path, which: str) -> None:
        """InputError where a mask holds values beyond the known, with an override that takes it: what is
        unknown becomes the class of its number, where there is one, else background.
        """
        unknown = [value for value in values.tolist() if value not in known]
        if unknown:
            names = self.names or ("background",)
            new = {value: value if 0 <= value < len(names) else 0 for value in unknown}
            kept = {} if self.mapping is not None else {v: v for v in values.tolist() if v in known}
            meaning = ", ".join(f"{value} is {names[number]}" for value, number in list(new.items())[:3])
            raise InputError(
                f"{path}: the mask holds label {', '.join(map(str, unknown[:5]))}, known are {which}; "
                f"correct the mask, or map it: {mapping_override(kept | new)} (so {meaning})"
            )


def mapping_override(mapping: Mapping[int, int]) -> str:
    """The override that adds to `data.preprocess.labels.mapping`, as it is typed into a shell."""
    pairs = ", ".join(f"{value}: {number}" for value, number in sorted(mapping.items()))
    return f"+data.preprocess.labels.mapping='{{{pairs}}}'"


def relabelled(mask: np.ndarray, relabel: Mapping[int, int]) -> np.ndarray:
    """A mask in another release's numbers; values that `relabel` does not name stay."""
    out = mask.copy()
    for value, number in relabel.items():
        out[mask == value] = number
    return out
