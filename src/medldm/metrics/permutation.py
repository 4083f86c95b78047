"""Permutation tests of whether a difference is more than chance. They exchange subjects, which are
independent.

p = (1 + permutations that do as well) / (1 + permutations), so it is never 0 and valid for any number of
them (Phipson and Smyth 2010).
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from medldm.metrics.frechet import polynomial_kernel

PERMUTATIONS_AT_ONCE = 256


def exchanges(groups: Sequence[str], num: int, seed: int) -> np.ndarray:
    """(num, N) bool: for each permutation, which images change sides; those of a group do so together."""
    names, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.random.default_rng(seed).integers(0, 2, (num, len(names))).astype(bool)[:, index]


def kernel_test(x: Tensor, y: Tensor, groups: Sequence[str], *, num: int = 999, seed: int = 0) -> float:
    """p-value of the kernel distance (MMD) of two feature sets (N, D) whose rows belong together in pairs.

    Under the hypothesis that both sets are of one distribution, the generated and the real images of a
    `groups` member (a subject) may change sides (Gretton et al. 2012, with paired blocks).
    """
    n = len(x)
    kernel = polynomial_kernel(torch.cat([x, y]))
    kernel.fill_diagonal_(0)
    total = kernel.sum(0)
    change = torch.from_numpy(exchanges(groups, num, seed))
    change = torch.cat([torch.zeros(1, n, dtype=torch.bool), change])  # the first: as it is
    values = []
    for part in change.split(PERMUTATIONS_AT_ONCE):
        first = torch.cat([~part, part], 1).to(kernel)  # (P, 2N): 1 where an image is on the first side
        second = 1 - first
        on_first = first @ kernel
        on_second = total - on_first
        within = ((on_first * first).sum(1) + (on_second * second).sum(1)) / (n * (n - 1))
        values.append(within - 2 * (on_first * second).sum(1) / n**2)
    values = torch.cat(values)
    return p_value(values[1:].cpu().numpy(), float(values[0]))


def sign_test(differences: np.ndarray, subjects: Sequence[str], *, num: int = 9999, seed: int = 0) -> float:
    """Two-sided p-value of the mean of paired differences (N,): subjects' signs are exchanged."""
    names, index = np.unique(np.asarray(subjects), return_inverse=True)
    sums = np.bincount(index, weights=differences, minlength=len(names))
    rng = np.random.default_rng(seed)
    totals = []
    for start in range(0, num, PERMUTATIONS_AT_ONCE):
        signs = rng.integers(0, 2, (min(PERMUTATIONS_AT_ONCE, num - start), len(names))) * 2 - 1
        totals.append(np.abs(signs @ sums))
    return p_value(np.concatenate(totals), float(abs(sums.sum())))


def p_value(permuted: np.ndarray, observed: float) -> float:
    """Share of the permutations, the observed order among them, that reach the observed value."""
    # Equal sums in another order differ by rounding.
    tolerance = 1e-9 * max(abs(observed), float(np.abs(permuted).max(initial=0)))
    return float((1 + (permuted >= observed - tolerance).sum()) / (1 + len(permuted)))
