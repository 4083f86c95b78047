"""`medldm doctor` on this machine, and as if on others."""

import shutil
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from packaging.requirements import Requirement

from medldm.commands import doctor
from medldm.devices import CPU, GPU, Gpu, Hardware
from medldm.doctor.kernels import KernelTest, kernel_findings
from medldm.doctor.machine import Machine, cluster_findings, device_findings, disk_findings
from medldm.doctor.software import software_findings
from medldm.doctor.weights import weight_findings
from tests.helpers import compose_config

H200 = Gpu(0, "NVIDIA H200", (9, 0), free_gib=139.0, total_gib=139.8)
HOST = torch.device("cpu")


def machine(**changes: object) -> Machine:
    facts = {
        "hardware": GPU, "gpus": [H200], "driver": "570.1", "torch_cuda": "13.2", "has_nccl": True,
        "memory_gib": 20.0, "num_cores": 2, "slurm": "slurm 24.05.3", "job": None,
    }  # fmt: skip
    return Machine(**(facts | changes))


def states(findings) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def test_a_sound_machine_ends_0_with_a_table(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(doctor, "find_machine", lambda: machine(hardware=CPU, gpus=[], driver=None))
    doctor.task(compose_config("doctor", f"paths.output_root={tmp_path}", f"data.root={tmp_path / 'new'}"))
    printed = capsys.readouterr()
    assert "0 wrong" in printed.out and not printed.err
    for name in ("conv2d", "conv3d", "attention", "group norm", "AlexNet (LPIPS)", "SLURM", "room: "):
        assert name in printed.out


def test_what_is_wrong_is_named_with_status_1(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "find_machine", lambda: machine(hardware=CPU, gpus=[]))
    with pytest.raises(SystemExit) as stop:
        doctor.task(compose_config("doctor"))
    lines = capsys.readouterr().err.splitlines()
    assert stop.value.code == 1 and len(lines) == 1
    assert lines[0].startswith("medldm doctor: GPU: driver 570.1, but torch finds no GPU")


def test_as_if_on_a_gpu():
    found = list(device_findings(machine()))
    assert set(states(found).values()) == {"ok"}
    assert "cuda, bf16-mixed, channels_last" in [finding.text for finding in found]
    busy = Gpu(1, "NVIDIA GeForce RTX 3090", (8, 6), free_gib=2.0, total_gib=23.6)
    assert states(device_findings(machine(gpus=[H200, busy])))["cuda:1"] == "note"


def test_several_gpus_need_nccl():
    assert states(cluster_findings(machine(gpus=[H200, H200], has_nccl=False)))["NCCL"] == "wrong"
    assert states(cluster_findings(machine(has_nccl=False)))["NCCL"] == "ok"
    assert states(cluster_findings(machine(slurm=None)))["SLURM"] == "note"


def test_kernels_of_this_machine_are_right():
    found = list(kernel_findings(HOST, CPU))
    assert set(states(found)) == {"conv2d", "conv3d", "attention", "group norm"}
    assert set(states(found).values()) == {"ok"}


def broken(x: torch.Tensor) -> torch.Tensor:
    """A normalisation that takes channels_last for contiguous."""
    strided = not x.is_contiguous()
    return F.group_norm(x.roll(1, 1) if strided else x, 4)


def without_bf16(x: torch.Tensor) -> torch.Tensor:
    if x.dtype == torch.bfloat16:
        raise RuntimeError("not implemented for 'BFloat16'\nsecond line")
    return F.silu(x)


@pytest.mark.parametrize(
    ("hardware", "run", "state", "text"),
    [
        (CPU, broken, "wrong", "float32 channels_last: deviates by 1"),
        (GPU, broken, "wrong", "bf16 channels_last: deviates by 1"),
        (GPU, without_bf16, "wrong", "bf16 contiguous: not implemented for 'BFloat16'; bf16 channels_last"),
        (CPU, without_bf16, "note", "not implemented for 'BFloat16'"),  # auto does not choose bf16 there
        (CPU, lambda x: (x - x) / (x - x), "wrong", "deviates by inf"),
    ],
)
def test_a_kernel_that_is_wrong_or_missing_is_found(hardware: Hardware, run, state, text):
    case = KernelTest("one", run, ((2, 8, 6, 6),), has_layouts=True)
    (finding,) = kernel_findings(HOST, hardware, [case])
    assert finding.state == state and text in finding.text


def test_a_gpu_may_round_float32_to_tf32_and_a_cpu_may_not():
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 2**-11) if x.dtype != torch.float64 else x * 1

    case = [KernelTest("one", rounded, ((2, 8, 6, 6),))]
    assert [next(kernel_findings(HOST, kind, case)).state for kind in (GPU, CPU)] == ["ok", "wrong"]


def test_packages_of_other_versions_and_missing_ones_are_wrong():
    needed = [Requirement("numpy>=99"), Requirement("no-such-package>=1"), Requirement("torch>=2")]
    needed.append(Requirement("no-such-extra>=1; extra == 'itk'"))
    found = {finding.name: finding for finding in software_findings(needed)}
    assert found["numpy"].state == found["no-such-package"].state == "wrong"
    assert found["numpy"].mend == "pip install --upgrade 'numpy>=99'"
    assert found["extra itk"].state == "note" and "torch" not in found


@pytest.mark.parametrize(("gib", "state"), [(0.5, "wrong"), (5, "note"), (50, "ok")])
def test_room_on_the_disk(monkeypatch, tmp_path, gib, state):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, gib * 2**30))
    assert states(disk_findings([tmp_path / "not" / "yet"]))[str(tmp_path / "not" / "yet")] == state


def test_weights_are_found_missing_or_of_another_content(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"no weights")
    found = {finding.name: finding for finding in weight_findings(tmp_path)}
    assert found["AlexNet (LPIPS)"].state == "wrong"
    missing = next(finding for name, finding in found.items() if name.startswith("MedicalNet ResNet-10"))
    assert missing.state == "note" and "resnet_10_23dataset.pth" in missing.text
    assert str(tmp_path) in missing.mend
