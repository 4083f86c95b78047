"""Phantom data and a first stage, made once a session."""

import logging
import os
import sys
from pathlib import Path

# Tests fork trainings that they then kill: a pool of OpenMP threads does not survive a fork.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest

from tests.helpers import compose_config


@pytest.fixture(autouse=True)
def without_installed_weights(request, monkeypatch):
    """Whatever weights are installed here, a test sees them only where it asks for `published_weights`."""
    if "published_weights" not in request.fixturenames:
        monkeypatch.setattr("medldm.networks.weights.installed_file", lambda package: None)


@pytest.fixture(autouse=True)
def without_log_files_of_other_tests():
    """What a command ran in this process has opened as its log is closed after the test that ran it."""
    root = logging.getLogger()
    before = list(root.handlers)
    yield
    for handler in [h for h in root.handlers if isinstance(h, logging.FileHandler) and h not in before]:
        root.removeHandler(handler)
        handler.close()


@pytest.fixture(scope="session")
def published_weights():
    """The weights of FID and LPIPS from the packages that `make install` brings; a test that asks for them
    fails where they are missing, and is left out only where `make install` could not reach the index.
    """
    from medldm.networks import features, weights

    packages = [features.INCEPTION_WEIGHTS.package, *(w.package for w in features.LPIPS_WEIGHTS.values())]
    missing = [package.install for package in packages if weights.installed_file(package) is None]
    if missing and (Path(sys.prefix) / ".weights-unreachable").exists():
        pytest.skip("the package index could not be reached for the weights of FID and LPIPS")
    assert not missing, f"run `make install`, or: {missing[0]}"


@pytest.fixture(scope="session")
def phantom_raw(tmp_path_factory):
    """Four subjects at 64 px in the M&Ms-2 layout."""
    from medldm.commands import phantom

    root = tmp_path_factory.mktemp("raw")
    sizes = ("num_subjects=4", "image_size=64", "num_slices=[4,5]")
    phantom.task(compose_config("phantom", f"root={root}", *sizes))
    return root


@pytest.fixture(scope="session")
def prepared(phantom_raw, tmp_path_factory):
    """The prepared phantom: 22 training slices of two subjects, one subject to validate, one to test."""
    from medldm.commands import prepare

    root = tmp_path_factory.mktemp("prepared")
    paths = (f"data.raw={phantom_raw}", f"data.root={root}")
    prepare.task(compose_config("prepare", *paths, "data.num_workers=0", "data.image_size=64"))
    return root


@pytest.fixture(scope="session")
def first_stage(prepared, tmp_path_factory):
    """best.ckpt of a tiny cardiac autoencoder."""
    from tests.training import VQVAE, run_training

    last = run_training(prepared, tmp_path_factory.mktemp("first_stage") / "run", VQVAE)
    return last.with_name("best.ckpt")


@pytest.fixture(scope="session")
def diffusion(prepared, first_stage, tmp_path_factory):
    """last.ckpt of a tiny cardiac diffusion model on that autoencoder."""
    from tests.training import LDM, run_training

    run_dir = tmp_path_factory.mktemp("diffusion") / "run"
    options = (f"model.first_stage.checkpoint={first_stage}", "callbacks=post_hoc_ema")
    return run_training(prepared, run_dir, LDM, *options)


@pytest.fixture(scope="session")
def segmenter(prepared, tmp_path_factory):
    """best.ckpt of a tiny segmenter of the cardiac phantom."""
    from tests.training import run_training

    run_dir = tmp_path_factory.mktemp("segmenter") / "run"
    return run_training(prepared, run_dir, "experiment=cardiac2d/segmentation").with_name("best.ckpt")


@pytest.fixture(scope="session")
def prepared_3d(tmp_path_factory):
    """Six torso volumes with organ masks, 32 voxels wide, as somebody's own folder."""
    from medldm.commands import phantom, prepare

    raw, root = tmp_path_factory.mktemp("raw_3d"), tmp_path_factory.mktemp("prepared_3d")
    sizes = ("dataset=folder", "num_subjects=6", "image_size=40", "num_slices=[36,40]")
    phantom.task(compose_config("phantom", f"root={raw}", *sizes))
    options = ("data=folder", "data.spatial_dims=3", "data.image_size=[32,32,32]", "data.num_workers=0")
    prepare.task(compose_config("prepare", *options, f"data.raw={raw}", f"data.root={root}"))
    return root


@pytest.fixture(scope="session")
def prepared_modalities(tmp_path_factory):
    """Six subjects of the BraTS phantom, four modalities each, 32 voxels wide."""
    from medldm.commands import phantom, prepare

    raw, root = tmp_path_factory.mktemp("raw_brats"), tmp_path_factory.mktemp("prepared_brats")
    phantom.task(
        compose_config("phantom", "dataset=brats", "num_subjects=6", "size=[40,44,36]", f"root={raw}")
    )
    options = ("data=brats", "data.image_size=[32,32,32]", "data.num_workers=0")
    prepare.task(compose_config("prepare", *options, f"data.raw={raw}", f"data.root={root}"))
    return root


@pytest.fixture(scope="session")
def vqgan_modalities(prepared_modalities, tmp_path_factory):
    """best.ckpt of a tiny autoencoder of all modalities."""
    from tests.training import run_training

    run_dir = tmp_path_factory.mktemp("vqgan_modalities") / "run"
    return run_training(prepared_modalities, run_dir, "experiment=aldm/brats_vqgan").with_name("best.ckpt")


@pytest.fixture(scope="session")
def translator(prepared_modalities, vqgan_modalities, tmp_path_factory):
    """best.ckpt of a tiny MS-SPADE on it."""
    from tests.training import run_training

    options = ("experiment=aldm/brats_msspade", f"model.first_stage.checkpoint={vqgan_modalities}")
    run_dir = tmp_path_factory.mktemp("translator") / "run"
    return run_training(prepared_modalities, run_dir, *options).with_name("best.ckpt")
