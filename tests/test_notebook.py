"""The notebook runs from its first cell to its last, on the phantom."""

from pathlib import Path

import nbformat
from nbclient import NotebookClient

from medldm.commands import sample
from tests.helpers import compose_config

NOTEBOOK = Path(__file__).resolve().parents[1] / "notebooks" / "cardiac2d.ipynb"


def test_notebook_runs_on_the_phantom(prepared, first_stage, diffusion, tmp_path, monkeypatch):
    (tmp_path / "data").symlink_to(prepared)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "ldm").symlink_to(diffusion.parents[1])
    for name, checkpoint in (("reconstruction", first_stage), ("samples", diffusion)):
        paths = (f"checkpoint={checkpoint}", f"output={tmp_path / name}", f"data.root={prepared}")
        sample.task(compose_config("sample", *paths, "png=false"))
    monkeypatch.setenv("MEDLDM_DEMO", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    NotebookClient(notebook, timeout=300).execute()
    pictures = [o for c in notebook.cells for o in c.get("outputs", []) if "image/png" in o.get("data", {})]
    assert len(pictures) == 3
