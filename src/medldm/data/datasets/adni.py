"""ADNI (adni.loni.usc.edu): T1 MR of ageing brains, as downloaded or skull-stripped, at any depth."""

import re
from pathlib import Path

from medldm.data.case import Case
from medldm.data.raw.layouts import VOLUME_SUFFIXES, image_name, images_below, require_cases, require_root
from medldm.errors import InputError

SUBJECT = re.compile(r"\d{3}_S_\d{4,5}")  # the site, the letter S, and the number of the participant


def index(root: str | Path) -> list[Case]:
    """One case for every volume or DICOM folder below the root, except maps beside their image (`_mask`). The
    subject, such as 002_S_0295, is read from the name of the file or its folders, so that all visits of a
    person are on one side of a split.
    """
    root = require_root(root, "NIfTI files whose names or folders hold the subject, such as 002_S_0295")
    cases = []
    for path in images_below(root, VOLUME_SUFFIXES):
        subject = SUBJECT.search(str(path.relative_to(root)))
        if subject is None:
            raise InputError(
                f"{path}: neither its name nor its folders hold a subject such as 002_S_0295; rename it, "
                "or use data=folder"
            )
        name = "_".join((*path.relative_to(root).parts[:-1], image_name(path)))
        cases.append(Case(name, subject[0], {"image": str(path)}))
    return require_cases(cases, root, "NIfTI files at any depth")
