"""Makes moving averages of any length after training, from stored snapshots. Karras et al. 2024, section 3.

The length is relative: the standard deviation of a profile as a share of the training, 0.05 for instance. At
update n the weights of update k <= n count in proportion to k^c - (k - 1)^c: a power of training time.
"""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from medldm.checkpoints import check_weights, fit_weights, read_checkpoint
from medldm.errors import InputError, unreadable
from medldm.files import replacing

TRACKED = (0.05, 0.1)  # the lengths that are stored, those of the paper
LONGEST_PROFILE = 12**-0.5  # at this length all updates count alike
log = logging.getLogger(__name__)


def exponent(length: float) -> float:
    """c >= 1 of the profile of a relative length in (0, 0.288]: gamma + 1 of the paper's section 3.1."""
    if not 0 < length <= LONGEST_PROFILE:
        raise InputError(
            f"ema_length={length} must lie in (0, {LONGEST_PROFILE:.3f}]: a share of the training"
        )
    low, high = 1.0, 2 / length  # the deviation falls with c, and is below 1 / c
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (c / (c + 2)) ** 0.5 / (c + 1) > length else (low, c)
    return low


def profile(num_updates: int, length: float) -> Tensor:
    """(n,) float64 weights of updates 1 .. n in an average at update n; they sum to 1."""
    c = exponent(length)
    share = torch.arange(num_updates + 1, dtype=torch.float64) / num_updates
    return (share**c).diff()


def decay_at(update: int, length: float) -> float:
    """The share of the average that an update keeps; updates are counted from 1. Section 3.1."""
    return (1 - 1 / update) ** exponent(length)


class Snapshot(NamedTuple):
    """A stored average: the update at which it was written, and its length."""

    update: int
    length: float


def inner_products(profiles: Sequence[Snapshot]) -> Tensor:
    """(K, K) float64 inner products of profiles, each over the updates that both have."""
    last = max(profile.update for profile in profiles)
    exponents = [exponent(profile.length) for profile in profiles]
    steps = torch.arange(last + 1, dtype=torch.float64) / last
    rises = {c: (steps**c).diff() for c in set(exponents)}
    sums = {(a, b): (rises[a] * rises[b]).cumsum(0) for a in rises for b in rises}
    ends = [(p.update, c) for p, c in zip(profiles, exponents, strict=True)]
    rows = [[sums[a, b][min(m, n) - 1] for n, b in ends] for m, a in ends]
    factors = torch.tensor([(last / n) ** c for n, c in ends], dtype=torch.float64)
    return torch.tensor(rows, dtype=torch.float64) * factors.outer(factors)


def combination(stored: Sequence[Snapshot], wanted: Snapshot) -> tuple[Tensor, float]:
    """(K,) float64 factors of stored averages whose sum comes closest to the wanted profile in least squares,
    and the share of its norm that they miss: 0 for a profile that was itself stored.
    """
    products = inner_products([*stored, wanted])
    norms = products.diag().sqrt()
    products = products / norms.outer(norms)  # of profiles scaled to norm 1
    gram, aims = products[:-1, :-1], products[:-1, -1:]
    factors = torch.linalg.lstsq(gram, aims, rcond=1e-12, driver="gelsd").solution[:, 0]
    missed = 1 - 2 * factors @ aims[:, 0] + factors @ gram @ factors
    return factors * norms[-1] / norms[:-1], missed.clamp_min(0).sqrt().item()


# ---- files ----


def snapshots_of(run_dir: Path) -> dict[Snapshot, Path]:
    """The stored averages of a run, in the order of their updates."""
    found = {}
    for path in sorted((run_dir / "averages").glob("*.pt")):
        match = re.fullmatch(r"update_(\d+)_length_([\d.]+)", path.stem)
        if match:
            found[Snapshot(int(match[1]), float(match[2]))] = path
    return found


def write_average(run_dir: Path, snapshot: Snapshot, weights: Mapping[str, Tensor], *, keep: int) -> None:
    """Write one average; of those of its length at most `keep` stay, by taking away every other one."""
    path = run_dir / "averages" / f"update_{snapshot.update:09d}_length_{snapshot.length:g}.pt"
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as aside:
        torch.save(dict(weights), aside)
    same = [found for key, found in snapshots_of(run_dir).items() if key.length == snapshot.length]
    if len(same) > keep:
        for spare in same[-2::-2]:
            spare.unlink()


def read_average(path: Path) -> dict[str, Tensor]:
    with unreadable(f"{path}: not a readable average; delete it"):
        weights = torch.load(path, map_location="cpu", weights_only=True)
    check_weights(weights, str(path))
    return weights


def weighted_sum(factors: Tensor, paths: Iterable[Path]) -> dict[str, Tensor]:
    """The sum of stored averages, computed in float64; buffers that count are those of the last one."""
    total: dict[str, Tensor] = {}
    for factor, path in zip(factors.tolist(), paths, strict=True):
        for name, value in read_average(path).items():
            scaled = factor * value.double() + total.get(name, 0) if value.is_floating_point() else value
            total[name] = scaled
    return total


def use_average(modules: nn.Module, checkpoint: str | Path, length: float) -> Snapshot:
    """Give the averaged modules of a checkpoint the average of this length over its training until then, from
    what was stored beside the checkpoint's folder. Returns the average that it is.
    """
    folder = Path(checkpoint).resolve().parent.parent
    update = read_checkpoint(checkpoint).get("averages", {}).get("num_updates", 0)
    stored = {key: path for key, path in snapshots_of(folder).items() if key.update <= update}
    if not stored:
        raise InputError(
            f"ema_length={length}: no average of this training is stored in {folder / 'averages'}; train "
            "with callbacks=post_hoc_ema"
        )
    wanted = Snapshot(max(key.update for key in stored), length)
    factors, missed = combination(list(stored), wanted)
    log.info(
        "average of length %g at update %d; its profile is missed by %.2g", length, wanted.update, missed
    )
    own = modules.state_dict()
    total = {
        name: value.to(own[name].dtype) if name in own else value
        for name, value in weighted_sum(factors, stored.values()).items()
    }
    fit_weights(modules, total, str(folder / "averages"))
    return wanted
