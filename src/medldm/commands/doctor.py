"""medldm doctor: what this machine has for medldm, and what is wrong with it.

  medldm doctor
  medldm doctor data.root=DATA paths.weights=DIR

Looks at versions and optional extras, devices with driver and free memory, room on disks, pretrained
weights, SLURM and NCCL, and computes the operations that training spends its time in (convolutions in 2D and
3D, attention, group norm; float32 and bf16, contiguous and channels_last, forward and backward) against
float64. Takes some seconds and writes nothing.

Keys: data.root (a folder whose disk is looked at too), paths.output_root, paths.weights, device (auto, cpu,
cuda:1).

Ends with status 0, or with status 1 after naming what is wrong. A note is something that works with less.
"""

import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from medldm.commands import run_command
from medldm.devices import pick_device
from medldm.doctor.finding import TO_NOTE, WRONG, Finding
from medldm.doctor.kernels import kernel_findings
from medldm.doctor.machine import Machine, cluster_findings, device_findings, disk_findings, find_machine
from medldm.doctor.software import software_findings
from medldm.doctor.weights import weight_findings

STYLES = {"ok": "green", TO_NOTE: "yellow", WRONG: "bold red"}


def task(cfg: DictConfig) -> None:
    machine = find_machine()
    findings = list(examine(cfg, machine))
    show_findings(findings)
    wrong = [finding for finding in findings if finding.state == WRONG]
    for finding in wrong:
        print(f"medldm doctor: {finding.name}: {finding.text}; {finding.mend}", file=sys.stderr)
    if wrong:
        sys.exit(1)


def examine(cfg: DictConfig, machine: Machine) -> Iterator[Finding]:
    yield from software_findings()
    yield from device_findings(machine)
    yield from kernel_findings(pick_device(cfg.device, machine.hardware), machine.hardware)
    folders = [cfg.paths.output_root, cfg.data.root, tempfile.gettempdir()]
    yield from disk_findings([Path(folder).resolve() for folder in folders if folder is not None])
    yield from weight_findings(cfg.paths.weights)
    yield from cluster_findings(machine)


def show_findings(findings: Sequence[Finding]) -> None:
    """Print the table, one line for each finding."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)  # a log file has no width of its own
    table = Table("", "", "found", "what to do", box=None, pad_edge=False)
    for finding in findings:
        state = f"[{STYLES[finding.state]}]{finding.state}[/]"
        table.add_row(state, f"{finding.topic}: {finding.name}", finding.text, finding.mend)
    console.print(table)
    counts = {state: sum(f.state == state for f in findings) for state in STYLES}
    console.print(f"{counts['ok']} ok, {counts[TO_NOTE]} to note, {counts[WRONG]} wrong")


def main() -> None:
    run_command(task, "doctor")


if __name__ == "__main__":
    main()
