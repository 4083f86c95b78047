"""Checks the pretrained weights that losses and metrics can use."""

from collections.abc import Iterator
from pathlib import Path

from medldm.doctor.finding import TO_NOTE, WRONG, Finding
from medldm.networks.features import weights_status


def weight_findings(weights_dir: str | Path | None) -> Iterator[Finding]:
    """Where each file is, or how to get it. A file with another content is wrong. A missing one is a note,
    since metrics that need it are left out, and losses that need it name it.
    """
    for status in weights_status(weights_dir):
        if status.path is not None:
            yield Finding("weights", status.use, f"{status.path} ({status.source})")
            continue
        text, _, mend = status.advice.partition("; ")
        yield Finding("weights", status.use, text, TO_NOTE if text.endswith(": not found") else WRONG, mend)
