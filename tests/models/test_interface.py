"""`medldm.load` gives what the commands write."""

import subprocess
import sys

import h5py
import nibabel
import numpy as np
import pytest

import medldm
from medldm.commands import sample, translate
from medldm.data.preparation.volume_transforms import restore_volume
from medldm.data.prepared import load_index
from medldm.errors import InputError
from medldm.translating import prepare_source
from tests.helpers import compose_config


def written(tmp_path, prepared, checkpoint, *overrides) -> tuple[str, dict]:
    """The first test case that `medldm sample` writes, and its arrays."""
    paths = (f"data.root={prepared}", f"checkpoint={checkpoint}", f"output={tmp_path}")
    options = ("split=test", "limit=1", "png=false", "data.batch_size=4")
    sample.task(compose_config("sample", *paths, *options, *overrides))
    (path,) = tmp_path.glob("*.h5")
    with h5py.File(path) as file:
        return path.stem, {name: dataset[:] for name, dataset in file.items()}


def test_importing_medldm_loads_no_torch():
    code = "import sys, medldm; assert 'torch' not in sys.modules and callable(medldm.load)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_samples_are_those_of_the_command(prepared, diffusion, tmp_path):
    case, files = written(tmp_path, prepared, diffusion, "seed=3", "sampler.num_steps=4")
    model = medldm.load(diffusion, device="cpu")
    before = model.module.sampler
    images = model.sample(model.conditions(prepared, case), seed=3, num_steps=4, batch_size=4)
    assert images.dtype == np.float32 and images.shape == (len(files["images"]), 1, 64, 64)
    assert np.array_equal(images[:, 0].astype(files["images"].dtype), files["images"])
    assert model.module.sampler is before


def test_conditions_of_one_s_own_give_the_same_images(prepared, diffusion):
    model = medldm.load(diffusion, device="cpu")
    case = load_index(prepared)["cases"][0]["id"]
    known = model.conditions(prepared, case)
    own = {
        "mask": known["mask"][:, 0].numpy(),
        "edges": known["edges"][:, 0].numpy(),
        "view": [model.facts["view_names"][number] for number in known["view"]],
        "phase": [model.facts["phase_names"][number] for number in known["phase"]],
        "slice_position": known["slice_position"].tolist(),
        "case_id": known["case_id"],
    }
    assert np.array_equal(model.sample(own, num_steps=2), model.sample(known, num_steps=2))


def test_reconstructions_are_those_of_the_command(prepared, first_stage, diffusion, tmp_path):
    case, files = written(tmp_path, prepared, first_stage)
    entry = next(entry for entry in load_index(prepared)["cases"] if entry["id"] == case)
    with h5py.File(prepared / entry["file"]) as file:
        real = file["images"][:]
    images = medldm.load(first_stage, device="cpu").reconstruct(real, batch_size=4)
    assert np.array_equal(images[:, 0].astype(files["images"].dtype), files["images"])
    assert medldm.load(diffusion, device="cpu").reconstruct(real[:2]).shape == (2, 1, 64, 64)


def test_translations_are_those_of_the_command(prepared_modalities, translator, tmp_path):
    entry = next(entry for entry in load_index(prepared_modalities)["cases"] if entry["id"].endswith("_t1"))
    source = entry["raw"][0]["path"]
    options = (f"checkpoint={translator}", f"source={source}", "source_modality=t1", f"output={tmp_path}")
    translate.task(compose_config("translate", *options, "targets=[t2,flair]"))
    model = medldm.load(translator, device="cpu")
    made = model.translate(source, "t1", ["t2", "flair"])
    assert list(made) == ["t2", "flair"]
    record = prepare_source(source, model.facts).record() | {"intensity_range": [0.0, 1.0]}
    for name, image in made.items():
        (path,) = tmp_path.glob(f"*_t1_to_{name}.nii.gz")
        np.testing.assert_array_equal(nibabel.load(path).get_fdata(), restore_volume(image, record)[0])


def test_what_a_model_cannot_do_is_told(prepared, first_stage, diffusion):
    stage, denoiser = (medldm.load(path, device="cpu") for path in (first_stage, diffusion))
    with pytest.raises(InputError, match="draws no samples"):
        stage.sample({})
    with pytest.raises(InputError, match="translates nothing"):
        denoiser.translate(np.zeros((1, 64, 64)), "t1")
    with pytest.raises(InputError, match="without 'mask', which the model needs"):
        denoiser.sample({"edges": np.zeros((1, 64, 64))})
    with pytest.raises(InputError, match="has no case 'nobody'"):
        denoiser.conditions(prepared, "nobody")
    with pytest.raises(InputError, match="view: 'XX' is none of SA, LA"):
        blank = np.zeros((1, 64, 64))
        denoiser.sample({"mask": blank, "edges": blank, "view": "XX"})
    with pytest.raises(InputError, match=r"values up to 200; scale them to \[-1, 1\]"):
        stage.reconstruct(np.full((1, 64, 64), 200))
