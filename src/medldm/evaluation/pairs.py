"""Two folders of images, matched one to one by name, with all that is known of each image."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from medldm.data.preparation.edges import EdgeRecipe
from medldm.data.preparation.recipe import Recipe, recipe_of
from medldm.data.prepared import load_index
from medldm.data.records import ImageRecord, list_image_files
from medldm.data.splits import read_splits
from medldm.errors import InputError
from medldm.evaluation.conditions import Conditions
from medldm.evaluation.folders import faults_of_reference, file_names, read_generated, read_matching
from medldm.evaluation.foreign import Reading, settle
from medldm.evaluation.names import besides, check_broken
from medldm.evaluation.stored import Image, load

IDENTITY = ("view", "phase", "slice_index")
KINDS = ("view", "phase", "label", "pair")
THIRDS = ("first", "middle", "last")
CARDIAC_NAMES = {"view": ["SA", "LA"], "phase": ["ED", "ES"]}


@dataclass
class Pair:
    """A generated image (K samples of it) and the real one of the same name; (C, *S) float32 in [-1, 1].

    Those of files are `StoredImage`s: `load` reads them.
    """

    id: str
    subject: str
    real: Image
    generated: list[Image]
    reconstruction: Image | None
    edges: Image | None  # (1, *S) {0, 1}: the condition; None where it had none, or none is known
    mask: Image | None
    edges_from_real: bool | None  # whether the condition's edges are those of the very test image
    attributes: dict
    real_edges: Image | None = None  # (1, *S) {0, 1}: those stored with the real image
    source: Image | None = None  # what a translation started from
    others: dict[str, Image | None] = field(default_factory=dict)  # more rows: the same image by other means

    def place(self, match: Sequence[str]) -> tuple:
        """What a stand-in must share: the shape and these attributes."""
        return self.real.shape, *(self.attributes.get(name) for name in match)

    def loaded(self) -> "Pair":
        """The same pair with its arrays in memory."""
        names = ("real", "reconstruction", "edges", "real_edges", "mask", "source")
        arrays = {name: load(getattr(self, name)) for name in names}
        return replace(self, generated=[load(sample) for sample in self.generated], **arrays)

    @property
    def slice_third(self) -> str | None:
        """Which third of its stack the slice lies in; None for stacks of fewer than three."""
        index, num = self.attributes.get("slice_index"), self.attributes.get("num_slices")
        if index is None or num is None or num < 3:
            return None
        return THIRDS[min(2, 3 * int(index) // int(num))]


def check_pair(record: ImageRecord, real: ImageRecord, folder: Path) -> None:
    """InputError where the two cannot be the same image."""
    if record.image.shape != real.image.shape:
        raise InputError(
            f"{folder}: '{record.id}' has shape {record.image.shape} and its reference {real.image.shape}; "
            "generate at the size of the reference"
        )
    for name in IDENTITY:
        here, there = record.attributes.get(name), real.attributes.get(name)
        if here is not None and there is not None and here != there:
            raise InputError(
                f"{folder}: '{record.id}' is {name} {here} and its reference {name} {there}; "
                "the files list their slices in different orders"
            )


def check_matched(
    records: dict[str, ImageRecord], reals: dict[str, ImageRecord], folder: Path | None
) -> None:
    """InputError that names every image, as far as they fit in a line, that cannot be its real one's."""
    unlike = []
    for name, record in records.items():
        try:
            check_pair(record, reals[name], folder)
        except InputError as error:
            unlike.append(str(error))
    if unlike:
        check_broken(folder, unlike, len(records))


def same_edges(record: ImageRecord, real: ImageRecord) -> bool | None:
    """Whether the condition's edges are those stored with the test image; None where either is unknown."""
    if record.edges is None or real.edges is None:
        return None
    return bool(np.array_equal(load(record.edges), load(real.edges)))


def make_pairs(
    generated: Path, reference: Path, reconstruction: Path | None, reading: Reading | None = None
) -> list[Pair]:
    """Match the folders by image name; the reference is restricted to what was generated. Against prepared
    volumes, pictures are slices of volumes (`stacks`).

    Images of other programs are brought to their reference as `reading` says, which then holds what was
    decided. Raises InputError naming the file where a name has no partner or shapes differ.
    """
    facts, reading = known_facts(reference), Reading() if reading is None else reading
    reading.recipe = volume_recipe(facts)
    with besides(lambda: faults_of_reference(reference, file_names(generated), facts, generated)):
        samples = read_generated(generated, facts)
    ids = samples[0].keys()
    reals = read_matching(reference, ids, generated, reading)
    samples = [settle(generated, sample, reals, reading) for sample in samples]
    rebuilt = {}
    if reconstruction:
        rebuilt = read_matching(reconstruction, ids, generated)
        rebuilt = settle(reconstruction, rebuilt, reals, reading, "reconstruction")
    for folder, matched in [*((generated, sample) for sample in samples), (reconstruction, rebuilt)]:
        check_matched(matched, reals, folder)
    note_rest(reference, facts, len(ids), reading)
    pairs = []
    for name, record in samples[0].items():
        real, again = reals[name], rebuilt.get(name)
        pairs.append(
            Pair(
                id=name,
                subject=real.subject,
                real=real.image,
                generated=[sample[name].image for sample in samples],
                reconstruction=None if again is None else again.image,
                edges=record.edges,
                real_edges=real.edges,
                mask=real.mask if record.mask is None else record.mask,
                edges_from_real=same_edges(record, real),
                attributes={**record.attributes, **real.attributes},
            )
        )
    return pairs


def withhold(pairs: Iterable[Pair], conditions: Conditions) -> None:
    """Forget the edges in the files of samples that were drawn without them."""
    if conditions.given("edges") is False:
        for pair in pairs:
            pair.edges = pair.edges_from_real = None


def volume_recipe(facts: dict) -> Recipe | None:
    """How prepared volumes were made, where their index tells all of it."""
    stated = facts.get("preprocess") or {}
    if facts.get("spatial_dims") != 3 or any(name not in stated for name in Recipe.__dataclass_fields__):
        return None
    return recipe_of(facts)


def note_rest(reference: Path, facts: dict, num: int, reading: Reading) -> None:
    """How many of the real images have no generated one and take no part."""
    if facts:
        total = sum(int(case.get("num_slices", 1)) for case in facts["cases"])
    else:
        total = len(list_image_files(reference))
    if total > num:
        reading.note(
            f"{num} of the {total} images of {reference} have a generated one; the others take no part"
        )


def known_facts(reference: Path) -> dict:
    """index.json of the reference where it is a prepared folder, else nothing."""
    return load_index(reference) if (reference / "index.json").is_file() else {}


def edge_recipe(facts: dict) -> EdgeRecipe:
    """The recipe by which the edges of the data were detected; the published one where nothing is
    recorded.
    """
    stated = dict((facts.get("preprocess") or {}).get("edges") or {})
    known = {name: stated[name] for name in EdgeRecipe.__dataclass_fields__ if name in stated}
    if known.get("thresholds"):
        known["thresholds"] = tuple(known["thresholds"])
    return EdgeRecipe(**{**known, "source": "image"})


def view_names(facts: dict) -> list[str]:
    return facts.get("view_names") or CARDIAC_NAMES["view"]


def name_of(kind: str, value: object, facts: dict) -> str | None:
    """'SA' for view 0: by the names that the data set gives, else the number."""
    if value is None or not str(value).isdigit():
        return None if value is None else str(value)
    names = facts.get("label_values" if kind == "label" else f"{kind}_names") or CARDIAC_NAMES.get(kind, [])
    return names[int(value)] if int(value) < len(names) else str(value)


def group_members(pairs: list[Pair], facts: dict) -> dict[str, list[str | None]]:
    """View, phase, label and slice third of every image; a group with fewer than two values is left out."""
    members = {kind: [name_of(kind, p.attributes.get(kind), facts) for p in pairs] for kind in KINDS}
    members["slice_third"] = [pair.slice_third for pair in pairs]
    return {kind: names for kind, names in members.items() if len(set(names) - {None}) > 1}


def training_subjects(train: Path, split_name: str) -> set[str] | None:
    """Subjects of the training part where `train` is a prepared folder; None for any other folder."""
    path = train / "splits.json"
    if not path.is_file():
        return None
    splits = read_splits(path)
    if split_name not in splits:
        raise InputError(f"train_split={split_name}: {path} has {', '.join(splits)}")
    return set(splits[split_name]["train"])


def count_subjects(pairs: Iterable[Pair]) -> Counter:
    return Counter(pair.subject for pair in pairs)
