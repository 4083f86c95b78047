"""Checks devices with their drivers and memory, the free space on disks, and the cluster."""

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from medldm.devices import Gpu, Hardware, choose_settings, find_hardware, list_gpus
from medldm.doctor.finding import TO_NOTE, WRONG, Finding

BYTES_PER_GIB = 2**30
MIN_DISK = 1.0  # GiB: below it a run cannot write its checkpoints
AMPLE_DISK = 20.0  # GiB: below it a run of several stages may fill the disk
MIN_SHARED = 0.5  # GiB of /dev/shm, through which workers pass batches
SHARED_MEMORY = Path("/dev/shm")


class Machine(NamedTuple):
    """The facts of a machine, apart from their assessment, so that tests can describe other machines."""

    hardware: Hardware
    gpus: Sequence[Gpu]
    driver: str | None  # version of NVIDIA's driver, None where there is none
    torch_cuda: str | None  # CUDA version that torch was built for
    has_nccl: bool
    memory_gib: float | None  # free memory of the host
    num_cores: int
    slurm: str | None  # version of SLURM
    job: str | None  # id of the SLURM job that this process runs in


def find_machine() -> Machine:
    return Machine(
        hardware=find_hardware(),
        gpus=list_gpus(),
        driver=output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        torch_cuda=torch.version.cuda,
        has_nccl=dist.is_available() and dist.is_nccl_available(),
        memory_gib=available_memory(),
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        slurm=output_of("sbatch", "--version"),
        job=os.environ.get("SLURM_JOB_ID"),
    )


def output_of(*command: str) -> str | None:
    """The first line that a program prints; None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = done.stdout.splitlines()
    return lines[0].strip() if lines else None


def available_memory() -> float | None:
    """The GiB of the host's memory that a process can still allocate, None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = next((line for line in lines if line.startswith("MemAvailable:")), None)
    return int(found.split()[1]) / 2**20 if found else None


def device_findings(machine: Machine) -> Iterator[Finding]:
    """Findings about the host, the driver and every GPU, and what `auto` means on this machine."""
    free = "" if machine.memory_gib is None else f", {machine.memory_gib:.1f} GiB of memory free"
    yield Finding("device", "host", f"{machine.num_cores} cores, {torch.get_num_threads()} threads{free}")
    built = f"torch {torch.__version__} was built for CUDA {machine.torch_cuda or 'none'}"
    if machine.driver is not None and not machine.gpus:
        text = f"driver {machine.driver}, but torch finds no GPU; {built}"
        mend = "install a torch that was built for this driver's CUDA (`nvidia-smi` names it), or free a GPU"
        yield Finding("device", "GPU", text, WRONG, mend)
    elif not machine.gpus:
        text = f"none; {built}"
        yield Finding("device", "GPU", text, TO_NOTE, "the demo runs on a CPU, real trainings want a GPU")
    for gpu in machine.gpus:
        state = TO_NOTE if gpu.free_gib < gpu.total_gib / 2 else "ok"
        mend = "another process holds most of its memory (`nvidia-smi` names it)" if state == TO_NOTE else ""
        text = (
            f"{gpu.name}, compute capability {gpu.capability[0]}.{gpu.capability[1]}, "
            f"{gpu.free_gib:.1f} of {gpu.total_gib:.1f} GiB free, driver {machine.driver or 'unknown'}"
        )
        yield Finding("device", f"cuda:{gpu.index}", text, state, mend)
    chosen = choose_settings(hardware=machine.hardware)
    layout = "channels_last" if chosen.channels_last else "contiguous"
    yield Finding("device", "auto means", f"{machine.hardware.kind}, {chosen.precision}, {layout}")


def disk_findings(folders: Sequence[Path]) -> Iterator[Finding]:
    """Findings about the free space for runs, data and temporary files, and in shared memory."""
    for folder in folders:
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / BYTES_PER_GIB
        state = WRONG if free < MIN_DISK else TO_NOTE if free < AMPLE_DISK else "ok"
        mend = "" if state == "ok" else "make room, or write elsewhere (paths.output_root=DIR, MEDLDM_OUTPUT)"
        yield Finding("room", str(folder), f"{free:.1f} GiB free", state, mend)
        if not os.access(there, os.W_OK):
            yield Finding("room", str(folder), "not writable", WRONG, f"allow writing in {there}")
    if SHARED_MEMORY.is_dir():
        free = shutil.disk_usage(SHARED_MEMORY).free / BYTES_PER_GIB
        mend = "" if free >= MIN_SHARED else "enlarge it (docker: --shm-size=8g), or set data.num_workers=0"
        yield Finding(
            "room", str(SHARED_MEMORY), f"{free:.1f} GiB for workers", TO_NOTE if mend else "ok", mend
        )


def cluster_findings(machine: Machine) -> Iterator[Finding]:
    """Findings about SLURM, and about the library by which processes of one training communicate."""
    if machine.slurm is None:
        yield Finding("cluster", "SLURM", "not on this machine", TO_NOTE, "only slurm/*.sh need it")
    else:
        where = f", in job {machine.job}" if machine.job else ""
        yield Finding("cluster", "SLURM", f"{machine.slurm}{where}")
    if machine.has_nccl:
        yield Finding("cluster", "NCCL", "there: several GPUs can train together")
    elif len(machine.gpus) > 1:
        mend = "install a torch that has it, or train with trainer.devices=1"
        yield Finding("cluster", "NCCL", f"missing, for {len(machine.gpus)} GPUs", WRONG, mend)
    else:
        yield Finding("cluster", "NCCL", "not in this torch; one device does not need it")
