"""Everything that follows from the hardware, chosen here: device, precision, memory layout, chunks of work.

Every choice takes the `Hardware` that it is for, so that a test without a GPU can ask what one would get:
`choose_settings(hardware=GPU)`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from medldm.errors import InputError

# As Lightning calls them. float16 is not among them: its loss scaling would have to know of both optimisers.
PRECISIONS = {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}
ACCELERATORS = ("auto", "cpu", "gpu", "cuda")
ALIASES = {"32": "32-true", "bf16": "bf16-mixed"}
LAYOUTS = {4: torch.channels_last, 5: torch.channels_last_3d}
# Entries of the distance matrix of a codebook that exist at a time, by kind of device: 2^20 floats are 4 MiB,
# within a CPU's cache, and 2^27 keep a GPU busy at 512 MiB.
CHUNK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
# The search of the nearest code finds the minimum of so many codes first, because on a CPU a minimum is
# vectorised and the place of a minimum is not. 0: at once, for a GPU, where each step is one more kernel.
CODES_PER_BLOCK = {"cpu": 128, "cuda": 0}
# Whether all convolutions may be computed in bf16. Not on a CPU: for the gradient of a kernel of three slices
# over two (AVX-512), and for the parts of a kernel that see borders alone (AMX), oneDNN of torch 2.15 gives
# what lies in memory that nobody wrote, so that the same training gives other weights, or NaN, at the next
# start.
TRUSTS_BF16_CONVOLUTIONS = {"cpu": False, "cuda": True}
# Whether float32 convolutions of a single small volume are handed to oneDNN, to which torch 2.15 gives larger
# ones and batches alone: its own kernel takes two to four times as long there (docs/performance.md).
ASKS_ONEDNN = {"cpu": True, "cuda": False}


@dataclass(frozen=True)
class Hardware:
    """What computes: its `kind`, "cuda" or "cpu", and how many devices of it there are (`count`).
    `multiplies_bf16` says whether it does so itself: emulation is slower than float32.
    """

    kind: str
    multiplies_bf16: bool
    count: int = 1

    @property
    def is_gpu(self) -> bool:
        return self.kind == "cuda"


@dataclass(frozen=True)
class Gpu:
    """One CUDA device: its (major, minor) compute `capability`, and its memory in GiB."""

    index: int
    name: str
    capability: tuple[int, int]
    free_gib: float
    total_gib: float


def list_gpus() -> list[Gpu]:
    """The CUDA devices that torch can use, with the memory that is free now."""
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        found.append(Gpu(index, name, capability, free / 2**30, total / 2**30))
    return found


GPU = Hardware("cuda", multiplies_bf16=True)  # Ampere or later; earlier ones train in float32
CPU = Hardware("cpu", multiplies_bf16=False)


def uses_gpu(accelerator: str = "auto") -> bool:
    """Whether Lightning's `accelerator` is a GPU on this machine."""
    return accelerator != "cpu" and torch.cuda.is_available()


def find_hardware(accelerator: str = "auto") -> Hardware:
    """The hardware of this machine; with `accelerator` "cpu", its processor alone."""
    if uses_gpu(accelerator):
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Hardware("cuda", has_bf16, torch.cuda.device_count())
    return Hardware("cpu", has_amx())


def trusts_bf16_convolutions(device: torch.device) -> bool:
    """Whether all convolutions may be computed in bf16 there."""
    return TRUSTS_BF16_CONVOLUTIONS.get(device.type, True)


def asks_onednn(x: torch.Tensor) -> bool:
    """Whether convolutions of volumes like `x` are handed to oneDNN, and not left to torch's choice."""
    is_there = torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled
    return is_there and x.dtype == torch.float32 and ASKS_ONEDNN.get(x.device.type, False)


def has_amx() -> bool:
    """Whether this CPU has instructions that multiply bf16 matrices."""
    return getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()


@dataclass(frozen=True)
class DeviceSettings:
    """How to compute: `precision` as Lightning names it, `channels_last` the memory layout of weights and
    images, `matmul_precision` torch's name of how float32 products are rounded ("high" is TF32), `pin_memory`
    whether batches wait in pages that a device can fetch by itself, `compiles` whether the blocks of networks
    are compiled.
    """

    precision: str
    channels_last: bool
    matmul_precision: str
    pin_memory: bool
    compiles: bool


def choose_settings(
    precision: str | int = "auto",
    channels_last: bool | str = "auto",
    pin_memory: bool = True,
    compiles: bool | str = "auto",
    *,
    hardware: Hardware | None = None,
    key: str = "precision",
) -> DeviceSettings:
    """What the config's values mean on `hardware` (null: this machine). InputError where one is unknown.

    `auto` precision is bf16 where the hardware multiplies it. `auto` layout is channels_last on GPUs and on
    CPUs with AMX: in float32 on others the backward of oneDNN's convolutions takes 1.6 times as long in it
    (docs/performance.md). `auto` compiles on GPUs: on a CPU compiled blocks were slower. Rules, and no
    timings: a resumed run computes what the uninterrupted one would have. `key` is the config's name of the
    precision.
    """
    hardware = find_hardware() if hardware is None else hardware
    name = ALIASES.get(str(precision), str(precision))
    if name == "auto":
        name = "bf16-mixed" if hardware.multiplies_bf16 else "32-true"
    if name not in PRECISIONS:
        raise InputError(f"{key}={precision} is none of auto, {', '.join(PRECISIONS)}; take {key}=auto")
    if channels_last not in (True, False, "auto"):
        raise InputError(f"channels_last={channels_last} is none of true, false, auto")
    if channels_last == "auto":
        channels_last = hardware.is_gpu or hardware.multiplies_bf16
    return DeviceSettings(
        precision=name,
        channels_last=bool(channels_last),
        matmul_precision="high" if hardware.is_gpu else "highest",
        pin_memory=bool(pin_memory) and hardware.is_gpu,
        compiles=compiles_on(hardware, compiles),
    )


def compiles_on(hardware: Hardware, choice: bool | str) -> bool:
    """Whether networks are compiled on `hardware` by the config's `compile`. InputError for other values."""
    if choice not in (True, False, "auto"):
        raise InputError(f"compile={choice} is none of true, false, auto")
    return hardware.is_gpu if choice == "auto" else bool(choice)


class LoopSettings(NamedTuple):
    """How a network runs that a sampler calls many times with the same shapes: `compiles` whether it is
    compiled, `records` whether its kernels are recorded once as a CUDA graph and replayed, so that no step
    waits for the host.
    """

    compiles: bool
    records: bool


def choose_loop(compiles: bool | str = False, *, hardware: Hardware) -> LoopSettings:
    """What the config's `compile` means for a sampler's loop on `hardware`. InputError for other values."""
    is_compiled = compiles_on(hardware, compiles)
    return LoopSettings(is_compiled, records=is_compiled and hardware.is_gpu)


def pick_device(name: str = "auto", hardware: Hardware | None = None) -> torch.device:
    """`auto` is the GPU where there is one. InputError where the named device is not on this machine."""
    hardware = find_hardware() if hardware is None else hardware
    if name == "auto":
        return torch.device(hardware.kind)
    try:
        device = torch.device(str(name))
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"device={name} is none of auto, cpu, cuda, cuda:0, cuda:1 ...; take device=auto")
    if device.type == "cuda":
        require_gpus(f"device={name}", (device.index or 0) + 1, hardware, mend="device=cpu")
    return device


def require_gpus(what: str, count: int, hardware: Hardware, *, mend: str) -> None:
    """InputError where `count` GPUs are more than there are."""
    if not hardware.is_gpu:
        raise InputError(
            f"{what}: torch {torch.__version__} finds no CUDA device on this machine; take {mend}, or see "
            "`nvidia-smi`"
        )
    if count > hardware.count:
        raise InputError(f"{what}: this machine has {hardware.count} CUDA devices; take fewer")


def check_accelerator(accelerator: str, devices: Any, hardware: Hardware) -> None:
    """InputError where Lightning's `accelerator` and `devices` are unknown or are not on this machine."""
    if accelerator not in ACCELERATORS:
        raise InputError(
            f"trainer.accelerator={accelerator} is none of {', '.join(ACCELERATORS)}; "
            "take trainer.accelerator=auto"
        )
    wanted = devices_of(devices)
    if wanted is not None and len(wanted) < 1:
        raise InputError(f"trainer.devices={devices}: give at least one, or auto")
    if accelerator in ("gpu", "cuda") or (accelerator == "auto" and hardware.is_gpu):
        num_needed = max(wanted or [0]) + 1
        require_gpus(
            f"trainer.accelerator={accelerator} with devices={devices}",
            num_needed,
            hardware,
            mend="trainer.accelerator=cpu",
        )


def devices_of(devices: Any) -> list[int] | None:
    """The numbers of the devices that Lightning's `devices` asks for; None for all that there are."""
    if devices in ("auto", -1, "-1"):
        return None
    try:
        if isinstance(devices, str) and "," in devices:
            return [int(index) for index in devices.split(",") if index.strip()]
        return list(range(int(devices))) if isinstance(devices, int | str) else [int(i) for i in devices]
    except (TypeError, ValueError) as error:
        raise InputError(
            f"trainer.devices={devices} is neither a number nor a list of numbers; take trainer.devices=auto"
        ) from error


def num_processes(options: Mapping[str, Any]) -> int:
    """How many processes Lightning starts on all nodes, by its `accelerator`, `devices` and `num_nodes`."""
    wanted = devices_of(options["devices"])
    if wanted is not None:
        count = len(wanted)
    else:
        count = torch.cuda.device_count() if uses_gpu(options["accelerator"]) else 1
    return max(1, count) * int(options["num_nodes"])


def to_channels_last(module: nn.Module) -> None:
    """Lay each weight and buffer out by its own rank, in place: 4-D ones channels_last, 5-D ones
    channels_last_3d. A 3D model may hold 2D discriminators.
    """
    for x in (*module.parameters(), *module.buffers()):
        if x.ndim in LAYOUTS:
            x.data = with_channels_last(x.data)


def in_channels_last(batch: dict) -> dict:
    """The batch with its images and volumes laid out as `to_channels_last` lays out weights."""
    return {
        key: with_channels_last(x) if torch.is_tensor(x) and x.ndim in LAYOUTS else x
        for key, x in batch.items()
    }


def with_channels_last(x: torch.Tensor) -> torch.Tensor:
    """x with its channels last in memory. The memory of one channel is the same in both layouts: there the
    strides say which is meant, or a convolution would take it for the other and hand that on.
    """
    x = x.contiguous(memory_format=LAYOUTS[x.ndim])
    if x.shape[1] != 1:
        return x
    return x.as_strided(x.shape, (x.stride(0), 1, *x.stride()[2:]))


def inference_precision(precision: str | int, device: torch.device, hardware: Hardware | None = None) -> str:
    """ "32-true" or "bf16-mixed". `auto` is bf16 on a GPU that multiplies it, float32 elsewhere."""
    hardware = find_hardware(device.type) if hardware is None else hardware
    if precision == "auto" and device.type != "cuda":
        return "32-true"
    return choose_settings(precision, hardware=hardware).precision


def mixed_precision(device: torch.device, precision: str) -> torch.autocast:
    """The context in which a module on `device` computes at this precision, one of `PRECISIONS`."""
    dtype = PRECISIONS[precision]
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def full_precision(device: torch.device) -> torch.autocast:
    """A context for what must not be rounded to bf16: bounds, codes, the last layer of an image."""
    return torch.autocast(device.type, enabled=False)


def in_precision_of_now(function: Callable, device: torch.device) -> Callable:
    """`function` under autocast, or not, as it is at this moment, whenever it is called."""
    kind = device.type
    is_rounded, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(kind, dtype=dtype, enabled=is_rounded):
            return function(*args, **kwargs)

    return call


def compute_dtype(device: torch.device) -> torch.dtype:
    """The type in which convolutions and products on `device` compute here: autocast's, or float32."""
    enabled = torch.is_autocast_enabled(device.type)
    return torch.get_autocast_dtype(device.type) if enabled else torch.float32


def is_on_host(x: torch.Tensor) -> bool:
    """Whether the values of `x` can be read without waiting: it is on no device, and no mere shape."""
    return x.device.type == "cpu" and not isinstance(x, FakeTensor)


def wait_for(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device: torch.device, *, forget: bool = False) -> tuple[float | None, float | None]:
    """The most GiB that tensors have taken since the last `forget`, and what the allocator held for them;
    None where the device does not tell.
    """
    if device.type != "cuda":
        return None, None
    peaks = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    if forget:
        torch.cuda.reset_peak_memory_stats(device)
    return peaks[0] / 2**30, peaks[1] / 2**30


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """States of the generators that layers such as dropout draw from: the host's, and the device's own."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave; the device's generator is left alone where the state was taken on
    another kind of device.
    """
    torch.set_rng_state(state["cpu"].cpu())
    if "cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
