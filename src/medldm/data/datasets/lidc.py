"""LIDC-IDRI (Armato et al., Medical Physics 2011): chest CT as one array or file a scan.

How the arrays were made is not published; each is scaled by its own least and largest value.
"""

import re
from pathlib import Path

from medldm.data.case import Case
from medldm.data.raw.image import NUMPY_SUFFIXES
from medldm.data.raw.layouts import VOLUME_SUFFIXES, image_name, images_below, require_cases, require_root

PATIENT = re.compile(r"LIDC-IDRI-\d{4}")


def index(root: str | Path) -> list[Case]:
    """Cases of every `.npy` (slices first), volume or DICOM folder below the root. The patient is
    LIDC-IDRI-0001 and so on where file or folder says so, else each file is one of its own.
    """
    root = require_root(root, "arrays as .npy, at any depth")
    cases = []
    for path in images_below(root, NUMPY_SUFFIXES + VOLUME_SUFFIXES):
        parts = path.relative_to(root).parts
        name = "_".join((*parts[:-1], image_name(path)))
        patient = PATIENT.search(name)
        cases.append(Case(name, patient[0] if patient else name, {"image": str(path)}))
    return require_cases(cases, root, "*.npy or NIfTI, at any depth")
