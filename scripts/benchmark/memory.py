"""Stage one of `medlsdm/autopet_vqgan` as a job of `medldm plan`: its step from shapes alone, or for real."""

import sys
from pathlib import Path

from omegaconf import OmegaConf

from medldm.planning.assume import Experiments, describe_job
from medldm.planning.estimate import Planner, settings
from medldm.planning.step import Job

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.helpers import compose_config

VQGAN = "medlsdm/autopet_vqgan"
ALONE = Experiments(VQGAN, (), lambda name: {})  # it stands on no other experiment


def vqgan_plan(shape: tuple[int, ...], *overrides: str) -> dict:
    size = "image_shape=[" + ",".join(map(str, shape)) + "]"
    cfg = compose_config("plan", f"experiment={VQGAN}", "facts.num_classes=37", size, *overrides)
    return OmegaConf.to_container(cfg, resolve=True)


def vqgan_job(shape: tuple[int, ...], *overrides: str) -> Job:
    return describe_job(vqgan_plan(shape, *overrides), ALONE, ("image", "mask"))


def vqgan_memory(shape: tuple[int, ...], batch_size: int, *overrides: str) -> tuple[float, float]:
    """GiB of one bf16 step with both discriminators, feature matching and LPIPS: what the step makes,
    gradients included, and weights, moments of Adam and buffers in float32. Scratch inside kernels and the
    allocator's fragments are not counted.
    """
    card, habits = settings(vqgan_plan(shape), "h100")
    job = vqgan_job(shape, *overrides)
    memory = Planner(job, card, habits, bf16=True, on_cuda=True, averages=False).estimate(batch_size).memory
    return memory.activations, memory.state
