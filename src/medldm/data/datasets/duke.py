"""Duke Breast Cancer MRI (Saha et al. 2018) with the breast and vessel maps of Lew et al. 2024."""

import re
from pathlib import Path

from medldm.data.case import Case
from medldm.data.raw.dicom import DICOM_SUFFIXES, dicom_files
from medldm.data.raw.layouts import SPLIT_FOLDERS, files_below, folder_pairs, require_cases, require_root
from medldm.data.raw.nrrd import nrrd_sizes
from medldm.errors import InputError
from medldm.files import walk


def index(root: str | Path) -> list[Case]:
    """Lists cases of Med-LSDM's NIfTI layout `final_labeled_mr/Breast_MRI_001_<n>.nii.gz` with `final_label/`
    (and `final_labeled_mr_test/`, `final_label_test/`), or of the published download: a folder for each
    patient with the DICOM series and `Segmentation_<patient>_{Breast,Dense_and_Vessels}.seg.nrrd`.

    Patients are subjects. Classes: 1 breast, 2 vessels; the dense tissue of the publication is not used.
    """
    root = require_root(root, "final_labeled_mr/ and final_label/, or Breast_MRI_001/ and so on")
    cases = converted(root) or published(root)
    return require_cases(cases, root, "final_labeled_mr/*.nii.gz, or Breast_MRI_*/ with DICOM and NRRD")


def patient_of(stem: str) -> str:
    """Breast_MRI_001_7 -> Breast_MRI_001."""
    match = re.match(r"Breast_MRI_\d+", stem)
    return match.group(0) if match else re.sub(r"_\d+$", "", stem)


def converted(root: Path) -> list[Case]:
    cases = folder_pairs(root, "final_labeled_mr", "final_label", patient_of, skip=("scaled_",))
    for split in SPLIT_FOLDERS:
        suffix = f"_{split}"
        found = folder_pairs(root, f"final_labeled_mr{suffix}", f"final_label{suffix}", patient_of)
        cases += [Case(c.id, c.subject, c.paths, {"split": split}) for c in found]
    if any("split" in case.attributes for case in cases):  # then final_labeled_mr/ is the training part
        cases = [Case(c.id, c.subject, c.paths, {"split": "train", **c.attributes}) for c in cases]
    return cases


def published(root: Path) -> list[Case]:
    cases = []
    for breast in files_below(root, ("_Breast.seg.nrrd".lower(),)):
        if not breast.name.startswith("Segmentation_"):
            continue
        patient = breast.name.removeprefix("Segmentation_").removesuffix("_Breast.seg.nrrd")
        vessels = breast.with_name(f"Segmentation_{patient}_Dense_and_Vessels.seg.nrrd")
        if not vessels.is_file():
            raise InputError(
                f"{vessels}: missing, though {breast.name} is there; add it, or remove the patient"
            )
        series = pick_series(root, patient, depth_of(breast))
        # The later class overwrites the earlier one, since vessels lie within the breast.
        paths = {"image": str(series), "mask:1": str(breast), "mask:2": f"{vessels}::vessel"}
        cases.append(Case(patient, patient, paths))
    return cases


def pick_series(root: Path, patient: str, depth: int) -> Path:
    """The folder of the first series that has as many slices as the map and is neither post-contrast (Ph1ax
    to Ph4ax, 1st pass...), nor plain T1, nor a segmentation.
    """
    folder = next((folder for folder, _ in walk(root) if folder.name == patient), None)
    if folder is None:
        raise InputError(f"{root}: has no folder {patient} with the DICOM series of its map; add it")
    series = sorted({p.parent for p in files_below(folder, DICOM_SUFFIXES)})
    unwanted = re.compile(r"ph[1-4]ax|t1|segmentation|pass|ph[1-4]/", re.IGNORECASE)
    fitting = [p for p in series if not unwanted.search(p.name) and len(dicom_files(p)) == depth]
    if not fitting:
        raise InputError(
            f"{folder}: no pre-contrast series of {depth} slices, as its map has; add the series"
        )
    return fitting[0]


def depth_of(path: Path) -> int:
    """The number of slices of an NRRD map."""
    return nrrd_sizes(path)[-1]
