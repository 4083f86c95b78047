"""Every way an image comes into the program: NIfTI, pictures and what formats.py reads; prepared HDF5 and the
cardiac author's HDF5.
"""

import json
import logging
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from medldm.attributes import TABLES, UNKNOWN, with_unknown
from medldm.data.case import split_path, stem_of
from medldm.data.raw.formats import (
    detached_data,
    dicom_files,
    is_dicom_folder,
    read_dicom_series,
    read_meta_image,
    read_nrrd,
    read_numpy,
)
from medldm.errors import InputError
from medldm.files import walk

log = logging.getLogger(__name__)
NIFTI_SUFFIXES = (".nii", ".nii.gz")
NRRD_SUFFIXES = (".nrrd", ".nhdr")
META_SUFFIXES = (".mha", ".mhd")
RASTER_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
HDF5_SUFFIXES = (".h5", ".hdf5")
NUMPY_SUFFIXES = (".npy",)
IMAGE_SUFFIXES = (
    NIFTI_SUFFIXES + NRRD_SUFFIXES + META_SUFFIXES + RASTER_SUFFIXES + HDF5_SUFFIXES + NUMPY_SUFFIXES
)
MM = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}  # units of length of a NIfTI header, beside mm
COLOUR_ROUNDING = 3 / 255  # of the largest value: how far JPEG drives the channels of a grey picture apart
AUTHOR_INDEX = "dataset_index_mapping.json"
UNFINISHED = "unfinished"  # key of an index whose cases are being replaced: the command that does it
# Attributes that say what a file was made from: a prepared case of raw files and recipe, latents of an image.
STAMPS = ("fingerprint", "image_digest")
# Names that the 2D schema and the rest of the program use for the same thing.
DATASET_NAMES = {"image": ("images", "image"), "mask": ("semantic_maps", "mask"), "edges": ("edges",)}


class Image(NamedTuple):
    array: np.ndarray  # (X, Y[, Z[, T]]) of a NIfTI file, (H, W) of a picture
    affine: np.ndarray | None  # 4x4, mm; None for pictures
    spacing: tuple[float, ...] | None  # mm per array axis
    is_coloured: bool = False  # whether grey was made of colours that differ


class ImageRecord(NamedTuple):
    id: str  # pairs the records of two folders: `<case>_<row, three digits>` in 2D, `<case>` in 3D
    subject: str
    image: np.ndarray  # (C, *S) float32 in [-1, 1]
    attributes: dict  # view, phase, slice_index, num_slices, spacing, affine, vendor... where known
    edges: np.ndarray | None  # (1, *S) uint8 {0, 1}
    mask: np.ndarray | None  # (1, *S) class map


def has_suffix(path: str | Path, suffixes: tuple[str, ...]) -> bool:
    return str(path).lower().endswith(suffixes)


def require_file(path: Path) -> Path:
    if not path.is_file():
        raise InputError(f"{path}: no such file; restore it, or remove its case from the dataset")
    return path


def is_image(path: str | Path) -> bool:
    """Whether `read_image` reads this: a file of a known kind, or a folder with DICOM files right inside.
    Hidden files, such as the `._` ones of a Mac, are none.
    """
    path = Path(path)
    if path.name.startswith("."):
        return False
    return is_dicom_folder(path) if path.is_dir() else path.is_file() and has_suffix(path, IMAGE_SUFFIXES)


def files_of(path: str | Path) -> list[Path]:
    """The files that hold what `read_image` reads of `file` or `file::dataset`: those of a DICOM folder; a
    header and the data it names.
    """
    file, _ = split_path(path)
    if file.is_dir():
        return dicom_files(file)
    data = detached_data(require_file(file)) if has_suffix(file, (".nhdr", ".mhd")) else None
    return [file] if data is None else [file, data]


def read_image(path: str | Path) -> Image:
    """Read `file` or `file::dataset` with its values unchanged, but complex ones as their magnitude.
    InputError where it is missing or damaged.
    """
    file, key = split_path(path)
    image = read_any(file, key)
    if image.array.dtype.kind == "c":
        log.warning("%s: holds complex numbers; their magnitude is taken", file)
        return image._replace(array=np.abs(image.array))
    if image.array.dtype.kind not in "biuf":
        raise InputError(f"{file}: holds colours ({image.array.dtype}); save it with one grey value a voxel")
    return image


def read_any(file: Path, key: str | None) -> Image:
    if file.is_dir():
        return with_spacing(*read_dicom_series(file))
    require_file(file)
    if has_suffix(file, NIFTI_SUFFIXES):
        return read_nifti(file) if key is None else nifti_volume(file, key)
    if has_suffix(file, NRRD_SUFFIXES):
        return with_spacing(*read_nrrd(file, key))
    if has_suffix(file, META_SUFFIXES):
        return with_spacing(*read_meta_image(file))
    if has_suffix(file, RASTER_SUFFIXES):
        picture = decode_raster(file)
        return Image(to_grey(picture), None, None, is_coloured(picture))
    if has_suffix(file, NUMPY_SUFFIXES):
        array, affine = read_numpy(file)
        return Image(array, None, None) if affine is None else with_spacing(array, affine)
    if has_suffix(file, HDF5_SUFFIXES):
        if key is None:
            raise InputError(f"{file}: name the dataset inside as {file.name}::dataset")
        return Image(np.asarray(open_hdf5(file).read(key)), None, None)
    raise InputError(
        f"{file}: unknown file type; use NIfTI, NRRD, MetaImage, a folder of DICOM, PNG, JPEG, NumPy or HDF5"
    )


def nifti_volume(file: Path, key: str) -> Image:
    """Volume number `key` of a 4D file."""
    image = whole_nifti(file, file_identity(file))
    array = image.array
    if array.ndim != 4 or not key.isdigit() or int(key) >= array.shape[3]:
        raise InputError(f"{file}: has no volume {key} (shape {array.shape}); restore it, or remove its case")
    return Image(np.array(array[..., int(key)]), image.affine.copy(), image.spacing[:3])


@lru_cache(maxsize=1)
def whole_nifti(file: Path, identity: tuple[int, int, int]) -> Image:
    """The file that was read last, kept for its other volumes; `identity` tells a file that has changed."""
    return read_nifti(file)


def nifti_shape(path: Path) -> tuple[int, ...]:
    """The axes that a NIfTI file states in its header; no voxel is read."""
    import nibabel

    with nifti_errors(require_file(path)):
        return tuple(map(int, nibabel.load(path).shape))


def with_spacing(array: np.ndarray, affine: np.ndarray) -> Image:
    return Image(array, affine, tuple(np.linalg.norm(affine[:3, :3], axis=0).tolist()))


def read_nifti(path: Path) -> Image:
    import nibabel

    if has_suffix(path, (".gz",)) and not is_gzip(path):
        raise InputError(f"{path}: ends in .gz but is not compressed; rename it to '{str(path)[:-3]}'")
    with nifti_errors(path):
        image = nibabel.load(path)
        array = np.asanyarray(image.dataobj)
        with image.file_map["image"].get_prepare_fileobj("rb") as file:
            voxel_sizes = type(image.header).from_fileobj(file, check=False)["pixdim"][1:4]
    if array.size == 0:
        raise InputError(f"{path}: holds no voxels (shape {array.shape}); remove its case")
    affine = nifti_affine(image.header, voxel_sizes[: array.ndim], path)
    spacing = [*np.linalg.norm(affine[:3, :3], axis=0).tolist(), *[1.0] * array.ndim]
    return Image(array, affine, tuple(spacing[: array.ndim]))


@contextmanager
def nifti_errors(path: Path) -> Iterator[None]:
    """What nibabel says of a damaged file as an InputError."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.imageglobals import logger
    from nibabel.spatialimages import HeaderDataError

    logger.setLevel(logging.CRITICAL)  # what it mends by itself in a header is looked at here
    try:
        yield
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, zlib.error) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{path}: not a complete NIfTI file ({reason}); copy or download it again, or remove its case"
        ) from error


def is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) in (b"\x1f\x8b", b"")  # an empty file is cut, which reading it says


def nifti_affine(header, voxel_sizes: Sequence[float], path: Path) -> np.ndarray:  # noqa: ANN001
    """Voxels -> RAS, mm (4, 4): the sform, or the qform where the former is empty. A file that names neither
    is taken as nibabel takes it, with a warning.

    InputError where voxels get no size: `voxel_sizes` are those of the file, of which nibabel turns 0 into 1.
    """
    stated = {"sform": header.get_sform, "qform": header.get_qform}
    readers = {name: read for name, read in stated.items() if int(header[f"{name}_code"]) > 0}
    if not readers:
        readers = {"header": header.get_base_affine}
    affines = {
        name: affine
        for name, read in readers.items()
        if (name == "sform" or np.all(voxel_sizes)) and (affine := valid_affine(read)) is not None
    }
    if not affines:
        sizes = " x ".join(f"{size:g}" for size in voxel_sizes)
        raise InputError(
            f"{path}: its header gives voxels no size and place ({' and '.join(readers)} of no use, voxel "
            f"sizes {sizes}); set both, in 3D Slicer for instance, or remove its case"
        )
    if "header" in affines:
        log.warning("%s: does not say how it lies in the body; taken as LAS, as nibabel does", path)
    if affines.keys() != readers.keys() and "sform" not in affines:
        log.warning("%s: its sform is empty; its qform is taken", path)
    affine = next(iter(affines.values()))
    unit, in_mm = MM.get(int(header["xyzt_units"]) % 8, ("mm", 1.0))
    if unit != "mm":
        log.warning("%s: its lengths are in %s; converted to mm", path, unit)
    return np.diag([in_mm, in_mm, in_mm, 1.0]) @ affine


def valid_affine(read: Callable[[], np.ndarray]) -> np.ndarray | None:
    """What `read` gives, or None where voxels have no volume in it."""
    from nibabel.spatialimages import HeaderDataError

    try:
        affine = np.asarray(read(), np.float64)
    except HeaderDataError:  # a quaternion that is none
        return None
    return affine if np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-12 else None


def read_raster_mask(path: Path) -> np.ndarray:
    """(H, W) class numbers of a PNG, BMP or TIFF; of a palette the numbers are taken.

    InputError where the file is damaged, has several pages, or holds colours or lossy JPEG.
    """
    picture, data = decode_raster(path), path.read_bytes()
    if data.startswith(b"\xff\xd8"):
        raise InputError(f"{path}: JPEG changes class numbers; save the mask as PNG, from its source")
    if data[:2] in (b"\x89P", b"BM") and (numbers := palette_numbers(path)) is not None:
        return numbers
    if picture.ndim == 3 and (picture != picture[..., :1]).any():
        raise InputError(
            f"{path}: a mask must hold class numbers in one channel, not colours; save it as grey"
        )
    return to_grey(picture)


def decode_raster(path: Path) -> np.ndarray:
    """(H, W), or (H, W, 3) blue, green, red, of a PNG, JPEG, BMP or TIFF with its bit depth kept.

    InputError where the file is damaged or has several pages.
    """
    import cv2

    data = path.read_bytes()
    suffix = path.suffix.lower()
    complete = {".png": b"IEND" in data[-64:]}.get(suffix, True)
    if suffix in (".jpg", ".jpeg"):
        complete = b"\xff\xd9" in data[-1024:]
    array = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED) if data and complete else None
    if array is None:
        raise InputError(f"{path}: not a complete image file; copy or download it again, or remove its case")
    if suffix in (".tif", ".tiff") and (pages := cv2.imcount(str(path), cv2.IMREAD_UNCHANGED)) > 1:
        raise InputError(f"{path}: holds {pages} pages; save one picture a file, or the stack as NIfTI")
    if array.ndim == 3 and array.shape[-1] == 4 and np.ptp(array[..., 3]) > 0:
        log.warning("%s: partly transparent; its colours are taken as they lie", path)
    return array if array.ndim == 2 else np.ascontiguousarray(array[..., :3])


def to_grey(picture: np.ndarray) -> np.ndarray:
    """(H, W) of a decoded picture: equal channels as they are, colours by their luminance (ITU-R BT.601)."""
    import cv2

    if picture.ndim == 2:
        return picture
    if (picture == picture[..., :1]).all():
        return np.ascontiguousarray(picture[..., 0])
    return cv2.cvtColor(picture, cv2.COLOR_BGR2GRAY)


def is_coloured(picture: np.ndarray) -> bool:
    """Whether the channels of a decoded picture differ by more than rounding."""
    if picture.ndim == 2:
        return False
    is_integer = np.issubdtype(picture.dtype, np.integer)
    largest = np.iinfo(picture.dtype).max if is_integer else np.abs(picture).max()
    gap = picture.max(-1).astype(np.float64) - picture.min(-1)
    return bool(gap.max() > COLOUR_ROUNDING * largest)


def palette_numbers(path: Path) -> np.ndarray | None:
    """(H, W) numbers of a picture with a palette, as VOC stores its classes; None where it has none.

    InputError where the palette is grey but not in order: number and grey level are two classes then.
    """
    from PIL import Image as Picture

    with Picture.open(path) as picture:
        if picture.mode != "P":
            return None
        numbers, grey = np.asarray(picture), np.asarray(picture.convert("RGB"))
    if (grey == grey[..., :1]).all() and (grey[..., 0] != numbers).any():
        raise InputError(
            f"{path}: its palette gives other grey levels than its numbers, so its classes are open; save it "
            "as 8-bit grey without a palette"
        )
    return numbers


def read_mask(path: str | Path) -> Image:
    """As `read_image`, but what holds no class numbers (colours, JPEG) is an InputError."""
    file, key = split_path(path)
    if key is None and has_suffix(file, RASTER_SUFFIXES):
        return Image(read_raster_mask(require_file(file)), None, None)
    return read_image(path)


class HDF5Reader:
    """Rows of an HDF5 file. Unfiltered chunks are read straight from the file at their stored offset.

    That is several times faster than h5py (no locks, no chunk cache) and holds no HDF5 state that a fork
    could share. Filtered or oddly chunked datasets go through h5py.
    """

    def __init__(self, path: Path) -> None:
        import h5py

        self.path = Path(path)
        try:
            self.file = h5py.File(require_file(self.path), "r")
        except OSError as error:
            raise InputError(
                f"{path}: not a complete HDF5 file ({str(error).splitlines()[0]}); run `medldm prepare` again"
            ) from error
        self.descriptor = os.open(self.path, os.O_RDONLY)
        self.identity = file_identity(self.path)
        self.stamps = {key: self.file.attrs[key] for key in STAMPS if key in self.file.attrs}
        self.offsets: dict[str, np.ndarray | None] = {}
        self.datasets: dict[str, h5py.Dataset] = {}
        self.maps: dict[str, np.ndarray] = {}

    def dataset(self, key: str):  # noqa: ANN201 - h5py is imported lazily
        if key not in self.datasets:
            names = [name for name in DATASET_NAMES.get(key, (key,)) if name in self.file]
            if not names:
                raise InputError(
                    f"{self.path}: holds no dataset '{key}'; prepare it again with this part switched on"
                )
            self.datasets[key] = self.file[names[0]]
        return self.datasets[key]

    def __contains__(self, key: str) -> bool:
        return any(name in self.file for name in DATASET_NAMES.get(key, (key,)))

    @property
    def attributes(self) -> dict:
        return {
            key: value.tolist() if hasattr(value, "tolist") else value
            for key, value in self.file.attrs.items()
        }

    def row_offsets(self, key: str) -> np.ndarray | None:
        """Byte offset of every row, or None where rows are not stored whole and unfiltered."""
        if key not in self.offsets:
            self.offsets[key] = find_row_offsets(self.dataset(key))
        return self.offsets[key]

    def read_row(self, key: str, row: int) -> np.ndarray:
        """One row of a dataset (one slice of `images`), in its stored dtype."""
        dataset, offsets = self.dataset(key), self.row_offsets(key)
        if offsets is not None:
            out = np.empty(dataset.shape[1:], dataset.dtype)
            if os.preadv(self.descriptor, [out], int(offsets[row])) == out.nbytes:
                return out
        return self.read(key, row)

    def read(self, key: str, selection: object = ()) -> np.ndarray:
        dataset = self.dataset(key)
        try:
            return dataset[selection]
        except OSError as error:
            raise InputError(
                f"{self.path}: dataset '{key}' is damaged ({str(error).splitlines()[0]}); run `medldm "
                "prepare` again"
            ) from error

    def mapped(self, key: str) -> np.ndarray:
        """The whole dataset, mapped into memory where it is stored in one unfiltered piece: a crop reads only
        itself.
        """
        if key not in self.maps:
            dataset = self.dataset(key)
            offset = dataset.id.get_offset() if dataset.chunks is None and dataset.dtype.isnative else None
            if offset is None:
                return self.read(key)
            self.maps[key] = np.memmap(self.path, dataset.dtype, "r", offset, dataset.shape)
        return self.maps[key]

    def is_current(self) -> bool:
        """Whether the path still leads to the file that was opened."""
        return file_identity(self.path) == self.identity

    def close(self) -> None:
        self.file.close()
        os.close(self.descriptor)


def file_identity(path: Path) -> tuple[int, int, int] | None:
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return None
    return state.st_ino, state.st_size, state.st_mtime_ns


def find_row_offsets(dataset) -> np.ndarray | None:  # noqa: ANN001
    from h5py import h5d

    plain = dataset.dtype.isnative and dataset.ndim > 1 and dataset.id.get_create_plist().get_nfilters() == 0
    if not plain or len(dataset) == 0:
        return None
    if dataset.chunks is None:
        start = dataset.id.get_offset()
        row_bytes = dataset.dtype.itemsize * int(np.prod(dataset.shape[1:]))
        return None if start is None else start + row_bytes * np.arange(len(dataset), dtype=np.int64)
    if dataset.chunks != (1, *dataset.shape[1:]) or not isinstance(dataset.id, h5d.DatasetID):
        return None
    offsets = np.full(len(dataset), -1, np.int64)
    for i in range(dataset.id.get_num_chunks()):
        info = dataset.id.get_chunk_info(i)
        offsets[info.chunk_offset[0]] = info.byte_offset
    return offsets if (offsets >= 0).all() else None


class HandleCache:
    """Open HDF5 files of this process, the least recently used closed first. After a fork the child starts
    afresh.
    """

    def __init__(self, max_open: int = 128) -> None:
        self.max_open = max_open
        self.pid = os.getpid()
        self.readers: OrderedDict[str, HDF5Reader] = OrderedDict()
        self.inherited: list = []

    def get(self, path: str | Path) -> HDF5Reader:
        if self.pid != os.getpid():
            self.inherited.append(self.readers)  # kept, not closed: the file state belongs to the parent
            self.readers, self.pid = OrderedDict(), os.getpid()
        key = str(path)
        if key in self.readers:
            if self.readers[key].is_current():
                self.readers.move_to_end(key)
                return self.readers[key]
            self.readers.pop(key).close()
        while len(self.readers) >= self.max_open:
            self.readers.popitem(last=False)[1].close()
        self.readers[key] = HDF5Reader(Path(path))
        return self.readers[key]


HANDLES = HandleCache()


def open_hdf5(path: str | Path) -> HDF5Reader:
    """The reader of a file, shared within this process and opened on first use."""
    return HANDLES.get(path)


def made_from(path: str | Path) -> dict[str, str]:
    """Digests of the arrays of a case that a sample was made from, by key; {} where the file states none."""
    return json.loads(open_hdf5(path).attributes.get("made_from", "{}"))


def read_json(path: Path, mend: str) -> dict:
    if not path.is_file():
        raise InputError(f"{path}: not found; {mend}")
    try:
        return json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); {mend}") from error


def load_index(root: str | Path) -> dict:
    """The `index.json` of a prepared folder, or the same facts derived from the author's index file."""
    root = Path(root)
    mend = f"run `medldm prepare data.raw=RAW data.root={root}` first"
    if not root.is_dir():
        raise InputError(f"data.root={root}: no such folder; {mend}")
    if not (root / "index.json").is_file() and (root / AUTHOR_INDEX).is_file():
        return load_author_index(root)
    index = read_json(root / "index.json", mend)
    if UNFINISHED in index:
        raise InputError(
            f"{root / 'index.json'}: preparation did not finish, old and new cases are mixed; run "
            f"`{index[UNFINISHED]}` again"
        )
    if index.get("schema_version") != 1:
        raise InputError(
            f"{root / 'index.json'}: schema version {index.get('schema_version')} is not 1; prepare the "
            "data again"
        )
    return with_unknown(index)


def author_slices(num_samples: int) -> dict[str, list[int]]:
    """View and phase of the author's files, by position: LA ED, LA ES, then SA ED..., SA ES..."""
    per_phase = (num_samples - 2) // 2
    view = [1, 1] + [0] * (2 * per_phase)
    phase = [0, 1] + [0] * per_phase + [1] * per_phase
    slice_index = [0, 0] + 2 * list(range(per_phase))
    num_slices = [1, 1] + [per_phase] * (2 * per_phase)
    return {"view": view, "phase": phase, "slice_index": slice_index, "num_slices": num_slices}


def load_author_index(root: Path) -> dict:
    """An index for `{NNN}_data.h5` files with `dataset_index_mapping.json` of ldm-medical-image."""
    mapping = read_json(root / AUTHOR_INDEX, "restore it beside the `NNN_data.h5` files")
    cases = []
    for subject, entry in sorted(mapping.items()):
        path = require_file(root / entry.get("file_name", f"{subject}_data.h5"))
        num_samples = int(entry["num_samples"])
        if num_samples < 4 or num_samples % 2:
            raise InputError(f"{path}: {num_samples} samples are no LA ED, LA ES, SA ED..., SA ES... series")
        cases.append(
            {
                "id": subject,
                "subject": subject,
                "file": path.name,
                "num_slices": num_samples,
                "slices": author_slices(num_samples),
                "attributes": {},
            }
        )
    if not cases:
        raise InputError(f"{root / AUTHOR_INDEX}: lists no subjects; prepare the data again")
    image_size = list(open_hdf5(root / cases[0]["file"]).dataset("image").shape[1:])
    return {
        "schema_version": 1,
        "dataset": "mnms2",
        "spatial_dims": 2,
        "image_channels": 1,
        "num_classes": 4,
        "label_names": ["background", "LV cavity", "LV myocardium", "RV"],
        "num_views": 2,
        "view_names": ["SA", "LA"],
        "num_phases": 2,
        "phase_names": ["ED", "ES"],
        "num_labels": 0,
        "label_values": [],
        "image_size": image_size,
        "has_edges": True,
        "cases": cases,
    }


def read_images(
    path: str | Path,
    *,
    subjects: Collection[str] | None = None,
    ids: Collection[str] | None = None,
    sample: int = 0,
) -> Iterator[ImageRecord]:
    """Images of a prepared folder, of a folder that `medldm sample` wrote, or of any folder or file of
    pictures.

    HDF5 and volumes at the top of the folder win over pictures below it, HDF5 over a volume of the same name.
    Values: HDF5 as stored; integers of a
    picture by the range of their type; a NIfTI already within [-1, 1] as it is, any other by its own 0.5 and
    99.5 percentiles (`attributes["rescaled"]` says so). `subjects` and `ids` restrict what is read; `sample`
    picks `images_<k>` where a file holds several samples a condition.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"{path}: no such file or folder")
    found = False
    for record in iterate_records(path, subjects, ids, sample):
        found = True
        yield record
    if not found:
        raise InputError(f"{path}: holds no images that fit; expected HDF5, NIfTI, PNG or JPEG")


def iterate_records(
    path: Path, subjects: Collection[str] | None, ids: Collection[str] | None, sample: int
) -> Iterator[ImageRecord]:
    for file, case in list_image_files(path):
        if has_suffix(file, HDF5_SUFFIXES):
            yield from hdf5_records(file, case, subjects, ids, sample)
            continue
        record_id = case["id"]
        subject = re.sub(r"_\d+$", "", record_id) if has_suffix(file, RASTER_SUFFIXES) else record_id
        if (subjects is None or subject in subjects) and (ids is None or record_id in ids):
            image, attributes = to_unit_range(read_image(file))
            yield ImageRecord(record_id, subject, image, attributes, None, None)


def list_image_files(path: Path) -> list[tuple[Path, dict]]:
    """Files to read with the case facts known about each."""
    if path.is_file():
        return [(path, {"id": stem_of(path)})]
    if (path / "index.json").is_file() or (path / AUTHOR_INDEX).is_file():
        return [(path / case["file"], case) for case in load_index(path)["cases"]]
    top = [path / name for name in next(walk(path))[1] if (path / name).is_file() and is_image(path / name)]
    known = {stem_of(p) for p in top if has_suffix(p, HDF5_SUFFIXES)}
    files = [p for p in top if has_suffix(p, HDF5_SUFFIXES)]
    files += [
        p for p in top if not has_suffix(p, HDF5_SUFFIXES + RASTER_SUFFIXES) and stem_of(p) not in known
    ]
    if not files:
        below = (folder / name for folder, names in walk(path) for name in names)
        files = [p for p in below if is_image(p) and not has_suffix(p, HDF5_SUFFIXES)]
    files.sort()
    return [(file, {"id": stem_of(file)}) for file in files]


def images_below(path: Path) -> list[Path]:
    """Every file of an image in a folder and below it, also those that `list_image_files` passes over."""
    return [folder / name for folder, names in walk(path) for name in names if is_image(folder / name)]


def hdf5_records(
    file: Path,
    case: dict,
    subjects: Collection[str] | None,
    ids: Collection[str] | None,
    sample: int,
) -> Iterator[ImageRecord]:
    reader = open_hdf5(file)
    attributes = {**case.get("attributes", {}), **reader.attributes}
    stated = attributes.get("subject_id", attributes.get("subject", case["id"]))
    subject = str(case.get("subject", stated))
    if subjects is not None and subject not in subjects:
        return
    key = "images" if sample == 0 else f"images_{sample}"
    if not {"image", "images"} & set(reader.file):
        raise InputError(f"{file}: holds a class map and no image, so there is nothing to see or to compare")
    if "image" in reader.file or attributes.get("spatial_dims") == 3:  # one volume, prepared or generated
        if ids is None or case["id"] in ids:
            mask = reader.read("mask") if "mask" in reader else None
            image = np.asarray(reader.read("image" if "image" in reader.file else key), np.float32)
            stated = {kind: case[kind] for kind in TABLES if kind in case}
            yield ImageRecord(case["id"], subject, image, known({**attributes, **stated}), None, mask)
        return
    slices = case.get("slices", {})
    per_slice = {
        name: slices[name] if name in slices else reader.read(name)
        for name in ("view", "phase", "slice_index", "num_slices", "spacing", "label")
        if name in slices or name in reader
    }
    for row in range(len(reader.dataset(key))):
        record_id = f"{case['id']}_{row:03d}"
        if ids is not None and record_id not in ids:
            continue
        facts = {name: np.asarray(values[row]).tolist() for name, values in per_slice.items()}
        yield ImageRecord(
            record_id,
            subject,
            np.asarray(reader.read_row(key, row), np.float32)[None],
            known({**attributes, **facts, "row": row}),
            reader.read_row("edges", row)[None] if "edges" in reader else None,
            reader.read_row("mask", row)[None] if "mask" in reader else None,
        )


def known(attributes: dict) -> dict:
    """Without the view, phase or label that nobody stated."""
    return {k: value for k, value in attributes.items() if not (k in TABLES and value == UNKNOWN)}


def to_unit_range(image: Image) -> tuple[np.ndarray, dict]:
    """(1, *S) float32 in [-1, 1] and what was done."""
    array = image.array
    attributes: dict = {} if image.affine is None else {"affine": image.affine, "spacing": image.spacing}
    if image.affine is None and np.issubdtype(array.dtype, np.unsignedinteger):
        return (array.astype(np.float32) / (np.iinfo(array.dtype).max / 2) - 1)[None], attributes
    array = np.squeeze(np.nan_to_num(array.astype(np.float32)))
    if np.abs(array).max() > 1.001:
        low, high = np.percentile(array, (0.5, 99.5))
        array = (array - low) * (2 / max(high - low, 1e-12)) - 1
        attributes["rescaled"] = True
    return np.clip(array, -1, 1)[None], attributes
