"""Generated images in the place of real ones: what `medldm sample` wrote, by the case of its condition."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from medldm.data.readers import open_hdf5
from medldm.errors import InputError

if TYPE_CHECKING:
    from medldm.data.dataset import Item

TRAIN_ON = ("real", "synthetic", "both")


class SyntheticImages:
    """Reads the image of a case (3D), or of one of its rows (2D), from a folder of `<case>.h5`.

    The map stays that of the prepared case: it is the condition under which the image was made.
    """

    def __init__(self, root: str | Path, spatial_dims: int) -> None:
        self.root, self.spatial_dims = Path(root), spatial_dims
        self.rows: dict[str, list[int]] = {}
        if not any(self.root.glob("*.h5")):
            raise InputError(f"data.synthetic={root}: no .h5 file there; give what `medldm sample` wrote")

    def rows_of(self, case_id: str) -> list[int]:
        """The rows of the prepared case that were generated, in the file's order; of a volume its one row."""
        if case_id not in self.rows:
            path = self.root / f"{case_id}.h5"
            if not path.is_file():
                self.rows[case_id] = []
            elif self.spatial_dims == 3:
                self.rows[case_id] = [0]
            else:
                self.rows[case_id] = open_hdf5(path).read("row").tolist()
        return self.rows[case_id]

    def read(self, case_id: str, row: int) -> np.ndarray:
        """(1, *S) float in [-1, 1]."""
        reader = open_hdf5(self.root / f"{case_id}.h5")
        if self.spatial_dims == 3:
            volume = reader.read("images")
            return volume.reshape(1, *volume.shape[-3:])
        return reader.read_row("images", self.rows_of(case_id).index(row))[None]

    def choose(self, items: Sequence["Item"], case_ids: Sequence[str], train_on: str) -> list["Item"]:
        """The items of training: real ones, those that have a generated image (marked so), or both."""
        made = [i._replace(is_synthetic=True) for i in items if i.row in self.rows_of(case_ids[i.case])]
        return [*(items if train_on == "both" else ()), *made]
