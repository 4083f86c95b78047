"""Pretrained weights that losses and metrics can use."""

from collections.abc import Iterator
from pathlib import Path

from medldm.doctor.finding import NOTE, WRONG, Finding
from medldm.errors import InputError
from medldm.networks.features import WEIGHTS_BY_USE
from medldm.networks.weights import find_weights, search_dirs


def weight_findings(weights_dir: str | Path | None) -> Iterator[Finding]:
    """Where each file is, or where to put it. A file of another content is wrong, a missing one a note: what
    needs it is left out or refused by name.
    """
    for purpose, weights in WEIGHTS_BY_USE.items():
        try:
            found = find_weights(weights, weights_dir)
        except InputError as error:
            stands = any(
                (folder / name).exists() for folder in search_dirs(weights_dir) for name in weights.names
            )
            text, _, mend = str(error).partition("; ")
            yield Finding("weights", purpose, text, WRONG if stands else NOTE, mend)
            continue
        source = f", of the package {found.package.name}" if found.package else ""
        yield Finding("weights", purpose, f"{found.path}{source}")
