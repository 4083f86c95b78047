"""Run folders: runs/<experiment>/<time>/{config.yaml, checkpoints/, metrics.csv, samples/, log}."""

import logging
import time
from pathlib import Path


def new_run_dir(parent: Path) -> Path:
    """A folder name that does not exist yet: the time, and a number where two runs start in one second."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    candidates = (parent / (stamp if i == 0 else f"{stamp}-{i}") for i in range(1000))
    return next(path for path in candidates if not path.exists())


def newest_run(parent: Path) -> Path | None:
    """The run of this experiment whose last.ckpt is the newest."""
    checkpoints = list(parent.glob("*/checkpoints/last.ckpt"))
    return max(checkpoints, key=lambda path: path.stat().st_mtime).parents[1] if checkpoints else None


def log_to(path: Path) -> None:
    """Also write the log of this process to a file."""
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
