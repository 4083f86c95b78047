"""Narrowing casts that change no value without saying so."""

import logging
from pathlib import Path

import numpy as np

from medldm.errors import InputError

log = logging.getLogger(__name__)


def exact(x: np.ndarray, dtype: type | str, what: str) -> np.ndarray:
    """`x` as `dtype`, every value kept. InputError that names `what` where one would change."""
    x = np.asarray(x)
    with np.errstate(invalid="ignore", over="ignore"):
        cast = x.astype(dtype)
    if not np.array_equal(cast, x):
        limits = np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else np.finfo(dtype)
        raise InputError(
            f"{what}: values from {x.min():g} to {x.max():g} do not fit {np.dtype(dtype)} "
            f"({limits.min:g} to {limits.max:g})"
        )
    return cast


def within(x: np.ndarray, dtype: type | str, what: str) -> np.ndarray:
    """`x` rounded to the floating `dtype`. InputError that names `what` where values leave its range."""
    limit = float(np.finfo(dtype).max)
    if x.size and float(np.abs(x).max()) > limit:
        raise InputError(f"{what}: values up to {np.abs(x).max():g} do not fit {np.dtype(dtype)} ({limit:g})")
    return x.astype(dtype)


def finite(x: np.ndarray, path: str | Path) -> np.ndarray:
    """float32 with NaN, infinity and what float32 cannot hold replaced by the least finite value, and a
    warning that counts them.
    """
    with np.errstate(over="ignore"):  # counted below
        x = np.asarray(x, np.float32)
    good = np.isfinite(x)
    if good.all():
        return x
    if not good.any():
        raise InputError(f"{path}: holds no finite value; remove its case")
    log.warning(
        "%s: %d values are not finite in float32; they become %g",
        *(path, x.size - int(good.sum()), x[good].min()),
    )
    return np.where(good, x, x[good].min())
