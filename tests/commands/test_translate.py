"""medldm translate, and medldm sample on translation models."""

import json
import re

import h5py
import nibabel
import numpy as np
import pytest
import torch

from medldm.commands import sample, translate
from medldm.data.preparation.recipe import make_recipe
from medldm.errors import InputError
from medldm.shrinking import shrink
from medldm.translating import padded, prepare_source
from tests.data.conftest import settings
from tests.data.test_volumes import affine_of
from tests.helpers import compose_config
from tests.training import run_training


@pytest.fixture(scope="module")
def ldm(prepared_modalities, translator, tmp_path_factory):
    """last.ckpt of a tiny diffusion model on the translator."""
    options = ("experiment=aldm/brats_ldm", f"model.first_stage.checkpoint={translator}")
    return run_training(prepared_modalities, tmp_path_factory.mktemp("ldm") / "run", *options)


@pytest.fixture(scope="module")
def source(prepared_modalities):
    """The raw T1 of one subject, as its scanner wrote it."""
    index = json.loads((prepared_modalities / "index.json").read_text())
    case = next(case for case in index["cases"] if case["id"].endswith("_t1"))
    return case["raw"][0]["path"]


def run(checkpoint, source, output, *overrides) -> dict[str, nibabel.Nifti1Image]:
    options = (f"checkpoint={checkpoint}", f"source={source}", f"output={output}", "source_modality=t1")
    translate.task(compose_config("translate", *options, *overrides))
    return {path.name.split("_to_")[1].split(".")[0]: nibabel.load(path) for path in output.glob("*.nii.gz")}


def save(array, affine, path):
    nibabel.Nifti1Image(array.astype(np.float32), affine).to_filename(path)
    return path


def test_every_other_modality_is_made_on_the_grid_of_the_source(translator, source, tmp_path):
    made, raw = run(translator, source, tmp_path / "out"), nibabel.load(source)
    assert sorted(made) == ["flair", "t1ce", "t2"]
    for image in made.values():
        assert image.shape == raw.shape
        np.testing.assert_allclose(image.affine, raw.affine)
        values = image.get_fdata()
        assert values.min() >= 0 and values.max() <= 1 and values.std() > 0
    assert np.abs(made["t2"].get_fdata() - made["flair"].get_fdata()).max() > 1e-3


def test_every_image_of_a_folder_has_its_provenance_and_a_training_image_is_told(
    translator, prepared_modalities, tmp_path, caplog
):
    index, splits = (json.loads((prepared_modalities / f"{n}.json").read_text()) for n in ("index", "splits"))
    paths = {case["id"]: case["raw"][0]["path"] for case in index["cases"]}
    trained, unseen = (splits["default"][part][0] for part in ("train", "test"))
    run(translator, paths[f"{unseen}_t1"], tmp_path, "targets=[t2]")
    assert not caplog.messages
    run(translator, paths[f"{trained}_t1"], tmp_path, "targets=[flair]")
    assert f"was trained on it (subject {trained})" in caplog.text
    images = json.loads((tmp_path / "provenance.json").read_text())["images"]
    assert images.keys() == {path.name for path in tmp_path.glob("*.nii.gz")}
    assert {facts["source"] for facts in images.values()} == {paths[f"{s}_t1"] for s in (trained, unseen)}


def test_another_orientation_gives_the_same_voxels_turned_back(translator, source, tmp_path):
    raw = nibabel.load(source)
    codes = nibabel.orientations.axcodes2ornt(("P", "S", "L"))
    turn = nibabel.orientations.ornt_transform(nibabel.io_orientation(raw.affine), codes)
    turned = raw.as_reoriented(turn)
    assert turned.shape != raw.shape
    path = save(np.asarray(turned.dataobj), turned.affine, tmp_path / "turned.nii.gz")
    there = run(translator, path, tmp_path / "turned", "targets=[t2]")["t2"]
    here = run(translator, source, tmp_path / "plain", "targets=[t2]")["t2"]
    np.testing.assert_allclose(there.affine, turned.affine)
    np.testing.assert_allclose(there.get_fdata(), here.as_reoriented(turn).get_fdata(), atol=1e-5)


def test_a_source_of_other_voxels_is_resampled_and_put_back(translator, source, tmp_path, caplog):
    raw = nibabel.load(source)
    fine = np.repeat(np.asarray(raw.dataobj), 2, axis=2)
    affine = raw.affine @ np.diag([1, 1, 0.5, 1])
    path = save(fine, affine, tmp_path / "fine.nii.gz")
    image = run(translator, path, tmp_path / "out", "targets=[t2]")["t2"]
    assert image.shape == fine.shape and "resampled to those of training" in caplog.text
    np.testing.assert_allclose(image.affine, affine)


@pytest.mark.parametrize(
    ("code", "spacing", "angle", "shape", "said"),
    [
        ("RAS", (1, 1, 4), 0.0, (6, 28, 24), None),  # as in training
        ("LPI", (1, 1, 4), 0.3, (6, 28, 24), None),  # turned and oblique, the same voxels
        ("RAS", (4, 1, 1), 0.0, (7, 28, 21), "voxels of 1 x 1 x 4 mm; resampled .* 4 x 1 x 1 mm .axes SPL"),
        ("SRA", (1, 4, 1), 0.3, (7, 28, 21), "resampled"),  # the same source with its axes in another order
        ("RAS", (1, 1, 3.6), 0.0, (7, 28, 24), "3.6 x 1 x 1 mm, in training 4 x 1 x 1 mm .*as they are"),
    ],
)
def test_voxel_sizes_are_compared_along_the_body(tmp_path, caplog, code, spacing, angle, shape, said):
    """A model of axial slices 4 mm apart; the same head with its 4 mm along another axis is resampled."""
    preprocess = settings(divisible_by=1)["preprocess"]
    facts = {"preprocess": make_recipe(3, None, preprocess).as_dict(), "spacing": [4.0, 1.0, 1.0]}
    axes = [("RL", "AP", "SI").index(next(p for p in ("RL", "AP", "SI") if c in p)) for c in code]
    size = np.array([(24, 28, 24)[axis] for axis in axes]) / spacing
    affine = affine_of(code, spacing, angle)
    path = save(np.random.default_rng(0).random(np.rint(size).astype(int)), affine, tmp_path / "a.nii.gz")
    volume = prepare_source(str(path), facts)
    assert volume.image.shape[1:] == shape
    assert bool(re.search(said, caplog.text)) if said else not caplog.text
    assert volume.spacing == pytest.approx((3.6 if said and "3.6" in said else 4, 1, 1))


def test_targets_of_one_batch_are_those_of_single_ones(ldm, source, tmp_path):
    together = run(ldm, source, tmp_path / "both", "targets=[flair,t2]")
    alone = run(ldm, source, tmp_path / "one", "targets=[t2]")
    np.testing.assert_allclose(together["t2"].get_fdata(), alone["t2"].get_fdata(), atol=1e-4)


def test_a_seed_repeats_and_another_differs_and_the_fast_mode_has_none(ldm, source, tmp_path):
    def t2(name, *overrides):
        return run(ldm, source, tmp_path / name, "targets=[t2]", *overrides)["t2"].get_fdata()

    first = t2("a", "seed=1")
    assert np.array_equal(first, t2("b", "seed=1"))
    assert np.abs(first - t2("c", "seed=2")).max() > 1e-3
    assert np.array_equal(t2("d", "fast=true", "seed=1"), t2("e", "fast=true", "seed=2"))
    assert json.loads((tmp_path / "d/provenance.json").read_text())["sampler"] is None


def test_an_axis_that_does_not_divide_is_padded_and_cut_back():
    x = torch.rand(1, 1, 30, 16, 9)
    y = padded(x, (16, 16, 16))
    assert y.shape == (1, 1, 32, 16, 16)
    assert torch.equal(y[:, :, :30, :, :9], x) and (y[:, :, 30:] == -1).all() and (y[..., 9:] == -1).all()


def test_voxels_that_are_not_finite_are_replaced_and_reported(translator, source, tmp_path, caplog):
    raw = nibabel.load(source)
    array = np.asarray(raw.dataobj, np.float32)
    array[3, 4, 5], array[6, 7, 8] = np.nan, np.inf
    path = save(array, raw.affine, tmp_path / "holes.nii.gz")
    image = run(translator, path, tmp_path / "out", "targets=[t2]")["t2"]
    assert np.isfinite(image.get_fdata()).all() and "2 values are not finite" in caplog.text


def test_units_of_training_are_the_targets_median_range(translator, source, tmp_path, prepared_modalities):
    cases = json.loads((prepared_modalities / "index.json").read_text())["cases"]
    low, high = np.median([c["intensity_range"] for c in cases if c["id"].endswith("_t2")], axis=0)
    unit = run(translator, source, tmp_path / "unit", "targets=[t2]")["t2"].get_fdata()
    scaled = run(translator, source, tmp_path / "raw", "targets=[t2]", "units=training")["t2"].get_fdata()
    np.testing.assert_allclose(scaled, low + unit * (high - low), rtol=1e-4, atol=1e-3 * high)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["targets=[pd]"], "targets: 'pd' is none of the checkpoint's modalities, t1, t1ce, t2, flair"),
        (["source_modality=dwi"], "source_modality: 'dwi' is none"),
        (["targets=[t1]"], "name other modalities than t1"),
        (["targets=[t2,t2]"], "each once"),
        (["units=kelvin"], "units=kelvin is none of unit, training, source"),
        (["source=nowhere.nii.gz"], "nowhere.nii.gz"),
        (["sampler.num_steps=3"], "the checkpoint has no diffusion"),
    ],
)
def test_mistakes_are_named(translator, source, tmp_path, overrides, message):
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        run(translator, source, tmp_path / "out", *overrides)
    assert not (tmp_path / "out").exists()


def test_a_model_that_translates_nothing_is_named(vqgan_modalities, source, tmp_path):
    with pytest.raises(InputError, match="translates nothing"):
        run(vqgan_modalities, source, tmp_path / "out")


def test_a_volume_without_any_finite_voxel_is_named(translator, tmp_path):
    path = save(np.full((20, 20, 20), np.nan), np.eye(4), tmp_path / "empty.nii.gz")
    with pytest.raises(InputError, match=r"empty\.nii\.gz: holds no finite value"):
        run(translator, path, tmp_path / "out")


def sampled(checkpoint, root, output, *overrides) -> dict[str, np.ndarray]:
    options = (f"checkpoint={checkpoint}", f"data.root={root}", f"output={output}", "data=brats")
    sample.task(compose_config("sample", *options, "png=false", "data.num_workers=0", *overrides))
    return {path.stem: h5py.File(path)["images"][()] for path in output.glob("*.h5")}


def test_sampling_writes_every_ordered_pair_and_the_stages_before(
    ldm, translator, prepared_modalities, tmp_path
):
    splits = json.loads((prepared_modalities / "splits.json").read_text())["default"]
    names = ("t1", "t1ce", "t2", "flair")
    expected = {f"{s}_{a}_to_{b}" for s in splits["test"] for a in names for b in names if a != b}
    whole = sampled(ldm, prepared_modalities, tmp_path / "ldm")
    spade = sampled(ldm, prepared_modalities, tmp_path / "spade", "stage=spade")
    assert whole.keys() == spade.keys() == expected
    ceiling = sampled(ldm, prepared_modalities, tmp_path / "ceiling", "stage=autoencoder")
    first = splits["test"][0]
    assert np.array_equal(ceiling[f"{first}_t1_to_t2"], ceiling[f"{first}_flair_to_t2"])
    own = sampled(translator, prepared_modalities, tmp_path / "translator")
    for name in expected:
        np.testing.assert_allclose(own[name], spade[name], atol=1e-5)
        assert np.abs(whole[name] - spade[name]).max() > 1e-3
    assert json.loads((tmp_path / "spade/provenance.json").read_text())["stage"] == "spade"


def test_a_stage_of_a_model_without_one_is_named(vqgan_modalities, prepared_modalities, tmp_path):
    with pytest.raises(InputError, match="stage=spade: the checkpoint translates nothing"):
        sampled(vqgan_modalities, prepared_modalities, tmp_path / "out", "stage=spade")
    with pytest.raises(InputError, match="stage=gan is none of"):
        sampled(vqgan_modalities, prepared_modalities, tmp_path / "out", "stage=gan")


def test_the_published_patch_of_small_latents_has_one_stage():
    """debug=tiny leaves a discriminator that latents of 4 voxels an edge have room for."""
    patch = {"channels": [32, 64, 128, 256], "strides": [2, 2, 2, 1]}
    small = shrink({"first_stage": {}, "discriminators": {"patch": patch}})
    assert small["discriminators"]["patch"] == {"channels": [16], "strides": [2]}
