"""AutoPET (FDG-PET-CT-Lesions, TCIA): whole-body CT with an anatomical label map of 37 classes.

The anatomical map is not part of the publication; `label_dir` names a folder of `<case>.nii.gz` made with a
segmentation tool (default: `labels/` below the root). Without it the lesion map of the data (SEG) is taken.
"""

from pathlib import Path

from medldm.data.case import Case
from medldm.data.layouts import existing, folder_pairs, map_folder, nifti_files, require_cases, require_root
from medldm.errors import InputError


def index(root: str | Path, label_dir: str | None = None) -> list[Case]:
    """Cases of the published `PETCT_<patient>/<study>/{CTres,SEG}.nii.gz` (below `FDG-PET-CT-Lesions/` or
    not), of nnU-Net's `imagesTr/<case>_0001.nii.gz` (CT) with `_0002` (map), or of Med-LSDM's
    `{train,test}/ct/` with `label/`.

    Subjects are patients: several studies of one, and windows `<patient>_..._<n>`, stay on one side.
    """
    root = require_root(root, "PETCT_<patient>/<study>/CTres.nii.gz, or train/ct/ and test/ct/")
    cases = (
        folder_pairs(root, "ct", "label", patient_of)
        or nnunet(root)
        or published(root, map_folder(root, label_dir))
    )
    return require_cases(cases, root, "PETCT_*/*/CTres.nii.gz, or {train,test}/{ct,label}/*.nii.gz")


def patient_of(stem: str) -> str:
    """PETCT_0011f3deaf_10445_3 -> PETCT_0011f3deaf; other names without their last number."""
    parts = stem.split("_")
    if parts[0] in ("PETCT", "psma", "fdg") and len(parts) > 1:
        return "_".join(parts[:2])
    return "_".join(parts[:-1]) if len(parts) > 1 and parts[-1].isdigit() else stem


def nnunet(root: Path) -> list[Case]:
    cases = []
    for image in nifti_files(root / "imagesTr"):
        if image.name.endswith("_0001.nii.gz"):
            stem = image.name.removesuffix("_0001.nii.gz")
            label = existing(image.with_name(f"{stem}_0002.nii.gz"))
            if label is None:
                raise InputError(f"{image}: has no map {stem}_0002.nii.gz beside it; add it")
            cases.append(Case(stem, patient_of(stem), {"image": str(image), "mask": str(label)}))
    return cases


def published(root: Path, maps: Path | None) -> list[Case]:
    cases = []
    for image in sorted(root.rglob("CTres.nii*")):
        study, patient = image.parent, image.parent.parent
        name = f"{patient.name}_{study.name}"
        wanted = maps / f"{name}.nii.gz" if maps else study / "SEG.nii.gz"
        label = existing(wanted)
        if label is None:
            raise InputError(f"{wanted}: missing, though {image} is there; add it, or remove the study")
        cases.append(Case(name, patient.name, {"image": str(image), "mask": str(label)}))
    return cases
