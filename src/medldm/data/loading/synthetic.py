"""Generated images in the place of real ones: what `medldm sample` wrote, by the case of its condition."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medldm.data.hdf5 import made_from, open_hdf5
from medldm.errors import InputError
from medldm.fingerprints import digest
from medldm.held_out import Seen
from medldm.schemas import Provenance, read_checked

if TYPE_CHECKING:
    from medldm.data.loading.dataset import Item

TRAIN_ON = ("real", "synthetic", "both")


class SyntheticImages:
    """Reads the image of a case (3D), or of one of its rows (2D), from a folder of `<case>.h5`.

    The map stays that of the prepared case: it is the condition under which the image was made. InputError
    where the case was prepared with another map since.
    """

    def __init__(self, root: str | Path, spatial_dims: int) -> None:
        self.root, self.spatial_dims = Path(root), spatial_dims
        self.rows: dict[str, list[int]] = {}
        if not any(self.root.glob("*.h5")):
            raise InputError(f"data.synthetic={root}: no .h5 file there; give what `medldm sample` wrote")
        path = self.root / "provenance.json"
        self.facts: dict = read_checked(path, Provenance, "sample again") if path.is_file() else {}

    @property
    def provenance(self) -> str:
        """Digest of what decided the images."""
        return digest({key: self.facts.get(key) for key in ("checkpoint_sha256", "sampler", "seed", "split")})

    @property
    def seen(self) -> Seen:
        """The subjects of this dataset that the model which made the images was trained on."""
        trained = self.facts.get("training_subjects")
        unrecorded = self.facts.get("unrecorded_stages", []) if trained is not None else ["generator"]
        return Seen({"generator": set(trained or ())}, unrecorded)

    def rows_of(self, case: dict) -> list[int]:
        """The rows of a prepared case (its index entry) that were generated, in the file's order; of a volume
        its one row.
        """
        case_id = case["id"]
        if case_id not in self.rows:
            path = self.root / f"{case_id}.h5"
            if path.is_file():
                check_condition(path, case)
            if not path.is_file():
                self.rows[case_id] = []
            elif self.spatial_dims == 3:
                self.rows[case_id] = [0]
            else:
                self.rows[case_id] = open_hdf5(path).read("row").tolist()
        return self.rows[case_id]

    def read(self, case: dict, row: int) -> np.ndarray:
        """(1, *S) float in [-1, 1]."""
        reader = open_hdf5(self.root / f"{case['id']}.h5")
        if self.spatial_dims == 3:
            volume = reader.read("images")
            return volume.reshape(1, *volume.shape[-3:])
        return reader.read_row("images", self.rows_of(case).index(row))[None]

    def choose(self, items: Sequence["Item"], cases: Sequence[dict], train_on: str) -> list["Item"]:
        """The items of training: real ones, those that have a generated image (marked so), or both."""
        made = [i._replace(is_synthetic=True) for i in items if i.row in self.rows_of(cases[i.case])]
        return [*(items if train_on == "both" else ()), *made]


def check_condition(path: Path, case: dict) -> None:
    stated = made_from(path).get("mask")
    expected = (case.get("content") or {}).get("mask")
    if None not in (stated, expected) and stated != expected:
        raise InputError(
            f"{path}: made under another map than {case['id']} has now; run `medldm sample` again"
        )
