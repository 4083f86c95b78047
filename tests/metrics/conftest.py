import json
import sys

import h5py
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter


def smooth_images(num: int, size: int, seed: int) -> np.ndarray:
    """(N, H, W) float32 in [-1, 1]: smooth blobs, every image another."""
    rng = np.random.default_rng(seed)
    images = gaussian_filter(rng.normal(size=(num, size, size)), (0, 3, 3))
    return (images / np.abs(images).max((1, 2), keepdims=True)).astype(np.float32)


def write_case(path, images: np.ndarray, extra: dict | None = None) -> None:
    """A file of the 2D schema: two long-axis slices, then short-axis stacks at ED and ES."""
    num = len(images)
    half = (num - 2) // 2
    path.parent.mkdir(parents=True, exist_ok=True)
    with h5py.File(path, "w") as file:
        file["images"] = images
        file["edges"] = (np.abs(np.diff(images, axis=2, prepend=0)) > 0.1).astype(np.uint8)
        file["semantic_maps"] = (images > 0).astype(np.uint8)
        file["view"] = np.array([1, 1] + [0] * (2 * half), np.uint8)
        file["phase"] = np.array([0, 1] + [0] * half + [1] * half, np.uint8)
        file["slice_index"] = np.array([0, 0, *range(half), *range(half)], np.int16)
        file["num_slices"] = np.array([1, 1] + [half] * (2 * half), np.int16)
        file.attrs["subject_id"] = path.stem
        for name, value in (extra or {}).items():
            file[name] = value


@pytest.fixture
def folders(tmp_path):
    """A prepared reference of four subjects and images generated for three of them."""
    root, generated = tmp_path / "data", tmp_path / "samples"
    subjects = ["001", "002", "003", "004"]
    rng = np.random.default_rng(0)
    for i, subject in enumerate(subjects):
        images = smooth_images(8, 32, seed=i)
        write_case(root / "cases" / f"{subject}.h5", images)
        noisy = np.clip(images + 0.1 * rng.normal(size=images.shape), -1, 1).astype(np.float32)
        if subject != "004":
            write_case(generated / f"{subject}.h5", noisy)
    cases = [{"id": s, "subject": s, "file": f"cases/{s}.h5", "num_slices": 8} for s in subjects]
    index = {"schema_version": 1, "dataset": "mnms2", "spatial_dims": 2, "cases": cases}
    index |= {"view_names": ["SA", "LA"], "phase_names": ["ED", "ES"]}
    (root / "index.json").write_text(json.dumps(index))
    (root / "splits.json").write_text(json.dumps({"default": {"train": ["004"], "test": subjects[:3]}}))
    (generated / "provenance.json").write_text(json.dumps({"checkpoint_sha256": "abc123", "seed": 0}))
    return tmp_path


@pytest.fixture
def call(monkeypatch, capsys):
    """Run a command in this process: exit status, standard output, standard error."""

    def run(module, *arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        status = 0
        try:
            module.main()
        except SystemExit as error:
            status = int(error.code or 0)
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run
