"""The loader's row: prepared slices read in one process."""

import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepared_phantom(folder: Path) -> Path:
    """Three cardiac subjects at 256 x 256, through the real reader and `prepare`."""
    import yaml

    from medldm.data.phantom import write_mnms2
    from medldm.data.prepare import prepare_dataset

    settings = yaml.safe_load((ROOT / "configs/data/common.yaml").read_text())
    labels = {"names": ["background", "LV cavity", "LV myocardium", "RV"], "mapping": None}
    write_mnms2(folder / "raw", num_subjects=3, image_size=256)
    return prepare_dataset(
        dataset="mnms2", raw=folder / "raw", root=folder / "prepared", spatial_dims=2, image_size=256,
        num_workers=0, splits=settings["splits"], preprocess={**settings["preprocess"], "labels": labels},
    )  # fmt: skip


def loader(root: str | None, num_slices: int) -> tuple[Callable, int, tempfile.TemporaryDirectory | None]:
    """(callable that reads images, edges and masks of at least `num_slices` slices, their number, folder)."""
    from medldm.data.datamodule import CaseDataModule

    folder = None if root else tempfile.TemporaryDirectory()
    data = CaseDataModule(
        root or prepared_phantom(Path(folder.name)), batch_size=16, keys=("image", "mask", "edges")
    )
    batches = data.loader(data.dataset("all"), train=True)
    epochs = -(-num_slices // (len(batches) * 16))

    def read() -> None:
        for _ in range(epochs):
            for _ in batches:
                pass

    return read, epochs * len(batches) * 16, folder
