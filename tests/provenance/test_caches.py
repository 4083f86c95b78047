"""Cases and latents know what they were made from: renewed with a word, or refused."""

import json
import shutil

import h5py
import numpy as np
import pytest
from PIL import Image as Picture

from medldm.data import hdf5
from medldm.data.loading.datamodule import CaseDataModule
from medldm.data.prepared import load_index
from medldm.data.raw import pictures
from medldm.data.records import read_images
from medldm.errors import InputError
from tests.provenance.conftest import draw, run_encode, run_prepare


def checkpoint_of(folder):
    return folder / "vq" / "checkpoints" / "last.ckpt"


def times(folder):
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.h5")}


def renewed(before, after):
    return sorted(name for name in after if after[name] != before.get(name))


def latents_module(root, **options):
    name = next((root / "latents").iterdir()).name
    return CaseDataModule(root, batch_size=2, keys=("latent", "mask"), latents=name, **options)


def test_a_dataset_copied_elsewhere_with_its_raw_files_stays_valid(copied, caplog):
    cases, latents = times(copied / "data/cases"), next((copied / "data/latents").iterdir())
    cached = times(latents)
    shutil.move(copied / "raw", copied / "raw2")
    run_prepare(copied / "raw2", copied / "data")
    run_encode(checkpoint_of(copied), copied / "data")
    latents_module(copied / "data").setup()
    assert times(copied / "data/cases") == cases and times(latents) == cached and not caplog.messages


def test_a_corrected_image_renews_its_case_and_its_latents_alone(copied, caplog):
    root, folder = copied / "data", next((copied / "data/latents").iterdir())
    cases, latents = times(root / "cases"), times(folder)
    draw(copied / "raw", 1, turned=True)
    run_prepare(copied / "raw", root)
    assert "1 of 5 cases made anew (p1, ...): raw files have changed" in caplog.text
    assert renewed(cases, times(root / "cases")) == ["p1"]
    with pytest.raises(InputError, match=r"1 of 5 cases \(p1, .* prepared anew .*medldm encode") as told:
        latents_module(root).setup()
    assert f"data.root={root}" in str(told.value)
    run_encode(checkpoint_of(copied), root)
    assert "1 of 5 renewed, of images as prepared before" in caplog.text
    assert renewed(latents, times(folder)) == ["p1"]
    module = latents_module(root, cache="ram")
    assert next(iter(module.loader(module.dataset("all"))))["latent"].isfinite().all()


def test_a_corrected_mask_renews_its_case_and_no_latents(copied):
    root, folder = copied / "data", next((copied / "data/latents").iterdir())
    cases, latents = times(root / "cases"), times(folder)
    draw(copied / "raw", 2, turned=True, key="masks")
    run_prepare(copied / "raw", root)
    run_encode(checkpoint_of(copied), root)
    latents_module(root).setup()
    assert renewed(cases, times(root / "cases")) == ["p2"] and times(folder) == latents


def test_another_recipe_stopped_by_a_bad_file_leaves_nothing_to_train_on(copied):
    root = copied / "data"
    (copied / "raw/images/p3.png").write_bytes(b"no picture")
    other = "data.preprocess.intensity.mode=slice_minmax"
    with pytest.raises(InputError, match=r"p3\.png"):
        run_prepare(copied / "raw", root, other)
    for read in (load_index, lambda root: CaseDataModule(root, batch_size=1).setup()):
        with pytest.raises(InputError, match="preparation did not finish, .*run `medldm prepare "):
            read(root)
    draw(copied / "raw", 3)
    run_prepare(copied / "raw", root, other)
    assert {case["preprocess_hash"] for case in load_index(root)["cases"]} == {
        load_index(root)["preprocess_hash"]
    }


def test_a_bad_new_file_leaves_the_earlier_index_usable(copied):
    shutil.copy(copied / "raw/masks/p0.png", copied / "raw/masks/p9.png")
    (copied / "raw/images/p9.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"p9\.png"):
        run_prepare(copied / "raw", copied / "data")
    latents_module(copied / "data").setup()


def test_a_case_replaced_under_a_running_training_is_refused(copied):
    root = copied / "data"
    module = CaseDataModule(root, batch_size=1, keys=("image",))
    dataset = module.dataset("all")
    dataset[0]
    shutil.copy(root / "cases/p1.h5", root / "cases/p0.h5")
    with pytest.raises(InputError, match=r"p0\.h5: was made from other data than index.json says"):
        dataset[0]


def test_latents_swapped_by_hand_are_refused(copied):
    folder = next((copied / "data/latents").iterdir())
    shutil.copy(folder / "p1.h5", folder / "p0.h5")
    module = latents_module(copied / "data")
    with pytest.raises(InputError, match=r"p0\.h5: was made from other data"):
        module.dataset("all")[0]


def test_an_incomplete_cache_is_refused(copied):
    folder = next((copied / "data/latents").iterdir())
    draw(copied / "raw", 7)
    run_prepare(copied / "raw", copied / "data")
    with pytest.raises(InputError, match="incomplete, lacks case p7; run `medldm encode"):
        latents_module(copied / "data").setup()
    (folder / "p7.h5").write_bytes(b"cut")
    run_encode(checkpoint_of(copied), copied / "data")
    latents_module(copied / "data").setup()


def without_fingerprints(root):
    """As an older medldm left it."""
    while hdf5.HANDLES.readers:
        hdf5.HANDLES.readers.popitem()[1].close()
    index = json.loads((root / "index.json").read_text())
    for case in index["cases"]:
        for key in ("content", "fingerprint", "preprocess_hash"):
            del case[key]
        with h5py.File(root / case["file"], "a") as file:
            file.attrs["fingerprint"] = "0" * 16
        case["file_size"] = (root / case["file"]).stat().st_size
        case["raw"] = [{key: file[key] for key in ("path", "size", "mtime_ns")} for file in case["raw"]]
    (root / "index.json").write_text(json.dumps(index))
    for path in (root / "latents").glob("*/*.h5"):
        with h5py.File(path, "a") as file:
            file.attrs.clear()
    for path in (root / "latents").glob("*/latents.json"):
        facts = json.loads(path.read_text())
        path.write_text(json.dumps({k: v for k, v in facts.items() if k not in ("cases", "encoder_sha256")}))


def test_an_older_folder_is_taken_as_it_lies_and_says_so(copied, caplog):
    root = copied / "data"
    without_fingerprints(root)
    latents = times(next((root / "latents").iterdir()))
    latents_module(root).setup()
    assert sum("an older medldm did not record" in message for message in caplog.messages) == 1
    run_encode(checkpoint_of(copied), root)
    assert sum("prepared by an older medldm" in message for message in caplog.messages) == 1
    assert times(next((root / "latents").iterdir())) == latents
    run_prepare(copied / "raw", root)
    assert "5 of 5 cases made anew" in caplog.text
    with pytest.raises(InputError, match="medldm encode"):
        latents_module(root).setup()


def test_pictures_that_an_older_medldm_did_not_turn_are_prepared_again(tmp_path, caplog, monkeypatch):
    for subject in range(3):
        draw(tmp_path / "raw", subject)
    for kind in ("images", "masks"):
        path = tmp_path / "raw" / kind / "p1.png"
        with Picture.open(path) as picture:
            exif = picture.getexif()
            exif[0x0112] = 3  # upside down
            picture.save(path, exif=exif)
    with monkeypatch.context() as earlier:
        earlier.setattr(pictures, "EXIF_TURNS", {})
        run_prepare(tmp_path / "raw", tmp_path / "data")
    before, stored = times(tmp_path / "data/cases"), images_of(tmp_path / "data")
    run_prepare(tmp_path / "raw", tmp_path / "data")
    after, turned = times(tmp_path / "data/cases"), images_of(tmp_path / "data")
    assert renewed(before, after) == ["p1"]
    assert (
        "1 of 3 cases made anew (p1, ...): an older medldm did not turn pictures as their EXIF says"
        in caplog.text
    )
    np.testing.assert_array_equal(turned["p1"], stored["p1"][..., ::-1, ::-1])
    run_prepare(tmp_path / "raw", tmp_path / "data")
    assert times(tmp_path / "data/cases") == after


def images_of(root) -> dict:
    return {record.subject: record.image for record in read_images(root)}
