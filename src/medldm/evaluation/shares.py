"""An evaluation by several processes: each measures its share of the images, the last to end has them all."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import medldm
from medldm.evaluation.measure import Images, Measured, Measuring, chunks
from medldm.evaluation.origins import describe_inputs, images_digest
from medldm.evaluation.pairs import Pair
from medldm.evaluation.results import jsonable
from medldm.evaluation.tools import Tools
from medldm.files import inside, replacing
from medldm.fingerprints import digest
from medldm.shards import Shard

log = logging.getLogger(__name__)
FOLDER = "shares"  # of an evaluation: what each process has measured


def key_of(
    folders: Mapping[str, Path | None],
    facts: Mapping[str, Any],
    pairs: Sequence[Pair],
    **settings: Any,
) -> str:
    """A digest of all that decides what is measured: shares with another one are not put together."""
    others = {
        role: images_digest(path)
        for role, path in folders.items()
        if path is not None and role not in ("generated", "reference", "output")
    }
    return digest(
        jsonable(
            {
                "inputs": describe_inputs(folders, facts), "others": others, "settings": settings,
                "pairs": [pair.id for pair in pairs],
                "versions": [medldm.__version__, torch.__version__],
            }
        )
    )  # fmt: skip


def measure_share(
    output: Path,
    share: Shard,
    key: str,
    pairs: list[Pair],
    rows: Mapping[str, Images],
    tools: Tools,
    advance: Callable[[int], None],
) -> Measured | None:
    """Measure what this share lacks and keep it in `output`; the numbers of all images once every share is
    there, else None.

    Images are measured in the chunks of a single process, so that the numbers are the same to the bit.
    """
    own = share.part(list(chunks(pairs)))
    if read_share(output, share, key) is None:
        measuring = Measuring(pairs, rows, tools)
        for chunk in own:
            measuring.add(chunk)
            advance(len(chunk.pairs))
        with replacing(share_path(output, share)) as aside:
            torch.save(share_content(measuring, key), aside)
    found = [read_share(output, Shard(k + 1, share.count), key) for k in range(share.count)]
    if missing := [k + 1 for k, content in enumerate(found) if content is None]:
        log.info("share %s is measured; to come: %s of %d", share, missing, share.count)
        return None
    measuring = Measuring(pairs, rows, tools)
    for content in found:
        add_content(measuring, content)
    return measuring.result()


def share_path(output: Path, share: Shard) -> Path:
    return inside(output, FOLDER, f"{share.number}of{share.count}.pt")


def share_content(measuring: Measuring, key: str) -> dict[str, Any]:
    """What a share has measured as plain data; of each row where it has been on an image."""
    return {
        "key": key,
        "present": {row: torch.from_numpy(mask) for row, mask in measuring.present.items()},
        "values": {
            row: {name: torch.from_numpy(values) for name, values in table.items()}
            for row, table in measuring.values.items()
        },
        "constant": measuring.constant,
        "features": {
            name: {row: torch.cat(parts) for row, parts in table.items()}
            for name, table in measuring.features.items()
        },
    }


def read_share(output: Path, share: Shard, key: str) -> dict[str, Any] | None:
    """What a share has measured, None where it is not there, damaged, or of something else."""
    try:
        content = torch.load(share_path(output, share), weights_only=True)
        return content if content["key"] == key else None
    except Exception as error:  # of a file that anyone may have cut or written, anything can be raised
        if not isinstance(error, FileNotFoundError):
            log.warning(
                "%s: not readable (%s); measured again", share_path(output, share), type(error).__name__
            )
        return None


def add_content(measuring: Measuring, content: Mapping[str, Any]) -> None:
    """Add a share, those before it having been added."""
    for row, mask in content["present"].items():
        index = np.flatnonzero(mask.numpy())
        table = content["values"].get(row, {})
        measuring.store(row, index, {name: values.numpy()[index] for name, values in table.items()})
    for row, names in content["constant"].items():
        measuring.constant[row] += names
    for name, table in content["features"].items():
        for row, features in table.items():
            measuring.features[name].setdefault(row, []).append(features)
