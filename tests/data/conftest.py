"""A small cardiac phantom, prepared once for all data tests."""

import copy
import shutil
from pathlib import Path

import pytest
import yaml

from medldm.data.phantoms.cardiac import write_mnms2
from medldm.data.phantoms.folder import write_folder
from medldm.data.preparation.prepare import prepare_dataset

CONFIGS = Path(__file__).parents[2] / "configs" / "data"
MNMS2_LABELS = {"names": ["background", "LV cavity", "LV myocardium", "RV"], "mapping": None}


def settings(**preprocess) -> dict:
    """Arguments of `prepare_dataset` from the shipped defaults, in-process, at 64 pixels."""
    common = copy.deepcopy(yaml.safe_load((CONFIGS / "common.yaml").read_text()))
    return {
        "spatial_dims": 2,
        "image_size": 64,
        "num_workers": 0,
        "splits": common["splits"],
        "preprocess": {**common["preprocess"], **preprocess},
    }


@pytest.fixture(scope="session")
def raw_mnms2(tmp_path_factory) -> Path:
    return write_mnms2(tmp_path_factory.mktemp("raw"), num_subjects=3, image_size=64, num_slices=(3, 4))


@pytest.fixture(scope="session")
def mnms2(raw_mnms2, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("prepared")
    return prepare_dataset(dataset="mnms2", raw=raw_mnms2, root=root, **settings(labels=MNMS2_LABELS))


@pytest.fixture(scope="session")
def mnms2_cine(raw_mnms2, tmp_path_factory) -> Path:
    """The same with the frames of the CINE."""
    root = tmp_path_factory.mktemp("prepared_cine")
    return prepare_dataset(
        dataset="mnms2", raw=raw_mnms2, root=root, cine=True, **settings(labels=MNMS2_LABELS)
    )


@pytest.fixture
def raw_copy(raw_mnms2, tmp_path) -> Path:
    """A raw tree that a test may damage."""
    return Path(shutil.copytree(raw_mnms2, tmp_path / "raw"))


@pytest.fixture(scope="session")
def volumes(tmp_path_factory) -> Path:
    raw = write_folder(tmp_path_factory.mktemp("raw3d"), num_subjects=4, image_size=24, num_slices=(18, 22))
    root = tmp_path_factory.mktemp("prepared3d")
    return prepare_dataset(
        dataset="folder", raw=raw, root=root, **{**settings(), "spatial_dims": 3, "image_size": None}
    )
