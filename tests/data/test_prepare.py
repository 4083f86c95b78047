import csv
import gzip
import json
import os
import shutil
from pathlib import Path

import cv2
import h5py
import nibabel
import numpy as np
import pytest
from scipy import ndimage

from medldm.commands import prepare as prepare_command
from medldm.data import hdf5
from medldm.data.datasets import folder
from medldm.data.datasets import mnms2 as mnms2_dataset
from medldm.data.hdf5 import HandleCache, open_hdf5
from medldm.data.phantoms.cardiac import write_mnms2
from medldm.data.preparation.prepare import prepare_dataset
from medldm.data.prepared import load_index
from medldm.data.raw.readers import read_image
from medldm.data.records import read_images
from medldm.errors import InputError
from tests.data.conftest import MNMS2_LABELS, settings
from tests.helpers import compose_config


def prepare(raw, root, **preprocess) -> Path:
    return prepare_dataset(dataset="mnms2", raw=raw, root=root, **settings(labels=MNMS2_LABELS, **preprocess))


def rewrite(path: Path, change) -> None:
    image = nibabel.load(path)
    array = change(np.array(image.dataobj))
    nibabel.save(nibabel.Nifti1Image(array, image.affine), path)


# ---- index and phantom ----


def test_mnms2_index_finds_four_acquisitions_a_subject_without_cine(raw_mnms2):
    cases = mnms2_dataset.index(raw_mnms2)
    assert [case.id for case in cases[:4]] == ["001_LA_ED", "001_LA_ES", "001_SA_ED", "001_SA_ES"]
    assert len(cases) == 12 and not any("CINE" in case.paths["image"] for case in cases)
    assert cases[0].attributes["vendor"] and cases[0].attributes["disease"]


def test_mnms2_index_does_without_the_information_table(raw_copy):
    (raw_copy / "dataset_information.csv").unlink()
    assert mnms2_dataset.index(raw_copy)[0].attributes == {"view": "LA", "phase": "ED"}


def test_phantom_is_a_function_of_its_seed_and_beats(tmp_path, raw_mnms2):
    again = write_mnms2(tmp_path, num_subjects=1, image_size=64, num_slices=(3, 4))
    name = "dataset/001/001_SA_ED.nii.gz"
    assert (again / name).read_bytes() == (raw_mnms2 / name).read_bytes()
    areas = [
        (read_image(raw_mnms2 / f"dataset/001/001_LA_{phase}_gt.nii.gz").array == 1).sum()
        for phase in ("ED", "ES")
    ]
    assert areas[0] > 1.2 * areas[1] > 0
    assert nibabel.load(raw_mnms2 / "dataset/001/001_LA_ED.nii.gz").shape[2] == 1


# ---- what is written ----


def test_prepared_files_follow_schema_version_1(mnms2):
    index = load_index(mnms2)
    assert (index["num_classes"], index["num_views"], index["num_phases"], index["image_size"]) == (
        4,
        2,
        2,
        [64, 64],
    )
    for case in index["cases"]:
        with h5py.File(mnms2 / case["file"]) as file:
            count = case["num_slices"]
            assert (
                file["images"].shape == file["edges"].shape == file["semantic_maps"].shape == (count, 64, 64)
            )
            assert file["images"].chunks == (1, 64, 64) and file["images"].dtype == np.float16
            assert file["edges"].dtype == file["semantic_maps"].dtype == np.uint8
            assert file["images"][()].min() == -1 and file["images"][()].max() == 1
            assert set(np.unique(file["semantic_maps"])) == {0, 1, 2, 3}
            assert file["view"][:2].tolist() == [1, 1] and file["phase"][:2].tolist() == [0, 1]
            assert (
                file["spacing"].shape
                == file["orig_shape"].shape
                == file["intensity_range"].shape
                == (count, 2)
            )
            assert {"schema_version", "subject_id", "dataset", "vendor", "preprocess_hash"} <= set(file.attrs)


def test_label_set_survives_resizing_and_constant_slice_becomes_background(raw_copy, tmp_path):
    def blank_first(array):
        array[:, :, 0] = 5
        return array

    rewrite(raw_copy / "dataset/001/001_SA_ED.nii.gz", blank_first)
    rewrite(raw_copy / "dataset/001/001_LA_ED.nii.gz", np.zeros_like)
    root = prepare(
        raw_copy, tmp_path / "out", resize={"mode": "spacing_crop", "spacing": 6.0, "antialias": True}
    )
    with h5py.File(root / "cases/001.h5") as file:
        assert (file["images"][0] == -1).all() and not file["edges"][0].any()
        assert not file["edges"][2].any() and np.isfinite(file["images"][()]).all()
        assert set(np.unique(file["semantic_maps"])) <= {0, 1, 2, 3}
        assert np.allclose(file["spacing"][()], 6, rtol=0.05)


@pytest.mark.parametrize(
    "change",
    [
        {"resize": {"mode": "pad_square", "spacing": 1.0, "antialias": True}},
        {"resize": {"mode": "stretch", "spacing": 1.0, "antialias": False}},
        {"intensity": {"mode": "slice_minmax"}},
        {"compression": "lzf", "dtype": "float32"},
    ],
)
def test_preprocessing_variants_give_valid_and_different_files(raw_mnms2, mnms2, tmp_path, change):
    root = prepare(raw_mnms2, tmp_path, **change)
    assert load_index(root)["preprocess_hash"] != load_index(mnms2)["preprocess_hash"]
    new, old = (np.stack([record.image for record in read_images(path)]) for path in (root, mnms2))
    assert new.shape == old.shape and np.abs(new).max() <= 1
    assert np.allclose(new, old, atol=1e-3) == ("compression" in change)


def test_second_run_keeps_finished_cases_and_mends_damaged_ones(raw_mnms2, tmp_path):
    root = prepare(raw_mnms2, tmp_path)
    paths = sorted((root / "cases").iterdir())
    times = [path.stat().st_mtime_ns for path in paths]
    whole = paths[1].read_bytes()
    paths[1].write_bytes(whole[: len(whole) // 2])
    prepare(raw_mnms2, root)
    assert [path.stat().st_mtime_ns == time for path, time in zip(paths, times, strict=True)] == [
        True,
        False,
        True,
    ]
    assert len(paths[1].read_bytes()) == len(whole)
    prepare(raw_mnms2, root, resize={"mode": "pad_square", "spacing": 1.0, "antialias": True})
    assert all(path.stat().st_mtime_ns != time for path, time in zip(paths, times, strict=True))


def test_worker_processes_write_the_same_as_one(raw_mnms2, mnms2, tmp_path):
    arguments = {**settings(labels=MNMS2_LABELS), "num_workers": 2}
    root = prepare_dataset(dataset="mnms2", raw=raw_mnms2, root=tmp_path, **arguments)
    for new, old in zip(read_images(root), read_images(mnms2), strict=True):
        assert new.id == old.id and np.array_equal(new.image, old.image)


# ---- bad input ----


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def unknown_label(path: Path) -> None:
    rewrite(path, lambda array: np.where(array == 3, 7, array).astype(np.uint8))


def other_shape(path: Path) -> None:
    rewrite(path, lambda array: array[:-2])


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("003_SA_ES.nii.gz", truncate, "not a complete NIfTI"),
        ("003_SA_ES.nii.gz", lambda path: path.write_bytes(gzip.compress(b"no")), "not a complete NIfTI"),
        ("003_SA_ES_gt.nii.gz", unknown_label, "label 7"),
        ("003_SA_ES_gt.nii.gz", other_shape, "for an image of shape"),
        ("003_SA_ES_gt.nii.gz", Path.unlink, "missing"),
    ],
)
def test_bad_raw_file_is_named_in_one_line_and_finished_cases_stay(raw_copy, tmp_path, name, damage, message):
    damage(raw_copy / "dataset/003" / name)
    root = tmp_path / "out"
    with pytest.raises(InputError, match=message) as error:
        prepare(raw_copy, root)
    assert name in str(error.value) and "\n" not in str(error.value)
    assert not (root / "index.json").exists() and not list(root.rglob("*.tmp"))
    finished = sorted(path.name for path in root.rglob("*.h5"))
    assert finished == ([] if damage is Path.unlink else ["001.h5", "002.h5"])


def test_missing_raw_folder_and_bad_settings_are_input_errors(tmp_path, raw_mnms2):
    with pytest.raises(InputError, match="data.raw"):
        prepare(tmp_path / "nowhere", tmp_path)
    with pytest.raises(InputError, match="resize.mode"):
        prepare(raw_mnms2, tmp_path, resize={"mode": "squash"})
    with pytest.raises(InputError, match="run `medldm prepare "):
        load_index(tmp_path)


def test_truncated_hdf5_is_an_input_error(mnms2, tmp_path):
    path = Path(shutil.copy(mnms2 / "cases/001.h5", tmp_path))
    truncate(path)
    with pytest.raises(InputError, match="001.h5"):
        open_hdf5(path)


# ---- folders of pictures ----


def write_pictures(root: Path, mask_value: int = 1) -> Path:
    generator = np.random.default_rng(0)
    for name in ("a", "b", "c"):
        image = cv2.GaussianBlur(generator.integers(0, 65535, (40, 48)).astype(np.uint16), (9, 9), 3)
        mask = np.zeros((40, 48), np.uint8)
        mask[10:20, 15:30] = mask_value
        for kind, array in (("images", image), ("masks", mask)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(root / kind / f"{name}.png"), array)
    return root


def prepare_folder(raw, root, **changes) -> Path:
    return prepare_dataset(dataset="folder", raw=raw, root=root, **{**settings(), **changes})


def test_folder_of_png_gives_one_slice_a_subject(tmp_path):
    root = prepare_folder(write_pictures(tmp_path / "raw"), tmp_path / "out")
    index = load_index(root)
    assert [case["id"] for case in index["cases"]] == ["a", "b", "c"] and index["num_classes"] == 2
    assert index["num_views"] == index["num_labels"] == 0


def test_folder_without_masks_has_no_classes(tmp_path):
    raw = write_pictures(tmp_path / "raw")
    shutil.rmtree(raw / "masks")
    index = load_index(prepare_folder(raw, tmp_path / "out"))
    assert index["num_classes"] is None and all(
        record.mask is None for record in read_images(tmp_path / "out")
    )


def test_class_numbers_with_gaps_ask_for_a_mapping(tmp_path):
    raw = write_pictures(tmp_path / "raw", mask_value=255)
    with pytest.raises(InputError, match="labels.mapping"):
        prepare_folder(raw, tmp_path / "out")
    changed = settings(labels={"names": None, "mapping": {0: 0, 255: 1}})["preprocess"]
    assert load_index(prepare_folder(raw, tmp_path / "out", preprocess=changed))["num_classes"] == 2


def test_manifest_states_subject_label_split_and_view(tmp_path):
    raw = write_pictures(tmp_path / "raw")
    rows = [
        ("a", "p1", "ill", "train", "SA"),
        ("b", "p1", "well", "train", "LA"),
        ("c", "p2", "ill", "test", "SA"),
    ]
    with open(raw / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "mask", "subject", "label", "split", "view"])
        writer.writerows([(f"images/{n}.png", f"masks/{n}.png", *rest) for n, *rest in rows])
    index = load_index(prepare_folder(raw, tmp_path / "out"))
    assert index["label_values"] == ["ill", "well"] and index["view_names"] == ["SA", "LA"]
    assert [case["num_slices"] for case in index["cases"]] == [2, 1]
    assert index["cases"][0]["slices"]["label"] == [0, 1] and index["cases"][0]["slices"]["view"] == [0, 1]
    splits = json.loads((tmp_path / "out/splits.json").read_text())
    assert splits["default"] == {"train": ["p1"], "val": [], "test": ["p2"]}


def test_absolute_paths_of_a_manifest_name_cases_inside_the_folder(tmp_path):
    raw = write_pictures(tmp_path / "raw")
    (raw / "manifest.csv").write_text(f"image\n{raw / 'images' / 'a.png'}\n")
    (case,) = folder.index(raw)
    assert not case.id.startswith(os.sep) and case.id.endswith("_images_a")
    prepare_folder(raw, tmp_path / "out")
    assert [p.parent for p in tmp_path.rglob("*.h5")] == [tmp_path / "out" / "cases"]


def test_image_without_its_mask_is_an_input_error(tmp_path):
    raw = write_pictures(tmp_path / "raw")
    (raw / "masks/b.png").unlink()
    with pytest.raises(InputError, match="b.png: has no mask"):
        folder.index(raw)


def test_coloured_mask_and_cut_png_are_input_errors(tmp_path):
    raw = write_pictures(tmp_path / "raw")
    cv2.imwrite(
        str(raw / "masks/b.png"), np.random.default_rng(0).integers(0, 255, (40, 48, 3)).astype(np.uint8)
    )
    with pytest.raises(InputError, match="colours"):
        prepare_folder(raw, tmp_path / "out")
    truncate(raw / "images/b.png")
    with pytest.raises(InputError, match="b.png: not a complete image"):
        prepare_folder(raw, tmp_path / "out")


def test_sixteen_bit_and_colour_pictures_are_read_whole(tmp_path):
    raw = write_pictures(tmp_path)
    assert read_image(raw / "images/a.png").array.max() > 255
    cv2.imwrite(str(tmp_path / "colour.png"), np.dstack([np.full((4, 5), v, np.uint8) for v in (0, 0, 255)]))
    assert read_image(tmp_path / "colour.png").array.tolist() == [[76] * 5] * 4
    record = next(read_images(raw / "images"))
    assert record.image.shape == (1, 40, 48) and np.abs(record.image).max() <= 1


# ---- 3D ----


def test_volumes_keep_affine_and_world_position(volumes):
    index = load_index(volumes)
    assert index["spatial_dims"] == 3 and index["num_classes"] == 5
    for case, record in zip(index["cases"], read_images(volumes), strict=True):
        assert nibabel.aff2axcodes(np.array(case["affine"])) == ("S", "P", "L")
        assert all(n % 8 == 0 for n in case["shape"]) and record.image.shape == (1, *case["shape"])
        raw = nibabel.load(next(entry["path"] for entry in case["raw"] if "masks" in entry["path"]))
        voxel = np.argwhere(np.asarray(raw.dataobj) == 4)[0]
        inside = np.linalg.inv(case["affine"]) @ raw.affine @ [*voxel, 1]
        assert record.mask[0][tuple(np.rint(inside[:3]).astype(int))] == 4


def test_volumes_resample_crop_and_fit(tmp_path, volumes):
    raw = Path(load_index(volumes)["cases"][0]["raw"][0]["path"]).parents[1]
    changes = settings(
        spacing=20.0, crop_foreground=True, intensity={"mode": "window", "window": [-1000, 500]}
    )["preprocess"]
    root = prepare_folder(raw, tmp_path, spatial_dims=3, image_size=[16, 16, 12], preprocess=changes)
    case = load_index(root)["cases"][0]
    assert case["shape"] == [16, 16, 12] and np.allclose(case["spacing"], 20)
    assert case["intensity_range"] == [-1000, 500] and set(case["classes"]) == {0, 1, 2, 3, 4}


# ---- files of ldm-medical-image ----


def test_files_of_ldm_medical_image_are_readable_with_view_and_phase_by_position(tmp_path):
    generator = np.random.default_rng(0)
    mapping = {}
    for subject, count in (("001", 8), ("002", 6)):
        with h5py.File(tmp_path / f"{subject}_data.h5", "w") as file:
            file.create_dataset(
                "images", data=np.float32(generator.uniform(-1, 1, (count, 32, 32))), compression="gzip"
            )
            for key in ("edges", "semantic_maps"):
                data = generator.integers(0, 2, (count, 32, 32)).astype(np.uint8)
                file.create_dataset(key, data=data, compression="gzip")
        mapping[subject] = {
            "start_index": 0,
            "end_index": count,
            "num_samples": count,
            "file_name": f"{subject}_data.h5",
        }
    (tmp_path / "dataset_index_mapping.json").write_text(json.dumps(mapping))
    records = list(read_images(tmp_path, subjects=["001"]))
    assert [record.attributes["view"] for record in records] == [1, 1] + [0] * 6
    assert [record.attributes["phase"] for record in records] == [0, 1, 0, 0, 0, 1, 1, 1]
    with h5py.File(tmp_path / "001_data.h5") as file:
        assert np.array_equal(records[3].image[0], file["images"][3])


def test_handles_are_closed_when_too_many_are_open(mnms2, monkeypatch):
    monkeypatch.setattr(hdf5, "HANDLES", HandleCache(max_open=2))
    readers = [open_hdf5(mnms2 / case["file"]) for case in load_index(mnms2)["cases"]]
    assert len(hdf5.HANDLES.readers) == 2 and not readers[0].file and readers[2].file
    assert open_hdf5(readers[2].path) is readers[2]


def test_real_cardiac_slices_prepare_with_edges_and_contours(tmp_path):
    """Of the Sunnybrook Cardiac Data, which are in the public domain: see sunnybrook/SOURCE.md."""
    source = Path(__file__).with_name("sunnybrook")
    records = list(read_images(prepare_folder(source, tmp_path / "out", image_size=256)))
    assert len(records) == 4
    assert all(0.01 < record.edges.mean() < 0.2 and record.mask.max() == 1 for record in records)


def test_a_replaced_file_is_read_anew(mnms2, tmp_path):
    path = Path(shutil.copy(mnms2 / "cases/001.h5", tmp_path / "case.h5"))
    before = open_hdf5(path).read_row("image", 0)
    shutil.copy(mnms2 / "cases/002.h5", tmp_path / "other.h5")
    os.replace(tmp_path / "other.h5", path)
    assert not np.array_equal(open_hdf5(path).read_row("image", 0), before)


def test_preparation_as_run_stretches_each_slice_by_a_cubic_spline(phantom_raw, tmp_path):
    """scipy's zoom of the stored slice and its own minimum and maximum: ldm-medical-image."""
    paths = (f"data.raw={phantom_raw}", f"data.root={tmp_path}", "data.num_workers=0", "data.image_size=48")
    prepare_command.task(compose_config("prepare", "data=mnms2_as_run", *paths))
    index = load_index(tmp_path)
    raw = sorted(phantom_raw.rglob("001_SA_ED.nii.gz"))[0]
    stack = nibabel.load(raw).get_fdata()
    with h5py.File(tmp_path / index["cases"][0]["file"]) as file:
        sources = [name.decode() for name in file["source"][:]]
        stored, maps = (file[key][sources.index(raw.name)] for key in ("images", "semantic_maps"))
    assert stored.dtype == np.float32
    labels = nibabel.load(raw.with_name("001_SA_ED_gt.nii.gz")).get_fdata()
    gaps = []
    for turn in (lambda x: x[:, :, 0], lambda x: x[:, :, 0].T):
        scale = [48 / n for n in turn(stack).shape]
        image = ndimage.zoom(turn(stack), scale, order=3)
        image = (image - image.min()) / (image.max() - image.min()) * 2 - 1
        gaps.append(
            (np.abs(stored - image).max(), (maps != ndimage.zoom(turn(labels), scale, order=0)).sum())
        )
    assert min(gaps)[0] < 1e-5 and min(gaps)[1] == 0
    assert compose_config("train", "data=mnms2_as_run", "data.root=-").data.split == "seed42_350_10"


# ---- CINE frames without maps ----


def without_times(entries: list[dict]) -> list[dict]:
    return [{**entry, "raw": [file["sha256"] for file in entry["raw"]]} for entry in entries]


def test_cine_frames_stand_beside_the_cases_which_stay_the_same(mnms2, mnms2_cine):
    plain, index = load_index(mnms2), load_index(mnms2_cine)
    assert "cine" not in plain and index.keys() - plain.keys() == {"cine"}
    assert without_times(index["cases"]) == without_times(plain["cases"])
    changed = {key for key in plain if index[key] != plain[key]}
    assert changed <= {"cases", "inventory"}  # "cases": when each raw file was read
    assert (mnms2 / "splits.json").read_text() == (mnms2_cine / "splits.json").read_text()
    assert [record.id for record in read_images(mnms2)] == [record.id for record in read_images(mnms2_cine)]
    counts = ("cases", "subjects")
    assert [index["inventory"][key] for key in counts] == [plain["inventory"][key] for key in counts]
    assert index["inventory"]["files_used"] == plain["inventory"]["files_used"] + 6
    assert not any("map" in part["why"] for part in index["inventory"]["left_out"])
    assert any("24 frames of 3 subjects" in note for note in index["inventory"]["notes"])


def test_a_cine_frame_is_prepared_as_its_labelled_acquisition_is(mnms2_cine):
    index = load_index(mnms2_cine)
    for case, cine in zip(index["cases"], index["cine"], strict=True):
        assert (cine["id"], cine["subject"], cine["cine"]) == (f"{case['id']}_cine", case["subject"], True)
        assert (cine["max_class"], cine["content"].keys()) == (None, {"image"})
        slices = cine["slices"]
        assert cine["num_slices"] == 2 * case["num_slices"]  # four frames of the two labelled ones
        assert set(slices["phase"]) == {-1} and set(slices["view"]) == {0, 1}
        with h5py.File(mnms2_cine / case["file"]) as labelled, h5py.File(mnms2_cine / cine["file"]) as frames:
            assert not {"semantic_maps", "edges"} & set(frames)
            for view, phase, frame in ((1, 0, 0), (1, 1, 2), (0, 0, 0), (0, 1, 2)):
                own = (labelled["view"][()] == view) & (labelled["phase"][()] == phase)
                source = f"{case['subject']}_{('SA', 'LA')[view]}_CINE.nii.gz::{frame}"
                same = np.array(slices["source"]) == source
                assert np.array_equal(frames["images"][same], labelled["images"][own])


def test_every_nth_frame_joins_cases_that_are_kept(raw_copy, tmp_path):
    root = prepare(raw_copy, tmp_path / "out")
    times = {path: path.stat().st_mtime_ns for path in (root / "cases").iterdir()}
    (raw_copy / "dataset/002/002_LA_CINE.nii.gz").unlink()
    options = settings(labels=MNMS2_LABELS)
    prepare_dataset(dataset="mnms2", raw=raw_copy, root=root, cine=3, **options)
    assert {path: path.stat().st_mtime_ns for path in times} == times
    cine = load_index(root)["cine"]
    sources = [sorted(set(entry["slices"]["source"])) for entry in cine]
    assert sources[1] == ["002_SA_CINE.nii.gz::0", "002_SA_CINE.nii.gz::3"] and len(sources[0]) == 4
    assert "CINE: 1 of 6 files" in load_index(root)["inventory"]["notes"][1]
    prepare_dataset(dataset="mnms2", raw=raw_copy, root=root, select={"max_images": 1}, cine=3, **options)
    index = load_index(root)
    assert [entry["subject"] for entry in index["cine"]] == [entry["subject"] for entry in index["cases"]]
    prepare(raw_copy, root)
    assert "cine" not in load_index(root)


@pytest.mark.parametrize(
    ("cine", "change", "line"),
    [
        (0, {}, "data.cine=0: give true"),
        ("2", {}, "data.cine=2: give true"),
        (1.5, {}, "data.cine=1.5: give true"),
        (True, {"spatial_dims": 3, "image_size": None}, "data.cine: frames are prepared as slices"),
        (
            True,
            {"dataset": "brats", "spatial_dims": 3},
            "data.cine: the dataset brats has no such option; set it to null",
        ),
        (True, {"raw": "flat"}, "001_SA_CINE.nii.gz: has shape .* set data.cine=false"),
        (True, {"raw": "cut"}, "001_SA_CINE.nii.gz: not a complete NIfTI file"),
        (True, {"raw": "none"}, "holds no NNN_SA_CINE.nii.gz; restore them, or set data.cine=false"),
    ],
)
def test_cine_that_cannot_be_prepared_is_told_in_one_line(raw_copy, tmp_path, cine, change, line):
    files = sorted(raw_copy.glob("dataset/*/*_CINE.nii.gz"))
    state = change.get("raw")
    if state == "flat":
        rewrite(files[1], lambda array: array[..., 0])
    if state == "cut":
        files[1].write_bytes(files[1].read_bytes()[:200])
    for path in files if state == "none" else ():
        path.unlink()
    options = {"dataset": "mnms2", **settings(labels=MNMS2_LABELS), **change, "raw": raw_copy}
    with pytest.raises(InputError, match=line):
        prepare_dataset(root=tmp_path / "out", cine=cine, **options)


def test_cine_frames_have_no_map_to_crop_to(raw_mnms2, tmp_path):
    options = settings(labels=MNMS2_LABELS, crop_label_margin=0.3)
    with pytest.raises(InputError, match="crop_label_margin=null or data.cine=false"):
        prepare_dataset(dataset="mnms2", raw=raw_mnms2, root=tmp_path / "out", cine=True, **options)
