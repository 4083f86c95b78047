"""One acquisition before preparation: the paths of image and mask, the subject, and what is known of them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Case:
    """One image file (a volume, or a single picture) with its mask, or a mask alone, from which to sample.

    `paths` maps a key to `file` or, inside HDF5, `file::dataset`. Keys: `image`; `mask`, or binary masks
    `mask:<class>[:name]` that make up a class map, in which the higher class covers the lower; `foreground`,
    whose content decides the crop; `body`, not zero where the patient is. `attributes` holds what the dataset
    states: view, phase, label, split, vendor, and `visit` where a subject comes several times. In 2D all
    cases of a subject share one prepared file. `relabel` sends raw labels of a release that numbers its
    classes otherwise to the numbers that the dataset's recipe maps. `original` has `id` and `subject` where
    they are no safe file names and were changed. `is_cine` marks a frame of a CINE: it has no map and no
    stated phase, and serves autoencoders as one more training image.
    """

    id: str
    subject: str
    paths: dict[str, str]
    attributes: dict[str, str | int | float] = field(default_factory=dict)
    relabel: dict[int, int] = field(default_factory=dict)
    original: dict[str, str] = field(default_factory=dict)
    is_cine: bool = False

    @property
    def has_image(self) -> bool:
        return "image" in self.paths

    @property
    def main_path(self) -> str:
        """The file that messages name: the image, or the mask where there is no image."""
        return self.paths["image" if self.has_image else "mask"]

    @property
    def has_mask(self) -> bool:
        return any(key == "mask" or key.startswith("mask:") for key in self.paths)

    @property
    def numbering(self) -> str:
        """The part of messages about the map that names labels which are read as other numbers; empty where
        there are none.
        """
        changes = [f"{raw} as {number}" for raw, number in self.relabel.items() if raw != number]
        return f" (its labels {', '.join(changes)})" if changes else ""


def split_path(path: str | Path) -> tuple[Path, str | None]:
    """(file, dataset) of `file::dataset`; the second is None for a plain file."""
    file, _, key = str(path).partition("::")
    return Path(file), key or None


def stem_of(path: str | Path) -> str:
    """The name of a file without its suffix, where `.nii.gz` and `.seg.nrrd` count as one."""
    name = Path(path).name
    double = next((suffix for suffix in (".nii.gz", ".seg.nrrd") if name.lower().endswith(suffix)), None)
    return name[: -len(double)] if double else Path(name).stem


def visit_of(entry: Mapping[str, Any]) -> str | None:
    """The visit of its subject that an index entry is of, where the data state it."""
    return entry.get("attributes", {}).get("visit")
