"""Rows of loading: prepared data are read in one process."""

import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def prepared_phantom(folder: Path) -> Path:
    """Three cardiac subjects at 256 x 256, through the real reader and `prepare`."""
    import yaml

    from medldm.data.phantoms.cardiac import write_mnms2
    from medldm.data.preparation.prepare import prepare_dataset

    settings = yaml.safe_load((ROOT / "configs/data/common.yaml").read_text())
    labels = {"names": ["background", "LV cavity", "LV myocardium", "RV"], "mapping": None}
    write_mnms2(folder / "raw", num_subjects=3, image_size=256)
    return prepare_dataset(
        dataset="mnms2", raw=folder / "raw", root=folder / "prepared", spatial_dims=2, image_size=256,
        num_workers=0, splits=settings["splits"], preprocess={**settings["preprocess"], "labels": labels},
    )  # fmt: skip


def loader(root: str | None, num_slices: int) -> tuple[Callable, int, tempfile.TemporaryDirectory | None]:
    """(callable that reads images, edges and masks of at least `num_slices` slices, their number, folder)."""
    from medldm.data.loading.datamodule import CaseDataModule

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


def crops(size: int = 96, num_cases: int = 4) -> tuple[Callable, tempfile.TemporaryDirectory]:
    """(callable that reads one random box of `size`^3 of a prepared volume of 144 x 192 x 144, folder)."""
    import json
    from itertools import count

    import h5py
    import numpy as np

    from medldm.data.loading.datamodule import CaseDataModule

    folder, shape = tempfile.TemporaryDirectory(), (1, 144, 192, 144)
    root, rng, cases = Path(folder.name), np.random.default_rng(0), []
    for name in map(str, range(num_cases)):
        with h5py.File(root / f"{name}.h5", "w") as file:
            file["image"] = rng.random(shape, np.float32).astype(np.float16)
        case = {"id": name, "subject": name, "file": f"{name}.h5", "shape": list(shape[1:])}
        cases.append(case | {"spacing": [1, 1, 1], "affine": np.eye(4).tolist()})
    index = {"schema_version": 1, "dataset": "folder", "spatial_dims": 3, "image_channels": 1, "cases": cases}
    index["image_size"] = list(shape[1:])
    (root / "index.json").write_text(json.dumps(index))
    data = CaseDataModule(root, batch_size=1, keys=("image",), crop_size=size)
    dataset, requests = data.dataset("train", augment=True), count()
    return lambda: dataset.__getitems__([(i := next(requests), i % len(dataset))]), folder
