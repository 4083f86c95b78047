"""What the index functions of datasets share: they walk folders, pair files by name, and sort the modalities
of a subject.
"""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from medldm.data.case import Case, stem_of
from medldm.data.raw.dicom import dicom_images
from medldm.data.raw.image import (
    IMAGE_SUFFIXES,
    META_SUFFIXES,
    NIFTI_SUFFIXES,
    NRRD_SUFFIXES,
    RASTER_SUFFIXES,
    has_suffix,
)
from medldm.data.raw.tables import read_rows
from medldm.data.splits import subset_of
from medldm.errors import InputError
from medldm.files import is_hidden, walk

SPLIT_FOLDERS = ("train", "val", "test")
VOLUME_SUFFIXES = (*NIFTI_SUFFIXES[::-1], *META_SUFFIXES, *NRRD_SUFFIXES)  # the usual one first
# The names of a map beside its image: t1_mask, t1_bet_mask (FSL), t1_brain_mask, t1_seg...
OF_IMAGE = re.compile(r"(.+?)((?:_bet|_brain)?)_(?:mask|seg|label|labels)", re.IGNORECASE)
MAP_NAME = re.compile(
    r"(^|[_\W])(masks?|seg|segm|segmentations?|labels?|labelsTr|labelsTs|gt)([_\W]|$)", re.IGNORECASE
)


# ---- folders ----


def require_root(root: str | Path, holds: str) -> Path:
    root = Path(root)
    if not root.is_dir():
        what = "is a file" if root.is_file() else "no such folder"
        raise InputError(f"data.raw={root}: {what}; give the folder that holds {holds}")
    return root


def files_below(root: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files with one of these suffixes at any depth. Links are followed, hidden files are left out."""
    found = [folder / name for folder, names in walk(root) for name in names if has_suffix(name, suffixes)]
    return sorted(path for path in found if path.is_file())


def pictures_below(root: Path) -> list[Path]:
    """PNG, JPEG, BMP and TIFF files and DICOM radiographs at any depth. Links are followed, hidden files are
    left out.
    """
    radiographs = [path for folder, _ in walk(root) for path in dicom_images(folder) if path != folder]
    return sorted([*files_below(root, RASTER_SUFFIXES), *radiographs])


def files_in(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Files with one of these suffixes right inside a folder, without hidden ones. An empty list where there
    is no such folder.
    """
    names = next(walk(folder))[1] if folder.is_dir() else ()
    return [folder / name for name in names if has_suffix(name, suffixes) and (folder / name).is_file()]


def images_below(
    root: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES, *, with_maps: bool = False
) -> list[Path]:
    """Every image file with one of these suffixes and every DICOM folder or radiograph, at any depth. Class
    maps that lie beside their image are left out unless `with_maps` is given.
    """
    found: list[Path] = []
    for folder, names in walk(root) if root.is_dir() else ():
        images = [folder / name for name in names if has_suffix(name, suffixes)]
        stems = set() if with_maps else {stem_of(path) for path in images}
        found += [path for path in images if path.is_file() and not is_map_of(stem_of(path), stems)]
        found += dicom_images(folder)
    return sorted(found)


def is_map_of(stem: str, stems: Collection[str]) -> bool:
    """Whether the name of a file says that it is the map of another one, whose stem is among `stems`."""
    match = OF_IMAGE.fullmatch(stem)
    return match is not None and bool({match[1], match[1] + match[2]} & set(stems))


def looks_like_map(path: Path) -> bool:
    return any(map(MAP_NAME.search, (path.parent.name, stem_of(path))))


def image_name(path: Path) -> str:
    """The name of a file without its suffix, or the whole name of a DICOM folder."""
    return path.name if path.is_dir() else stem_of(path)


def volume_files(folder: Path) -> list[Path]:
    """Volumes right inside a folder. An empty list where there is no such folder."""
    return files_in(folder, VOLUME_SUFFIXES)


def existing_volume(*candidates: Path) -> Path | None:
    """The first of these paths that is a file. Another suffix of volumes may stand in place of `.nii.gz`."""
    for path in candidates:
        stem = path.name.removesuffix(".gz").removesuffix(".nii")
        for suffix in VOLUME_SUFFIXES:
            if (path.parent / (stem + suffix)).is_file():
                return path.parent / (stem + suffix)
    return None


def map_folder(root: Path, label_dir: str | None) -> Path | None:
    """The folder of maps that were added to a dataset: `label_dir`, else `labels/` where there is one."""
    if label_dir is not None and not Path(label_dir).is_dir():
        raise InputError(f"data.label_dir={label_dir}: no such folder; give the folder of the class maps")
    folder = Path(label_dir) if label_dir is not None else root / "labels"
    return folder if folder.is_dir() else None


def split_folders(root: Path) -> dict[str, str]:
    """{folder below the root: train | val | test} of the folders train/, Validation/, ... in that order."""
    names = sorted(p.name for p in root.iterdir() if p.is_dir() and not is_hidden(p.name))
    found = {name: subset_of(name) for name in names}
    return {name: part for part in SPLIT_FOLDERS for name, own in found.items() if own == part}


# ---- cases ----


def require_cases(cases: Sequence[Case], root: Path, expected: str) -> list[Case]:
    if not cases:
        raise InputError(f"{root}: holds no case of this dataset; expected {expected}")
    name, count = Counter(case.id for case in cases).most_common(1)[0]
    if count > 1:
        first, second, *_ = (case.main_path for case in cases if case.id == name)
        raise InputError(f"{second}: has the name '{name}' like {first}; rename or remove one of them")
    return list(cases)


def folder_pairs(
    root: Path,
    image_dir: str,
    label_dir: str,
    subject_of: Callable[[str], str] = str,
    skip: tuple[str, ...] = (),
) -> list[Case]:
    """Cases of the layout of Med-LSDM, `[{train,val,test}/]<image_dir>/<name>.nii.gz` with a map of the same
    name in `<label_dir>/`. The split that the folders state is kept.
    """
    cases = []
    for name, split in (*split_folders(root).items(), ("", None)):
        folder = root / name
        for image in volume_files(folder / image_dir):
            if image.name.startswith(skip):
                continue
            stem = stem_of(image)
            label = existing_volume(folder / label_dir / f"{stem}.nii.gz")
            if label is None:
                wanted = folder / label_dir / image.name
                raise InputError(f"{wanted}: missing, though {image} is there; add it, or remove the image")
            attributes = {"split": split} if split else {}
            cases.append(Case(stem, subject_of(stem), {"image": str(image), "mask": str(label)}, attributes))
    return cases


def modality_cases(
    subject: str,
    images: Mapping[str, str | Path],
    others: Mapping[str, Path | None],
    *,
    name: str | None = None,
    relabel: Mapping[int, int] | None = None,
    **attributes: str,
) -> list[Case]:
    """One case for each modality, named `<name>_<modality>`, where `name` is by default the subject.
    All are cropped to the foreground of the first of `images`. `others` are files that all of them share.
    """
    if not images:
        return []
    shared = {key: str(path) for key, path in others.items() if path is not None}
    shared["foreground"] = str(next(iter(images.values())))
    return [
        Case(
            f"{name or subject}_{key}",
            subject,
            {"image": str(path), **shared},
            {"label": key, **attributes},
            relabel=dict(relabel or {}),
        )
        for key, path in images.items()
    ]


def check_modality_choice(modalities: Sequence[str], known: Mapping[str, object] | Sequence[str]) -> None:
    unknown = [name for name in modalities if name not in known]
    if unknown or len(set(modalities)) != len(modalities):
        raise InputError(f"data.modalities={list(modalities)}: choose from {', '.join(known)}, each once")


# ---- tables ----


def read_table(path: Path, column: str) -> list[dict[str, str]]:
    """The rows of a table, which must have this column."""
    return [row.cells for row in read_rows(path, [column])]


def read_split_table(root: Path) -> dict[str, str]:
    """{subject: train | val | test} of the columns id and split of `splits.csv`, where there is
    such a file.
    """
    path = root / "splits.csv"
    if not path.is_file():
        return {}
    rows = read_rows(path, ["split"], known=["id"])
    if "id" not in rows[0].cells:
        raise InputError(f"{path}: needs the columns id and split")
    stated = {row.cells["id"]: subset_of(row.cells["split"]) for row in rows}
    wrong = next((row.cells for row in rows if stated[row.cells["id"]] is None), None)
    if wrong:
        raise InputError(
            f"{path}: split '{wrong['split']}' of {wrong['id']} is none of {', '.join(SPLIT_FOLDERS)}"
        )
    return stated


def stated_split_of(
    subject: str, stated: Mapping[str, str], path: Path, patient: str | None = None
) -> dict[str, str]:
    """The attribute `split` of a subject, or of the `patient` of whom it is one visit. InputError where there
    is a table that names neither.
    """
    if not stated:
        return {}
    for name in (subject, patient):
        if name in stated:
            return {"split": stated[name]}
    raise InputError(f"{path}: does not name subject {subject}; add a line for it")
