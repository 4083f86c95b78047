"""AutoPET (FDG-PET-CT-Lesions, TCIA): whole-body CT with an anatomical label map of 37 classes.

The anatomical map is not part of the publication; `label_dir` names a folder of `<case>.nii.gz` made with a
segmentation tool (default: `labels/` below the root). Without it, the published map of lesions (SEG,
labelsTr) is used.
"""

import logging
from pathlib import Path

from medldm.data.case import Case, stem_of
from medldm.data.raw.image import NIFTI_SUFFIXES
from medldm.data.raw.layouts import (
    existing_volume,
    files_below,
    folder_pairs,
    map_folder,
    require_cases,
    require_root,
    volume_files,
)
from medldm.data.raw.tables import Note
from medldm.errors import InputError

log = logging.getLogger(__name__)


def index(root: str | Path, label_dir: str | None = None, *, note: Note = log.info) -> list[Case]:
    """Lists cases of four layouts: the published `PETCT_<patient>/<study>/{CTres,SEG}.nii.gz` (below
    `FDG-PET-CT-Lesions/` or not), the challenge's nnU-Net release `imagesTr/<case>_0000.nii.gz` (CT; `_0001`
    is PET) with `labelsTr/<case>.nii.gz`, Med-LSDM's `imagesTr/<case>_0001.nii.gz` (CT) with `_0002` (map),
    and its `{train,test}/ct/` with `label/`.

    Subjects are patients, so that all studies of one, and all parts `<patient>_..._<n>` of a study, are on
    one side of a split.
    """
    root = require_root(root, "PETCT_<patient>/<study>/CTres.nii.gz, or train/ct/ and test/ct/")
    maps = map_folder(root, label_dir)
    cases = folder_pairs(root, "ct", "label", patient_of) or nnunet(root, maps, note) or published(root, maps)
    return require_cases(cases, root, "PETCT_*/*/CTres.nii.gz, or {train,test}/{ct,label}/*.nii.gz")


def patient_of(stem: str) -> str:
    """PETCT_0011f3deaf_10445_3 -> PETCT_0011f3deaf; other names without their last number."""
    parts = stem.split("_")
    if parts[0] in ("PETCT", "psma", "fdg") and len(parts) > 1:
        return "_".join(parts[:2])
    return "_".join(parts[:-1]) if len(parts) > 1 and parts[-1].isdigit() else stem


def nnunet(root: Path, maps: Path | None, note: Note) -> list[Case]:
    """Cases of `imagesTr/`. Where it holds maps `_0002` it is Med-LSDM's and its CT is `_0001`; otherwise it
    is nnU-Net's and its CT is `_0000`.
    """
    images = {stem_of(path): path for path in volume_files(root / "imagesTr")}
    is_medlsdm = any(stem.endswith("_0002") for stem in images)
    if images and is_medlsdm and (root / "labelsTr").is_dir():
        raise InputError(
            f"{root}: has labelsTr/ and maps *_0002 in imagesTr/, so that the CT could be _0000 or _0001; "
            "take one of them away"
        )
    channel = "_0001" if is_medlsdm else "_0000"
    if images:
        note(f"imagesTr/*{channel} is read as the CT ({'Med-LSDM' if is_medlsdm else 'nnU-Net'}'s naming)")
    cases = []
    for stem, image in images.items():
        if not stem.endswith(channel):
            continue
        name = stem.removesuffix(channel)
        wanted = image.with_name(f"{name}_0002.nii.gz")
        if not is_medlsdm:
            wanted = (maps or root / "labelsTr") / f"{name}.nii.gz"
        label = existing_volume(wanted)
        if label is None:
            raise InputError(f"{wanted}: missing, though {image} is there; add it, or remove the image")
        cases.append(Case(name, patient_of(name), {"image": str(image), "mask": str(label)}))
    return cases


def published(root: Path, maps: Path | None) -> list[Case]:
    cases = []
    for image in files_below(root, NIFTI_SUFFIXES):
        if stem_of(image) != "CTres":
            continue
        study, patient = image.parent, image.parent.parent
        name = f"{patient.name}_{study.name}"
        wanted = maps / f"{name}.nii.gz" if maps else study / "SEG.nii.gz"
        label = existing_volume(wanted)
        if label is None:
            raise InputError(f"{wanted}: missing, though {image} is there; add it, or remove the study")
        cases.append(Case(name, patient.name, {"image": str(image), "mask": str(label)}))
    return cases
