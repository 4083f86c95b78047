"""A folder of small pictures with maps, prepared, and stage one trained on it: to be changed by a test."""

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from medldm.commands import encode, prepare
from tests.helpers import compose_config
from tests.training import VQVAE, run_training

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
    paths = (f"data.raw={raw}", f"data.root={root}", "data.num_workers=0", "data.image_size=32")
    prepare.task(compose_config("prepare", "data=folder", *paths, *overrides))


def run_encode(checkpoint: Path, root: Path) -> Path:
    encode.task(compose_config("encode", f"checkpoint={checkpoint}", f"data.root={root}"))
    return next((root / "latents").iterdir())


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """raw/, data/ (prepared and encoded) and vq/ (a tiny autoencoder)."""
    folder = tmp_path_factory.mktemp("made")
    for subject in range(NUM_SUBJECTS):
        draw(folder / "raw", subject)
    run_prepare(folder / "raw", folder / "data")
    last = run_training(folder / "data", folder / "vq", VQVAE, "data=folder", "data.batch_size=2")
    run_encode(last, folder / "data")
    return folder


@pytest.fixture
def copied(made, tmp_path):
    """A copy of it, elsewhere, that the test may change."""
    return Path(shutil.copytree(made, tmp_path / "copied"))
