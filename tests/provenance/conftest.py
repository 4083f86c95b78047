"""A folder of small pictures with maps, prepared, and stage one trained on it: to be changed by a test."""

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from medldm.commands import encode, evaluate, prepare, sample
from tests.helpers import compose_config
from tests.training import LDM, VQVAE, run_training

NUM_SUBJECTS = 5


def draw(raw: Path, subject: int, *, turned: bool = False, key: str = "both") -> None:
    """One picture of 32 px with its map; `turned` upside down, `key` alone is written where given."""
    y, x = np.mgrid[:32, :32]
    disc = (y - 8 - 3 * subject) ** 2 + (x - 15) ** 2 < 40
    for name, array in (("images", 40 + 150 * disc + x), ("masks", disc)):
        if key in ("both", name):
            (raw / name).mkdir(parents=True, exist_ok=True)
            array = np.uint8(array[::-1] if turned else array)
            cv2.imwrite(str(raw / name / f"p{subject}.png"), array)


def run_prepare(raw: Path, root: Path, *overrides: str) -> None:
    paths = (f"data.raw={raw}", f"data.root={root}", "data.num_workers=0", "data.image_size=64")
    prepare.task(compose_config("prepare", "data=folder", *paths, *overrides))


def run_encode(checkpoint: Path, root: Path, *overrides: str) -> Path:
    encode.task(compose_config("encode", f"checkpoint={checkpoint}", f"data.root={root}", *overrides))
    return next((root / "latents").iterdir())


def run_sample(checkpoint: Path, root: Path, output: Path, *overrides: str) -> dict[str, int]:
    """Time of each case's file."""
    paths = (f"checkpoint={checkpoint}", f"data.root={root}", f"output={output}")
    sample.task(compose_config("sample", *paths, "data.batch_size=8", *overrides))
    return {path.stem: path.stat().st_mtime_ns for path in output.glob("*.h5")}


def run_evaluate(generated: Path, reference: Path, output: Path, *overrides: str) -> dict:
    paths = (f"generated={generated}", f"reference={reference}", f"output={output}", "panel_rows=0")
    cheap = (
        "metrics.baselines=[]",
        "metrics.bootstrap.num_resamples=20",
        "metrics.features=[]",
        "metrics.lpips=null",
        "metrics.image=[rmse]",
        "metrics.ms_ssim_pairs=0",
    )
    evaluate.task(compose_config("evaluate", *paths, *cheap, *overrides))
    return json.loads((output / "metrics.json").read_text())


def write_splits(root: Path, **splits: dict) -> None:
    (root / "splits.json").write_text(json.dumps(splits))


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """raw/, data/ (prepared and encoded), vq/ (a tiny autoencoder) and ldm/ (a diffusion model on it)."""
    folder = tmp_path_factory.mktemp("made")
    for subject in range(NUM_SUBJECTS):
        draw(folder / "raw", subject)
    run_prepare(folder / "raw", folder / "data")
    last = run_training(folder / "data", folder / "vq", VQVAE, "data=folder", "data.batch_size=2")
    run_encode(last, folder / "data")
    options = (LDM, "data=folder", "data.batch_size=2", "data.latents=auto")
    run_training(folder / "data", folder / "ldm", *options, f"model.first_stage.checkpoint={last}")
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """A copy of it, elsewhere, that the test may change."""
    return Path(shutil.copytree(made, tmp_path / "copied"))
