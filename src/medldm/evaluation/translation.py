"""Translations matched with their sources and targets: `<subject>_<source>_to_<target>` is one pair."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from medldm.data.records import ImageRecord
from medldm.errors import InputError
from medldm.evaluation.folders import (
    faults_of_reference,
    file_names,
    read_folder,
    read_matching,
    read_samples,
)
from medldm.evaluation.foreign import Reading, settle
from medldm.evaluation.names import besides
from medldm.evaluation.pairs import Pair, check_pair, known_facts, volume_recipe

SEPARATOR = "_to_"
Records = Mapping[str, ImageRecord]  # by the name of their image


def split_name(name: str, reference: Path, cases: dict[str, dict]) -> tuple[str, str, str, str]:
    """(subject, source modality, target modality, id of the target's case) of a translation."""
    source_id, separator, target = name.rpartition(SEPARATOR)
    if not separator or source_id not in cases:
        raise InputError(
            f"{name}: not named <subject>_<source>_to_<target> of a case of {reference}; "
            "metrics=translation takes what `medldm translate` or a translating `medldm sample` wrote"
        )
    subject, stated = cases[source_id]["subject"], cases[source_id].get("attributes", {})
    if "visit" in stated and source_id.endswith(f"_{stated['label']}"):
        # A subject's name alone would not tell its visits apart.
        scan = source_id.removesuffix(f"_{stated['label']}")
        return subject, stated["label"], target, f"{scan}_{target}"
    return subject, source_id.removeprefix(f"{subject}_"), target, f"{subject}_{target}"


def ends_of(generated: Path, cases: Mapping[str, dict]) -> set[str]:
    """The cases between which the translations go, by the names of their files."""
    ends = set()
    for name in file_names(generated):
        source = name.rpartition(SEPARATOR)[0]
        if source in cases:
            ends |= {source, split_name(name, generated, cases)[3]}
    return ends


def make_translation_pairs(
    generated: Path,
    reference: Path,
    reconstruction: Path | None,
    others: dict[str, Path],
    reading: Reading | None = None,
) -> list[Pair]:
    """Every translation with its source and target from a prepared folder, the autoencoder's rebuilding of
    the target (`reconstruction`: files named like the translation or like the target's case) and other
    translations of the same name; these need not be complete. Raises InputError naming the file where
    something has no partner, or the folder of which nothing is used.
    """
    facts = known_facts(reference)
    cases = {case["id"]: case for case in facts.get("cases", ())}
    with besides(lambda: faults_of_reference(reference, ends_of(generated, cases), facts, generated)):
        samples = read_samples(generated)
    if not cases:
        raise InputError(f"{reference}: not a prepared folder; metrics=translation needs reference=data.root")
    names = {name: split_name(name, reference, cases) for name in samples[0]}
    wanted = {parts[3] for parts in names.values()} | {name.rpartition(SEPARATOR)[0] for name in names}
    reals = read_matching(reference, wanted, generated)
    reading = Reading() if reading is None else reading
    reading.recipe = volume_recipe(facts)
    targets = {name: reals[parts[3]] for name, parts in names.items()}
    samples = [settle(generated, sample, targets, reading) for sample in samples]
    rows: dict[str, Records] = {}
    for row, folder in (("reconstruction", reconstruction), *others.items()):
        if folder:
            stored = read_folder(folder)
            is_rebuilt = row == "reconstruction"  # which may be named like the target's case
            chosen = {
                name: stored.get(name, stored.get(parts[3]) if is_rebuilt else None)
                for name, parts in names.items()
            }
            check_some(chosen.values(), folder, generated)
            rows[row] = settle(folder, found(chosen), targets, reading, row)
    return [translation_pair(name, parts, reals, samples, rows, generated) for name, parts in names.items()]


def translation_pair(
    name: str,
    parts: tuple[str, str, str, str],
    reals: Records,
    samples: Sequence[Records],
    rows: Mapping[str, Records],
    generated: Path,
) -> Pair:
    """One translation; `parts` as of `split_name`, `rows` the same image by other means, as far as known."""
    subject, source, target, target_id = parts
    real = reals[target_id]
    beside = {row: records.get(name) for row, records in rows.items()}
    for record in (*(sample[name] for sample in samples), *beside.values()):
        if record is not None:
            check_pair(record._replace(attributes={}), real, generated)
    images = {row: None if record is None else record.image for row, record in beside.items()}
    return Pair(
        id=name,
        subject=subject,
        real=real.image,
        generated=[sample[name].image for sample in samples],
        reconstruction=images.pop("reconstruction", None),
        edges=None,
        mask=real.mask,
        edges_from_real=None,
        attributes={**real.attributes, "label": target, "pair": f"{source} to {target}"},
        source=reals[name.rpartition(SEPARATOR)[0]].image,
        others=images,
    )


def found(records: dict[str, ImageRecord | None]) -> dict[str, ImageRecord]:
    return {name: record for name, record in records.items() if record is not None}


def check_some(records: Iterable, folder: Path, generated: Path) -> None:
    if all(record is None for record in records):
        raise InputError(
            f"{folder}: no image is named like one of {generated}; was it written for other cases?"
        )
