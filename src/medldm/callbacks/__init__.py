"""Training callbacks: moving average, checkpoints, signals, pictures, metrics that survive a resume."""

from medldm.callbacks.divergence import SkipNonFinite
from medldm.callbacks.ema import EMA
from medldm.callbacks.latents import LatentStatistics
from medldm.callbacks.metrics_file import MetricsFile
from medldm.callbacks.pictures import Pictures
from medldm.callbacks.power_averages import PowerAverages
from medldm.callbacks.progress import ProgressBar, ProgressLines
from medldm.callbacks.recovery import (
    EXIT_REQUEUE,
    Checkpoints,
    CountUpdates,
    Interrupted,
    RandomState,
    StopOnSignal,
)

__all__ = [
    "EMA",
    "EXIT_REQUEUE",
    "Checkpoints",
    "CountUpdates",
    "Interrupted",
    "LatentStatistics",
    "MetricsFile",
    "Pictures",
    "PowerAverages",
    "ProgressBar",
    "ProgressLines",
    "RandomState",
    "SkipNonFinite",
    "StopOnSignal",
]
