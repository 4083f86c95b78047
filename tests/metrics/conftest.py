import json
import sys

import numpy as np
import pytest
from synthetic_folders import smooth_images, write_case


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
