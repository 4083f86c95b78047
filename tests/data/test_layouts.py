"""Raw folders as people keep them: links, stray files, published layouts old and new, what is left out."""

import json
import shlex
from pathlib import Path

import cv2
import nibabel
import numpy as np
import pytest
from omegaconf import OmegaConf

from medldm.commands import prepare
from medldm.data.case import Case
from medldm.data.datasets import adni, autopet, brats, class_folders, folder, synthrad
from medldm.data.preparation.labels import Labels, mapping_override
from medldm.data.preparation.recipe import make_recipe
from medldm.data.preparation.selection import find_cases, stated_splits, with_safe_names
from medldm.data.raw.inventory import same_images, summary, take_inventory
from medldm.errors import InputError
from medldm.files import safe_names
from tests.data.conftest import settings
from tests.helpers import compose_config

OLD, NEW = ("t1", "t1ce", "t2", "flair"), ("t1n", "t1c", "t2w", "t2f")


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def inventory_of(dataset: str, raw: Path, **options) -> dict:
    """{why: count} and notes of a raw folder."""
    notes: list[str] = []
    cases = find_cases(dataset, raw, options, notes.append)
    taken = take_inventory(raw, cases, cases, notes=notes, modalities=options.get("modalities", ()))
    assert summary(taken, {})
    return {part["why"].partition(",")[0]: part["count"] for part in taken["left_out"]} | {"notes": notes}


# ---- links ----


def linked(root: Path, target: Path, *names: str) -> None:
    """Links below `root` to what lies under the same names in `target`."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(target / name)


LINKS = {  # dataset -> (files of the download, what is linked of it)
    "brats": ([f"BraTS2021_0000{i}/BraTS2021_0000{i}_t1.nii.gz" for i in (1, 2)], ["BraTS2021_00001"]),
    "autopet": ([f"PETCT_{i}/a/{n}.nii.gz" for i in "12" for n in ("CTres", "SEG")], ["PETCT_1"]),
    "synthrad": ([f"Task1/pelvis/1PA00{i}/mr.nii.gz" for i in (1, 2)], ["Task1/pelvis"]),
    "ixi": ([f"output/s{i}/T1w.nii.gz" for i in (1, 2)], ["output"]),
    "adni": (["002_S_0295/T1.nii.gz", "011_S_0002/T1.nii.gz"], ["002_S_0295", "011_S_0002"]),
    "lidc": (["LIDC-IDRI-0001/a.npy", "LIDC-IDRI-0002/a.npy"], ["LIDC-IDRI-0001"]),
    "mrnet": (["train/sagittal/0000.npy", "valid/sagittal/1130.npy"], ["train", "valid/sagittal"]),
    "nih_cxr14": ([f"images_00{i}/images/0000000{i}_000.png" for i in (1, 2)], ["images_001"]),
    "class_folders": (["NORMAL/a.png", "PNEUMONIA/b.png"], ["NORMAL"]),
    "folder": (["images/site_a/a.png", "images/site_b/b.png"], ["images/site_a", "images/site_b/b.png"]),
    "totalsegmentator_mri": (
        [f"s000{i}/{n}.nii.gz" for i in (1, 2) for n in ("mri", "segmentations/liver")], ["s0001"]
    ),
}  # fmt: skip


@pytest.mark.parametrize("dataset", LINKS)
def test_linked_folders_and_files_are_found_like_copies(tmp_path, dataset):
    files, links = LINKS[dataset]
    touch(*(tmp_path / "download" / name for name in files))
    linked(tmp_path / "study", tmp_path / "download", *links)
    touch(*(tmp_path / "study" / name for name in files if not (tmp_path / "study" / name).exists()))
    found = [find_cases(dataset, tmp_path / name, {}) for name in ("download", "study")]
    assert [case.id for case in found[1]] == [case.id for case in found[0]] and len(found[1]) == 2


def test_a_link_to_a_folder_above_ends_and_one_that_leads_nowhere_is_counted(tmp_path):
    touch(tmp_path / "raw/images/a.png", tmp_path / "raw/images/sub/b.png")
    (tmp_path / "raw/images/sub/loop").symlink_to(tmp_path / "raw")
    (tmp_path / "raw/images/c.png").symlink_to(tmp_path / "unmounted/c.png")
    assert [case.id for case in folder.index(tmp_path / "raw")] == ["a", "sub_b"]
    assert inventory_of("folder", tmp_path / "raw")["links that lead nowhere"] == 1


# ---- what is left out ----


def test_a_file_in_the_place_of_the_raw_folder_is_told_apart_from_none(tmp_path):
    touch(tmp_path / "manifest.csv")
    for dataset in LINKS:
        with pytest.raises(InputError, match="is a file; give the folder that holds"):
            find_cases(dataset, tmp_path / "manifest.csv", {})
        with pytest.raises(InputError, match="no such folder; give the folder that holds"):
            find_cases(dataset, tmp_path / "nowhere", {})


def test_what_is_left_out_is_counted_and_named(tmp_path):
    raw = tmp_path / "raw"
    for i in range(3):
        touch(*(raw / f"s{i}/s{i}_{key}.nii.gz" for key in (*OLD, "seg")))
    (raw / "s1/s1_t1ce.nii.gz").unlink()
    (raw / "s2/s2_seg.nii.gz").unlink()
    touch(
        raw / "s0/._s0_t1.nii.gz", raw / ".DS_Store", raw / "__MACOSX/s0/s0_t2.nii.gz", raw / "survival.csv"
    )
    touch(raw / "s0/s0_t1_bet.nii.gz", raw / "s9/s9_seg.nii.gz")
    (raw / "copy.nii.gz").symlink_to(raw / "s0/s0_t1.nii.gz")
    counts = inventory_of("brats", raw, modalities=OLD)
    assert counts == {
        "hidden files": 3,
        "files that are no images": 1,
        "links to images that are used already": 1,
        "images that are none of the dataset's": 1,
        "maps that no image uses": 1,
        "subjects without t1ce": 1,
        "subjects without a class map": 1,
        "notes": [],
    }


def test_the_index_and_the_last_lines_say_what_was_left_out(tmp_path, capsys):
    for name in ("a", "b", "b_copy"):
        picture = np.random.default_rng(len(name)).integers(0, 255, (32, 32)).astype(np.uint8)
        touch(tmp_path / f"raw/images/{name}.png")
        cv2.imwrite(str(tmp_path / f"raw/images/{name}.png"), picture)
    touch(tmp_path / "raw/images/notes.txt")
    options = ("data=folder", "data.image_size=32", "data.num_workers=0", "data.preprocess.edges=null")
    paths = (f"data.raw={tmp_path / 'raw'}", f"data.root={tmp_path / 'out'}")
    prepare.task(compose_config("prepare", *options, *paths))
    lines = capsys.readouterr().out.splitlines()
    assert f"Used 3 of 4 files below {tmp_path / 'raw'}: 3 cases of 3 subjects." in lines
    assert any("no images" in line and "notes.txt" in line for line in lines)
    assert lines[-2].startswith("Split by subject: 1 train, 1 val, 1 test") and lines[-1] == str(
        tmp_path / "out"
    )
    kept = json.loads((tmp_path / "out/index.json").read_text())["inventory"]
    assert kept["files_found"] == 4 and kept["left_out"][0]["names"] == ["images/notes.txt"]


def test_copies_under_two_subjects_are_told():
    def entry(subject: str, raw: str, prepared: str) -> dict:
        files = [{"key": "image", "sha256": raw}, {"key": "mask", "sha256": "m"}]
        return {"subject": subject, "raw": files, "content": {"image": prepared, "mask": "m"}}

    apart = [entry("a", "1", "x"), entry("a", "1", "x"), entry("b", "2", "y")]
    assert same_images(apart) == [] and same_images([{"subject": "a", "raw": [{"path": "a.png"}]}]) == []
    for copy in (entry("c", "1", "z"), entry("c", "3", "x")):
        (note,) = same_images([*apart, copy])
        assert note.startswith("2 subjects share an image with another, such as a and c")


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (adni, ["002_S_0295/T1.nii.gz", "002_S_0295/T1_mask.nii.gz", "002_S_0295/T1_bet_mask.nii.gz"]),
        (
            folder,
            ["images/p0.nii.gz", "images/p0_bet_mask.nii.gz", "images/._p0.nii.gz", "images/p0_seg.nii.gz"],
        ),
    ],
)
def test_maps_beside_images_and_apple_doubles_are_no_images(tmp_path, make, names):
    touch(*(tmp_path / name for name in names))
    (case,) = make.index(tmp_path)
    assert Path(case.paths["image"]) == tmp_path / names[0]


# ---- BraTS ----


def brats_subject(root: Path, name: str, keys=OLD, sep: str = "_", ending: str = ".nii.gz") -> None:
    touch(*(root / name / f"{name}{sep}{key}{ending}" for key in (*keys, "seg")))


def test_brats_since_2023_is_read_with_its_visits_on_one_side(tmp_path):
    for name in ("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-MET-00002-000"):
        brats_subject(tmp_path, name, NEW, sep="-")
    notes: list[str] = []
    cases = brats.index(tmp_path, ["t1", "t2"], note=notes.append)
    assert [case.id for case in cases[:3]] == [
        "BraTS-GLI-00000-000_t1", "BraTS-GLI-00000-000_t2", "BraTS-GLI-00000-001_t1"
    ]  # fmt: skip
    assert {case.subject for case in cases} == {"BraTS-GLI-00000", "BraTS-MET-00002"}
    assert cases[1].paths["image"].endswith("-000-t2w.nii.gz") and "label 3" in notes[0]


@pytest.mark.parametrize(("raw", "expected"), [([0, 1, 2, 3], [0, 1, 2, 3]), ([0, 2], [0, 2])])
def test_label_3_of_brats_since_2023_is_enhancing_tumour(tmp_path, raw, expected):
    name = "BraTS-GLI-00000-000"
    brats_subject(tmp_path, name, NEW, sep="-")
    mask = np.zeros((8, 8, 8), np.uint8)
    mask[: len(raw), 0, 0] = raw
    for key in (*NEW, "seg"):
        array = mask if key == "seg" else np.random.default_rng(0).random((8, 8, 8)).astype(np.float32)
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), tmp_path / name / f"{name}-{key}.nii.gz")
    assert stored_classes(brats.index(tmp_path, ["t1"])[0]) == expected


def test_the_cavity_of_brats_2024_asks_and_the_advice_works(tmp_path):
    name = "BraTS-GLI-02062-100"
    brats_subject(tmp_path, name, NEW, sep="-")
    array = np.arange(512).reshape(8, 8, 8).astype(np.float32)
    for key in (*NEW, "seg"):
        image = (array % 5).astype(np.uint8) if key == "seg" else array
        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), tmp_path / name / f"{name}-{key}.nii.gz")
    (case,) = brats.index(tmp_path, ["t1"])
    with pytest.raises(InputError, match=r"labels 3 as 4, 4 as 5\): the mask holds label 5") as error:
        stored_classes(case)
    assert stored_classes(case, advice_of(str(error.value))) == [0, 1, 2, 3]


def stored_classes(case: Case, *overrides: str) -> list[int]:
    """Classes that `prepare data=brats` makes of a case."""
    from medldm.data.preparation.volumes import read_classes, read_volume

    data = OmegaConf.to_container(
        compose_config("prepare", "data=brats", "data.raw=x", "data.root=y", *overrides).data
    )
    rule = make_recipe(3, data["image_size"], data["preprocess"])
    return np.unique(read_classes(case, read_volume(case.paths["image"]), rule)).tolist()


def test_brats_of_kaggle_and_the_map_of_subject_355(tmp_path):
    brats_subject(tmp_path, "BraTS20_Training_354", ending=".nii")
    brats_subject(tmp_path, "BraTS20_Training_355", ending=".nii")
    shutil_name = tmp_path / "BraTS20_Training_355/W39_1998.09.19_Segm.nii"
    (tmp_path / "BraTS20_Training_355/BraTS20_Training_355_seg.nii").rename(shutil_name)
    notes: list[str] = []
    cases = brats.index(tmp_path, ["t1"], note=notes.append)
    assert [Path(case.paths["mask"]).name for case in cases] == [
        "BraTS20_Training_354_seg.nii",
        shutil_name.name,
    ]
    assert "BraTS20_Training_355" in notes[0]


def test_the_decathlons_four_channels_become_modalities(tmp_path):
    path = tmp_path / "imagesTr/BRATS_001.nii.gz"
    touch(path, tmp_path / "labelsTr/BRATS_001.nii.gz", tmp_path / "imagesTr/._BRATS_001.nii.gz")
    channels = np.stack([np.full((8, 8, 8), k, np.float32) for k in range(4)], -1)
    nibabel.save(nibabel.Nifti1Image(channels, np.eye(4)), path)
    labels = np.arange(512).reshape(8, 8, 8) % 4
    nibabel.save(
        nibabel.Nifti1Image(labels.astype(np.uint8), np.eye(4)), tmp_path / "labelsTr/BRATS_001.nii.gz"
    )
    from medldm.data.raw.readers import read_image

    cases = brats.index(tmp_path)
    assert [read_image(case.paths["image"]).array.max() for case in cases] == [1, 2, 3, 0]
    assert {case.subject for case in cases} == {"BRATS_001"} and stored_classes(cases[0]) == [0, 1, 2, 3]
    assert cases[0].relabel == {0: 0, 1: 2, 2: 1, 3: 4}
    with pytest.raises(InputError, match="has no volume 7"):
        read_image(f"{path}::7")


# ---- AutoPET, SynthRAD ----


def test_nnunets_release_of_autopet_is_not_taken_for_med_lsdms(tmp_path):
    names = [f"imagesTr/fdg_a1_2003_000{k}.nii.gz" for k in range(2)]
    touch(*(tmp_path / "release" / name for name in (*names, "labelsTr/fdg_a1_2003.nii.gz")))
    touch(*(tmp_path / "lsdm/imagesTr" / f"p_1_000{k}.nii.gz" for k in (1, 2)))
    notes: list[str] = []
    (release,) = autopet.index(tmp_path / "release", note=notes.append)
    assert release.paths["image"].endswith("_0000.nii.gz") and "labelsTr" in release.paths["mask"]
    assert (release.id, release.subject) == (
        "fdg_a1_2003",
        "fdg_a1",
    ) and "_0000 is read as the CT" in notes[0]
    (lsdm,) = autopet.index(tmp_path / "lsdm")
    assert lsdm.paths["image"].endswith("_0001.nii.gz") and lsdm.paths["mask"].endswith("_0002.nii.gz")
    touch(tmp_path / "labels/fdg_a1_2003.nii.gz")
    (mapped,) = autopet.index(tmp_path / "release", label_dir=str(tmp_path / "labels"))
    assert mapped.paths["mask"] == str(tmp_path / "labels/fdg_a1_2003.nii.gz")
    touch(tmp_path / "lsdm/labelsTr/p_1.nii.gz")
    with pytest.raises(InputError, match="the CT could be _0000 or _0001"):
        autopet.index(tmp_path / "lsdm")
    (tmp_path / "release/labelsTr/fdg_a1_2003.nii.gz").unlink()
    with pytest.raises(InputError, match=r"labelsTr/fdg_a1_2003.nii.gz: missing, though"):
        autopet.index(tmp_path / "release")


def test_synthrad_2025_is_read_and_the_other_task_left_out(tmp_path):
    for name in ("mr", "ct", "mask"):
        touch(tmp_path / f"Task1/HN/1HNA001/{name}.mha")
    touch(tmp_path / "Task2/HN/2HNA001/cbct.mha", tmp_path / "Task2/HN/2HNA001/ct.mha")
    (case,) = synthrad.index(tmp_path)
    assert case.paths["image"].endswith("1HNA001/mr.mha") and case.paths["body"].endswith("mask.mha")
    assert inventory_of("synthrad", tmp_path)["images that are none of the dataset's"] == 3


def test_split_folders_may_be_spelled_otherwise(tmp_path):
    for part in ("Train", "validation", "TEST"):
        touch(tmp_path / part / "NORMAL/a.png", tmp_path / "ct" / part / "ct/a_1.nii.gz")
        touch(tmp_path / "ct" / part / "label/a_1.nii.gz")
    assert [case.attributes["split"] for case in class_folders.index(tmp_path) if "NORMAL" in case.id] == [
        "train", "val", "test"
    ]  # fmt: skip


# ---- data=folder ----


@pytest.mark.parametrize(
    "names",
    [
        ["p0/t1.nii.gz", "p0/t2.nii.gz", "p1/t1.nii.gz", "p1/t2.nii.gz"],
        ["p0_t1.nrrd", "p0_t2.nrrd", "p1-T1.nrrd", "p1-T2.nrrd"],
        ["p0_0000.nii.gz", "p0_0001.nii.gz", "p1_0000.nii.gz", "p1_0001.nii.gz"],
        ["p0/p0_t1.nii.gz", "p0/p0_t2.nii.gz", "p1/p1_t1.nii.gz", "p1/p1_t2.nii.gz"],
    ],
)
def test_modalities_of_a_folder_by_file_names(tmp_path, names):
    touch(*(tmp_path / "images" / name for name in names), tmp_path / "images/p2_other.nii.gz")
    touch(tmp_path / "masks/p0.nii.gz", tmp_path / "masks/p1.nii.gz")
    cases = folder.index(tmp_path, ["t1", "t2"])
    assert [(c.id, c.subject, c.attributes["label"]) for c in cases] == [
        ("p0_t1", "p0", "t1"), ("p0_t2", "p0", "t2"), ("p1_t1", "p1", "t1"), ("p1_t2", "p1", "t2")
    ]  # fmt: skip
    assert all(c.paths["mask"].endswith(f"masks/{c.subject}.nii.gz") for c in cases)
    assert cases[1].paths["foreground"] == cases[0].paths["image"]
    if "_0000" not in names[0]:
        with pytest.raises(InputError, match="no image is named by one of"):
            folder.index(tmp_path, ["adc"])


def test_modalities_of_a_manifest_are_its_labels_in_their_order(tmp_path):
    touch(*(tmp_path / f"images/{n}.nii.gz" for n in "abcd"))
    rows = [
        f"images/{n}.nii.gz,p{i // 3},{label}"
        for i, (n, label) in enumerate(zip("abc", ("t1", "t2", "pd"), strict=True))
    ]
    (tmp_path / "manifest.csv").write_text("\n".join(["image,subject,label", *rows]))
    cases = folder.index(tmp_path, ["t2", "t1"])
    assert {case.attributes["label"] for case in cases} == {"t1", "t2"}
    with pytest.raises(InputError, match="choose from pd, t1, t2"):
        folder.index(tmp_path, ["t1", "flair"])


def test_dicom_folders_and_bids_names_in_images(tmp_path):
    for name in ("1.2.840.10", "1.2.840.11"):
        (tmp_path / "images" / name).mkdir(parents=True)
        (tmp_path / "images" / name / "0001.dcm").write_bytes(b"\0" * 128 + b"DICM")
    touch(tmp_path / "images/sub-01/ses-1/anat/sub-01_ses-1_T1w.nii.gz")
    touch(tmp_path / "images/sub-01/ses-2/anat/sub-01_ses-2_T1w.nii.gz")
    cases = folder.index(tmp_path)
    assert [case.id for case in cases[:2]] == ["1.2.840.10", "1.2.840.11"]
    assert [case.subject for case in cases[2:]] == ["sub-01", "sub-01"]


def test_images_that_may_show_one_person_are_told(tmp_path):
    touch(*(tmp_path / f"a/images/p{i}_slice{k}.png" for i in range(2) for k in range(2)))
    touch(*(tmp_path / f"b/images/case_{i}.png" for i in range(4)))
    assert "p0_slice0 and p0_slice1 too" in inventory_of("folder", tmp_path / "a")["notes"][0]
    assert inventory_of("folder", tmp_path / "b")["notes"] == []


# ---- manifest.csv ----


def manifest(root: Path, content: str | bytes, *names: str) -> Path:
    touch(*(root / "images" / name for name in (names or ("a.png", "b.png"))))
    data = content if isinstance(content, bytes) else content.encode()
    (root / "manifest.csv").write_bytes(data)
    return root


TABLE = "image,subject,label\nimages/a.png,p1,x\nimages/b.png,p2,\n"


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (TABLE, None),
        (TABLE.replace(",", ";"), None),
        (TABLE.replace(",", "\t").replace("\n", "\r\n"), None),
        (TABLE.encode("utf-16"), None),
        (b"\xef\xbb\xbf" + TABLE.encode(), None),
        (TABLE.replace("p1", "Müller").encode("cp1252"), "cp1252"),
        (TABLE.replace("image,", " Image ,").replace("label", "LABEL"), None),
        (TABLE + "\n,,\n   ,,\n", None),
        (
            "\n".join(f"{i},{line}" if i else f",{line}" for i, line in enumerate(TABLE.splitlines())),
            "without a name",
        ),
        (TABLE.replace("p2,", "p2,NaN"), None),
        (TABLE.replace("/", "\\"), None),
    ],
)
def test_manifests_are_read_as_spreadsheets_and_pandas_write_them(tmp_path, content, word):
    notes: list[str] = []
    cases = folder.index(manifest(tmp_path, content), note=notes.append)
    subjects = ["Müller" if word == "cp1252" else "p1", "p2"]
    assert [(case.id, case.subject) for case in cases] == list(zip("ab", subjects, strict=True))
    assert cases[0].attributes == {"label": "x"} and cases[1].attributes == {}
    assert any("1 of 2 rows state no label" in note for note in notes)
    assert word is None or any(word in note for note in notes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("image,edges\nimages/a.png,e/a.png\n", "column 'edges' has no effect: edges are made from"),
        ("image,Text\nimages/a.png,a knee\n", "column 'Text' has no effect"),
        ("image,spacing\nimages/a.png,0.5\n", "column 'spacing' has no effect"),
        ("image,patient_id\nimages/a.png,7\n", "column 'patient_id' is not known.* rename it to subject"),
        ("image,Segmentation\nimages/a.png,m.png\n", "rename it to mask"),
        ("image,label,label\nimages/a.png,x,y\n", "has the column 'label' twice"),
        ("image,label\nimages/a.png,x,y\n", "line 2 has more cells than the header"),
        ("picture,label\nimages/a.png,x\n", "header line with the column 'image' or 'mask'"),
        ("image,label\n", "no row below it"),
        (b"image,label\nimages/a.png,\x81\x8d\n", "not a text in UTF-8"),
        ("image\nimages/c.png\n", "images/c.png: missing, though manifest.csv line 2"),
        ("image\nmanifest.csv\n", "manifest.csv line 2 names it, but it is no image"),
        ("image\nimages/a.png\nimages/a.png\n", "a.png: is listed 2 times"),
        ("image,label\nimages/a.png,x\n,y\n", "line 3 names no image"),
    ],
)
def test_what_is_wrong_with_a_manifest_is_one_line(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        folder.index(manifest(tmp_path, content))
    assert "\n" not in str(error.value)


def test_columns_kept_as_attributes_are_told(tmp_path):
    notes: list[str] = []
    content = "image,subject,id,vendor\nimages/a.png,p1,17,Canon\n"
    (case,) = folder.index(manifest(tmp_path, content), note=notes.append)
    assert case.attributes == {"id": "17", "vendor": "Canon"} and "id, vendor" in notes[0]


def test_rows_without_a_subject_are_counted(tmp_path):
    notes: list[str] = []
    cases = folder.index(
        manifest(tmp_path, "image,subject\nimages/a.png,p1\nimages/b.png,NaN\n"), note=notes.append
    )
    assert [case.subject for case in cases] == ["p1", "b"]
    assert notes == ["manifest.csv: 1 of 2 rows state no subject, and count as a subject each"]


def test_a_subject_in_two_parts_of_the_stated_split_is_named(tmp_path):
    content = "image,subject,split\nimages/a.png,p1,Train\nimages/b.png,p1,training\n"
    assert stated_splits(folder.index(manifest(tmp_path, content))) == {"p1": "train"}
    content = content.replace("training", "test")
    with pytest.raises(InputError, match="subject p1 is in both train and test"):
        stated_splits(folder.index(manifest(tmp_path, content)))


# ---- names ----


@pytest.mark.parametrize(
    "name",
    [
        "a/b",
        "../p0",
        "..",
        "/etc/passwd",
        "A" * 245,
        "ü" * 120,
        "con",
        "NUL.x",
        ".hidden",
        "a:b*?",
        "tab\tx",
        "p0.",
        " ",
    ],
)
def test_a_safe_name_is_one_visible_file_inside_its_folder_anywhere(tmp_path, name):
    (safe,) = safe_names([name]).values()
    path = (tmp_path / f".{safe}_t1_to_flair.nii.gz.0123abcd-1234567.tmp").resolve()
    path.write_text("")
    assert path.parent == tmp_path and len(list(tmp_path.iterdir())) == 1
    assert (
        not safe.startswith(".")
        and safe == safe.strip(" .")
        and safe.split(".")[0].lower() not in ("con", "nul")
    )
    assert safe_names([safe]) == {safe: safe}


def test_safe_names_are_unique_where_case_and_composition_are_ignored():
    import unicodedata

    names = [
        "p1",
        "P1",
        "p2",
        "a/b",
        "a_b",
        *(unicodedata.normalize(form, "é") for form in ("NFC", "NFD")),
        "A" * 300,
        "A" * 301,
    ]
    safe = safe_names(names)
    assert safe == {name: safe_names(names[::-1])[name] for name in names} and safe["p2"] == "p2"
    assert len({value.casefold() for value in safe.values()}) == len(names)


def test_cases_keep_their_original_names_in_the_index():
    notes: list[str] = []
    cases = [Case("a/b", "../p0", {"image": "x.png"}), Case("c", "p1", {"image": "y.png"})]
    first, second = with_safe_names(cases, notes.append)
    assert (first.id, first.subject) == ("a_b", "_._p0") and len(notes) == 2
    assert first.original == {"original_id": "a/b", "original_subject": "../p0"} and second == cases[1]


def test_odd_subjects_prepare_inside_the_output(tmp_path):
    raw = tmp_path / "raw"
    content = "image,subject\nimages/a.png,../p0\nimages/b.png,s/p0\nimages/c.png,P1\nimages/d.png,p1\n"
    manifest(raw, content, *(f"{n}.png" for n in "abcd"))
    for i, name in enumerate("abcd"):
        cv2.imwrite(str(raw / f"images/{name}.png"), np.full((32, 32), 40 * i, np.uint8))
    options = ("data=folder", "data.image_size=32", "data.num_workers=0", "data.preprocess.edges=null")
    prepare.task(compose_config("prepare", *options, f"data.raw={raw}", f"data.root={tmp_path / 'out'}"))
    index = json.loads((tmp_path / "out/index.json").read_text())
    assert sorted(p.relative_to(tmp_path / "out").parts[0] for p in tmp_path.rglob("*.h5")) == ["cases"] * 4
    assert {case.get("original_subject", case["subject"]) for case in index["cases"]} == {
        "../p0",
        "s/p0",
        "P1",
        "p1",
    }
    assert len({case["file"].casefold() for case in index["cases"]}) == 4


# ---- after a failure ----


def test_a_failed_preparation_leaves_no_empty_folder(tmp_path):
    raw = tmp_path / "raw"
    touch(raw / "images/a.png")
    options = ("data=folder", "data.image_size=32", "data.num_workers=0", f"data.raw={raw}")
    (tmp_path / "there").mkdir()
    for root in (tmp_path / "new/out", tmp_path / "there"):
        with pytest.raises(InputError, match="a.png"):
            prepare.task(compose_config("prepare", *options, f"data.root={root}"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw", "there"] and not any(
        (tmp_path / "there").iterdir()
    )


# ---- advice that is pasted into a shell ----


def advice_of(message: str) -> str:
    """The override in a message, as a shell hands it over."""
    start = message.index("+data.")
    return shlex.split(message[start:].partition(" (so")[0])[0]


@pytest.mark.parametrize(
    ("names", "mapping", "values"),
    [
        (None, None, [-1, 0, 1]),
        (("background", "a"), None, [0, 1, 7]),
        (("background", "necrosis", "oedema", "enhancing tumour"), {0: 0, 1: 1, 2: 2, 4: 3}, [0, 1, 3]),
        (None, {0: 0, 255: 1}, list(range(256))),
    ],
)
def test_the_advice_on_an_unknown_label_works_when_pasted(names, mapping, values):
    mask = np.array(values)
    with pytest.raises(InputError, match="the mask holds label") as error:
        Labels(names, mapping)(mask, "m.nii.gz")
    base = (
        ()
        if mapping is None
        else (f"data.preprocess.labels.mapping={{{', '.join(f'{k}: {v}' for k, v in mapping.items())}}}",)
    )
    cfg = compose_config(
        "prepare", "data=folder", "data.raw=x", "data.root=y", *base, advice_of(str(error.value))
    )
    preprocess = OmegaConf.to_container(cfg.data.preprocess)
    rule = make_recipe(2, 32, preprocess).labels
    classes = Labels(names, rule.mapping)(mask, "m.nii.gz")
    assert classes.shape == mask.shape
    if names and 3 in values:
        assert classes.tolist() == [0, 1, 3] and "3 is enhancing tumour" in str(error.value)


def test_a_mapping_is_written_as_a_shell_takes_it():
    assert shlex.split(mapping_override({0: 0, 255: 1})) == ["+data.preprocess.labels.mapping={0: 0, 255: 1}"]
    assert settings()["preprocess"]["labels"]["mapping"] is None


@pytest.mark.parametrize("inner", ["00000057_brain_{key}.nii", "BraTS20_Training_001_{key}.nii"])
def test_brats_with_every_file_in_a_folder_of_its_name(tmp_path, inner):
    """As copies on Kaggle hold it: the folder's name tells subject and modality, whatever lies inside."""
    subject = tmp_path / "BraTS20_Training_001"
    for key in (*OLD, "seg"):
        touch(subject / f"BraTS20_Training_001_{key}.nii" / inner.format(key=key))
    cases = brats.index(tmp_path)
    assert [case.id for case in cases] == [f"BraTS20_Training_001_{key}" for key in OLD]
    assert {case.subject for case in cases} == {"BraTS20_Training_001"}
    for case in cases:
        key = case.attributes["label"]
        assert Path(case.paths["image"]).parent.name == f"BraTS20_Training_001_{key}.nii"
        assert Path(case.paths["mask"]).parent.name == "BraTS20_Training_001_seg.nii"
        assert case.paths["foreground"] == cases[0].paths["image"]
    touch(subject / "BraTS20_Training_001_t1.nii" / "another.nii")
    with pytest.raises(InputError, match=r"BraTS20_Training_001_t1.nii: holds 2 files"):
        brats.index(tmp_path)
