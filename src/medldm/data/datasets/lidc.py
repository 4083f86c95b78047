"""LIDC-IDRI (Armato et al., Medical Physics 2011): chest CT, where each scan is one array or file.

It is not published how the arrays were made. Each is scaled by its own minimum and maximum.
"""

import re
from pathlib import Path

from medldm.data.case import Case
from medldm.data.raw.image import NUMPY_SUFFIXES
from medldm.data.raw.layouts import VOLUME_SUFFIXES, image_name, images_below, require_cases, require_root

PATIENT = re.compile(r"LIDC-IDRI-\d{4}")


def index(root: str | Path) -> list[Case]:
    """Lists a case for every `.npy` (slices first), volume or DICOM folder below the root. The subject is the
    patient LIDC-IDRI-0001 and so on where the name of the file or folder states one; otherwise each file is a
    subject of its own.
    """
    root = require_root(root, "arrays as .npy, at any depth")
    cases = []
    for path in images_below(root, NUMPY_SUFFIXES + VOLUME_SUFFIXES):
        parts = path.relative_to(root).parts
        name = "_".join((*parts[:-1], image_name(path)))
        patient = PATIENT.search(name)
        cases.append(Case(name, patient[0] if patient else name, {"image": str(path)}))
    return require_cases(cases, root, "*.npy or NIfTI, at any depth")
