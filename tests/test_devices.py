"""What follows from the hardware is asked for as if on it: no GPU is needed."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from medldm import devices
from medldm.devices import CPU, GPU, Hardware, choose_settings, inference_precision, pick_device
from medldm.errors import InputError

AMX = Hardware("cpu", multiplies_bf16=True)
TURING = Hardware("cuda", multiplies_bf16=False, count=2)


@pytest.mark.parametrize(
    ("hardware", "precision", "channels_last", "matmul", "pins", "compiles"),
    [
        (GPU, "bf16-mixed", True, "high", True, True),
        (TURING, "32-true", True, "high", True, True),
        (AMX, "bf16-mixed", True, "highest", False, False),
        (CPU, "32-true", False, "highest", False, False),
    ],
)
def test_auto_follows_the_hardware(hardware, precision, channels_last, matmul, pins, compiles):
    settings = choose_settings(hardware=hardware)
    assert settings == devices.DeviceSettings(precision, channels_last, matmul, pins, compiles)
    for choice in (True, False):
        assert choose_settings(channels_last=choice, hardware=hardware).channels_last is choice
        assert choose_settings(compiles=choice, hardware=hardware).compiles is choice
    assert not choose_settings(pin_memory=False, hardware=hardware).pin_memory


def test_a_training_on_the_cpu_of_a_machine_with_a_gpu_gets_the_settings_of_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(devices, "has_amx", lambda: False)
    assert devices.find_hardware() == Hardware("cuda", True, 4)
    assert devices.find_hardware("cpu") == CPU
    options = {"accelerator": "auto", "devices": "auto", "num_nodes": 2}
    assert devices.num_processes(options) == 8
    assert devices.num_processes(options | {"accelerator": "cpu"}) == 2
    assert inference_precision("auto", torch.device("cuda")) == "bf16-mixed"
    assert inference_precision("auto", torch.device("cpu")) == "32-true"


@pytest.mark.parametrize("precision", ["16-true", "16-mixed", "bf16-true", "64-true", "half", 16])
def test_an_unknown_precision(precision):
    message = f"trainer.precision={precision} is none of auto, 32-true, bf16-mixed"
    with pytest.raises(InputError, match=message):
        choose_settings(precision, hardware=GPU, key="trainer.precision")


def test_lightning_s_short_names_of_a_precision():
    assert choose_settings(32, hardware=GPU).precision == "32-true"
    assert choose_settings("bf16", hardware=CPU).precision == "bf16-mixed"
    with pytest.raises(InputError, match="channels_last=fast is none of"):
        choose_settings(channels_last="fast", hardware=CPU)
    with pytest.raises(InputError, match="compile=fast is none of"):
        choose_settings(compiles="fast", hardware=CPU)


@pytest.mark.parametrize(
    ("name", "hardware", "message"),
    [
        ("cuda", CPU, "device=cuda: .*finds no CUDA device.* take device=cpu"),
        ("cuda:2", TURING, "device=cuda:2: this machine has 2 CUDA devices"),
        ("gpu", TURING, "device=gpu is none of auto, cpu, cuda"),
        ("mps", CPU, "device=mps is none of"),
        ("meta", CPU, "device=meta is none of"),
        ("", CPU, "device= is none of"),
        ("0", GPU, "device=0 is none of"),
    ],
)
def test_a_device_that_is_not_there(name, hardware, message):
    with pytest.raises(InputError, match=message):
        pick_device(name, hardware)


def test_the_device_of_auto():
    assert pick_device("auto", GPU).type == "cuda" and pick_device("auto", AMX).type == "cpu"
    assert pick_device("cuda:1", TURING) == torch.device("cuda:1")
    assert pick_device("cpu", GPU) == torch.device("cpu")


@pytest.mark.parametrize(
    ("accelerator", "given", "hardware", "message"),
    [
        ("gpu", 1, CPU, "trainer.accelerator=gpu with devices=1: .*no CUDA device.*trainer.accelerator=cpu"),
        ("cuda", "auto", CPU, "no CUDA device"),
        ("tpu", 1, GPU, "trainer.accelerator=tpu is none of auto, cpu, gpu, cuda"),
        ("auto", 3, TURING, "this machine has 2 CUDA devices"),
        ("auto", [0, 5], TURING, "this machine has 2 CUDA devices"),
        ("cpu", 0, GPU, "trainer.devices=0: give at least one"),
        ("cpu", "two", GPU, "trainer.devices=two is neither"),
    ],
)
def test_an_accelerator_that_is_not_there(accelerator, given, hardware, message):
    with pytest.raises(InputError, match=message):
        devices.check_accelerator(accelerator, given, hardware)


@pytest.mark.parametrize("given", [1, 2, "2", "0,1", [0, 1], "auto", -1])
def test_devices_that_are_there(given):
    devices.check_accelerator("auto", given, TURING)
    devices.check_accelerator("cpu", given, CPU)


def test_each_weight_is_laid_out_by_its_own_rank():
    module = nn.ModuleList([nn.Conv3d(2, 4, 3), nn.Conv2d(2, 4, 3), nn.Linear(2, 2), nn.BatchNorm2d(3)])
    module.register_buffer("table", torch.zeros(2, 3, 4, 5))
    before = {name: value.clone() for name, value in module.state_dict().items()}
    devices.to_channels_last(module)
    assert module[0].weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert module[1].weight.is_contiguous(memory_format=torch.channels_last)
    assert module.table.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    batch = {"latent": torch.zeros(1, 4, 2, 3, 4), "label": torch.zeros(1), "case_id": ["a"]}
    laid_out = devices.in_channels_last(batch)
    assert laid_out["latent"].is_contiguous(memory_format=torch.channels_last_3d)
    assert laid_out["case_id"] == ["a"]


@pytest.mark.parametrize("dims", [2, 3])
def test_one_channel_is_laid_out_so_that_a_convolution_goes_on_with_channels_last(dims):
    """Its memory is the same in both layouts."""
    layer = {2: nn.Conv2d, 3: nn.Conv3d}[dims](1, 4, 3, padding=1)
    x = torch.randn(2, 1, *(5,) * dims)
    wanted = layer(x)
    assert wanted.is_contiguous()
    devices.to_channels_last(layer)
    found = layer(devices.in_channels_last({"image": x})["image"])
    assert found.is_contiguous(memory_format=devices.LAYOUTS[dims + 2]) and not found.is_contiguous()
    torch.testing.assert_close(found, wanted)
    assert not layer(x).is_contiguous()  # the layout of the weights is enough


def test_the_hardware_is_asked_in_one_place():
    asks = re.compile(
        r"cuda\.is_available|is_bf16_supported|device_count|_amx|accelerator\.is_available|is_cuda"
        r"|device\.type\s*[!=]="
    )
    source = Path(devices.__file__).parent
    found = [
        f"{path.relative_to(source)}:{number}"
        for path in sorted(source.rglob("*.py"))
        if path.name not in ("devices.py", "doctor.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if asks.search(line)
    ]
    assert not found
