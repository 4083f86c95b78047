"""Reads from provenance.json what generated images were made from, as far as it states that."""

from collections.abc import Mapping
from dataclasses import dataclass

from medldm.attributes import TABLES


@dataclass(frozen=True)
class Conditions:
    """The conditions of the model; None where they are not recorded (another program, an older folder).

    `arrays` are edges, mask, source; `attributes` are view, phase, label, slice_position, and others that the
    data declare, such as age. Both hold what the model takes, `dropped` the groups that were withheld when
    the images were drawn.
    """

    arrays: tuple[str, ...] | None = None
    attributes: tuple[str, ...] | None = None
    dropped: tuple[str, ...] = ()
    edge_level: float | str | None = None

    def given(self, name: str) -> bool | None:
        """Whether the images were drawn with this array; None where it is not recorded."""
        if self.arrays is None:
            return None
        return name in self.arrays and name not in self.dropped

    @property
    def matchable(self) -> tuple[str, ...]:
        """The attributes that a stand-in must share: those that the model was told, as far as is known."""
        told = () if "attributes" in self.dropped else self.attributes or ()
        names = (*(name for name in TABLES if name in told), *(name for name in told if name not in TABLES))
        return tuple(name for name in names if name not in self.dropped)

    def as_dict(self) -> dict:
        return {
            "arrays": self.arrays,
            "attributes": self.attributes,
            "dropped": self.dropped,
            "edge_level": self.edge_level,
        }


def read_conditions(provenance: Mapping) -> Conditions:
    """From the content of a provenance.json of `medldm sample`; {} means that nothing is known."""
    if "condition" not in provenance:
        return Conditions(dropped=tuple(provenance.get("dropped") or ()))
    arrays = tuple(key for key in provenance["condition"] or () if key != "image")
    attributes = provenance.get("attributes")
    return Conditions(
        arrays,
        None if attributes is None else tuple(attributes),
        tuple(provenance.get("dropped") or ()),
        provenance.get("edge_level"),
    )
