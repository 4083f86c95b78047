"""What a checkpoint keeps of the data that it is trained on; `medldm.held_out` reads it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from medldm.attributes import TABLES, further_entries
from medldm.data.loading.dataset import array_digests
from medldm.data.loading.pairs import OF_SOURCE
from medldm.data.splits import SUBSETS
from medldm.fingerprints import digest
from medldm.held_out import by_subject, image_identities

if TYPE_CHECKING:
    from medldm.data.loading.datamodule import CaseDataModule


def training_record(module: "CaseDataModule") -> dict[str, Any]:
    """What a checkpoint records of its data, as plain data: dataset, split, subjects and what their files
    hold.
    """
    module.setup()
    subjects = {subset: list(module.part_of(subset)) for subset in SUBSETS}
    entries = by_subject(module.index)
    used = {s: entries[s] for s in (*subjects["train"], *subjects["val"])}
    frames = [entry for entry in module.frames(module.index) if entry["subject"] in subjects["train"]]
    images = {s: sorted(image_identities(used[s])) for s in subjects["train"]}
    return {
        "dataset": module.index["dataset"],
        "raw": module.index.get("raw"),
        "root": str(module.root.resolve()),
        "split": module.settings.split,
        "split_digest": digest(subjects),
        "subjects": subjects,
        "images": images if any(images.values()) else None,
        "content": content_digest(module, [*(e for group in used.values() for e in group), *frames]),
        "attributes": attribute_digests(module.index, [e for group in used.values() for e in group]),
        "views": None if module.settings.views is None else list(module.settings.views),
        "train_on": module.settings.train_on,
        "synthetic": None if module.synthetic is None else module.synthetic.provenance,
        "generator": [] if module.synthetic is None else sorted(module.synthetic.seen.all),
    }


def content_digest(module: "CaseDataModule", entries: list[dict]) -> str | None:
    """Digest of the arrays that the model reads, where a latent stands for its image. None where an array of
    an older medldm has no digest.
    """
    images = dict.fromkeys(("latent", *OF_SOURCE), "image")
    keys = sorted({images.get(key, key) for key in module.keys})
    if not all(array_digests(entry) for entry in entries):
        return None
    return digest({entry["id"]: [array_digests(entry).get(key) for key in keys] for entry in entries})


def attribute_digests(index: Mapping[str, Any], entries: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """By name of an attribute the digest of what every case states of it, names in the place of numbers."""
    stated: dict[str, dict] = {}
    for entry in entries:
        slices = entry.get("slices") or {}
        for kind, table in TABLES.items():
            names = list(index.get(table) or ())
            numbers = slices.get(kind, entry.get(kind))
            numbers = [] if numbers is None else np.ravel(numbers).tolist()
            values = [str(names[n]) if 0 <= n < len(names) else n for n in numbers]
            several = slices.get("labels", entry.get("labels")) if kind == "label" else None
            stated.setdefault(kind, {})[entry["id"]] = [values, several]
        for name in further_entries(index):
            value = slices.get(name, (entry.get("attributes") or {}).get(name))
            stated.setdefault(name, {})[entry["id"]] = value
    return {name: digest(values) for name, values in stated.items()}
