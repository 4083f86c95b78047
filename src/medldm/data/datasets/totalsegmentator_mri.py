"""TotalSegmentator MRI (D'Antonoli et al., Radiology 2025): MR of all body parts with one mask for each
organ."""

import re
from pathlib import Path

from medldm.data.case import Case, stem_of
from medldm.data.raw.layouts import (
    existing_volume,
    folder_pairs,
    require_cases,
    require_root,
    volume_files,
)
from medldm.data.raw.tables import read_rows
from medldm.data.splits import subset_of
from medldm.errors import InputError

CLASSES = (
    "kidney", "vessels", "gallbladder", "liver", "stomach", "pancreas", "adrenal", "lung", "vertebrae",
    "esophagus", "trachea", "heart", "pulmonary_artery", "small_bowel", "duodenum", "colon", "ribs",
    "humerus", "scapula", "clavicula", "femur", "hip", "sacrum", "autochthon", "iliopsoas",
    "urinary_bladder", "skin", "spleen", "fat", "skeletal_muscle",
)  # fmt: skip
VESSEL_NAMES = ("aorta", "inferior_vena_cava", "portal_vein_and_splenic_vein", "iliac_artery", "iliac_vena")


def index(root: str | Path) -> list[Case]:
    """Lists cases of the published `s0001/{mri.nii.gz, segmentations/*.nii.gz}`, merged into 30 classes by
    file name, or of Med-LSDM's `[{train,test}/]mr/` with `label/`. The column `split` of `meta.csv` is kept.
    """
    root = require_root(root, "s0001/mri.nii.gz and so on, or mr/ and label/")
    cases = folder_pairs(root, "mr", "label", lambda stem: re.sub(r"_\d+$", "", stem)) or published(root)
    return require_cases(cases, root, "s0001/{mri.nii.gz, segmentations/*.nii.gz}")


def class_of(stem: str) -> int | None:
    """The class of a segmentation by its file name, where left and right are one; None for other
    structures.
    """
    if stem.startswith(VESSEL_NAMES):
        return 1 + CLASSES.index("vessels")
    for name in (stem, *(stem.rsplit("_", k)[0] for k in range(1, stem.count("_") + 1))):
        if name in CLASSES:
            return 1 + CLASSES.index(name)
    return None


def published(root: Path) -> list[Case]:
    cases, split = [], meta_split(root)
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and re.fullmatch(r"s\d+", p.name)):
        image = existing_volume(folder / "mri.nii.gz")
        if image is None:
            raise InputError(f"{folder / 'mri.nii.gz'}: missing; restore it, or remove the folder")
        if not (folder / "segmentations").is_dir():
            raise InputError(f"{folder / 'segmentations'}: missing; restore it, or remove {folder}")
        paths = {"image": str(image)}
        organs = [(class_of(stem_of(path)), path) for path in volume_files(folder / "segmentations")]
        for number, path in organs:
            if number is not None:
                paths[f"mask:{number}:{stem_of(path)}"] = str(path)
        attributes = {"split": split[folder.name]} if folder.name in split else {}
        cases.append(Case(folder.name, folder.name, paths, attributes))
    return cases


def meta_split(root: Path) -> dict[str, str]:
    """{subject: split} of the published meta.csv (image_id;...;split); empty where there is none."""
    path = root / "meta.csv"
    if not path.is_file():
        return {}
    rows = [row.cells for row in read_rows(path, ["image_id"], known=["split"])]
    found = {row["image_id"]: subset_of(row.get("split", "")) for row in rows}
    return {name: split for name, split in found.items() if split is not None}
