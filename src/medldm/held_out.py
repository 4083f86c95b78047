"""Tells which subjects a checkpoint was trained on, in any of its stages, and whether held-out ones are among
them.

The record of a training says what it saw: `dataset`, `raw` (folder), `split` (name), `subjects` {train, val,
test}, `images` {training subject: identities of its raw image files}, `content` (digest of the training and
validation arrays), `attributes` (by name, digests of what their cases state: sex, age, label), `generator`
(subjects that the model behind its synthetic images saw). It lies under "data" in a checkpoint's description;
first stages, the base of a control branch, a segmenter that training asked and the model that a fine-tuning
started from bring theirs along. Checkpoints of an older medldm
have none.
"""

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from medldm.errors import InputError

log = logging.getLogger(__name__)
OWN_NAMES = {"folder", "class_folders"}  # datasets whose subjects are named by whoever made the files
EARLIER = ("first_stage", "map_stage", "adapter", "segmenter", "init_from")


class Seen(NamedTuple):
    """Subjects of a prepared folder that went into a checkpoint, by stage, and stages without a record."""

    subjects: dict[str, set[str]]
    unrecorded: list[str]

    @property
    def all(self) -> set[str]:
        return set().union(*self.subjects.values())


def stages_of(description: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
    """(name, record or None) of a model and of every model whose weights it holds or started from."""
    yield f"{description['stage']} model", description.get("data")
    for key in EARLIER:
        if description.get(key):
            yield from stages_of(description[key])


def origin_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a fine-tuned checkpoint keeps of the one that it started from; as much is kept of the base of a
    control branch and of a segmenter that training asked.
    """
    asked = {key: description[key] for key in ("adapter", "segmenter") if description.get(key)}
    return {key: description.get(key) for key in ("stage", "data", "init_from")} | asked


def image_identities(entries: Iterable[Mapping[str, Any]]) -> set[str]:
    """Contents of the raw image files behind index entries; empty where an older medldm prepared them."""
    return {
        "::".join(part for part in (file["sha256"][:16], file.get("dataset")) if part)
        for entry in entries
        for file in entry.get("raw", ())
        if file.get("key") == "image" and "sha256" in file
    }


def is_recorded(entries: Iterable[Mapping[str, Any]]) -> bool:
    """Whether the contents of the raw files are known."""
    return any("sha256" in file for entry in entries for file in entry.get("raw", ()))


def by_subject(index: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    entries: dict[str, list] = {}
    for entry in index["cases"]:
        entries.setdefault(entry["subject"], []).append(entry)
    return entries


def trained_subjects(record: Mapping[str, Any], index: Mapping[str, Any]) -> set[str]:
    """The subjects of `index` that a training saw. Published datasets, and the same raw folder, know them by
    name; elsewhere names say nothing, and a subject is known by its raw images.
    """
    trained = {*record["subjects"]["train"], *record.get("generator", ())}
    images = record.get("images") or {}
    is_same_dataset = record["dataset"] == index["dataset"]
    is_named = is_same_dataset and (
        index["dataset"] not in OWN_NAMES or record.get("raw") == index.get("raw")
    )
    contents = {identity for identities in images.values() for identity in identities}
    found = set()
    for subject, entries in by_subject(index).items():
        own = image_identities(entries)
        by_name = is_named or (is_same_dataset and not (contents and is_recorded(entries)))
        if subject in trained if by_name else own & contents:
            found.add(subject)
    return found


def seen_subjects(description: Mapping[str, Any], index: Mapping[str, Any]) -> Seen:
    subjects: dict[str, set[str]] = {}
    unrecorded = []
    for stage, record in stages_of(description):
        if record is None:
            unrecorded.append(stage)
        else:
            subjects[stage] = subjects.get(stage, set()) | trained_subjects(record, index)
    return Seen(subjects, unrecorded)


def check_held_out(
    seen: Seen, subjects: Collection[str], checkpoint: object, subset: str, *, allow: bool, key: str
) -> None:
    """InputError where the held-out `subjects` hold one that the checkpoint trained on, unless `allow`: then,
    and where the checkpoint does not know, a warning. `key` names the checkpoint in the message.
    """
    if seen.unrecorded:
        log.warning(
            "%s=%s: its %s was trained by an older medldm, which did not record the subjects; whether '%s' "
            "holds some of them is unknown",
            key,
            checkpoint,
            seen.unrecorded[0],
            subset,
        )
    for stage, trained in seen.subjects.items():
        both = sorted(trained & set(subjects))
        if not both:
            continue
        line = (
            f"{key}={checkpoint}: its {stage} was trained on subject {both[0]}, which is in '{subset}' "
            f"({len(both)} of {len(set(subjects))} subjects there)"
        )
        if not allow:
            raise InputError(
                f"{line}; take the data.split that it was trained with, or set allow_training_subjects=true"
            )
        log.warning("%s", line)


def changed_data(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """How the data of a resumed run differ from those that it was begun with, or None."""
    for subset in ("train", "val"):
        then, there = set(earlier["subjects"][subset]), set(now["subjects"][subset])
        if then != there:
            first = sorted(then ^ there)[0]
            state = "was" if first in then else "was not"
            return f"subject {first} {state} in '{subset}' of data.split={earlier['split']} when it was begun"
    for name in ("views", "train_on", "synthetic"):
        if earlier.get(name) != now.get(name):
            return f"data.{name} was {earlier.get(name)}"
    if None not in (earlier.get("content"), now.get("content")) and earlier["content"] != now["content"]:
        return "its cases were prepared otherwise when it was begun"
    return None


def changed_attributes(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Attributes of which the cases of a resumed run state other values than when it was begun; [] where a
    record of an older medldm does not tell.
    """
    then, there = earlier.get("attributes"), now.get("attributes")
    if then is None or there is None:
        return []
    return sorted(name for name in {*then, *there} if then.get(name) != there.get(name))
