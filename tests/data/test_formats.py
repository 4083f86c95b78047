"""DICOM series and NRRD maps, as Duke Breast is published."""

import gzip

import cv2
import numpy as np
import pytest

from medldm.commands import prepare
from medldm.data.datasets import duke, folder, nih_cxr14
from medldm.data.prepared import load_index
from medldm.data.raw.nrrd import read_nrrd
from medldm.data.raw.readers import files_of, is_image, read_image
from medldm.data.records import read_images
from medldm.errors import InputError
from tests.helpers import compose_config

SHAPE, SPACING, ORIGIN = (20, 24, 16), (1.5, 1.2, 2.0), (-15.0, -40.0, 7.0)  # x, y, z; LPS


def write_nrrd(path, array, *, encoding="gzip", extra="", layers=False):
    directions = " ".join(
        f"({','.join(str(s if i == j else 0) for j in range(3))})" for i, s in enumerate(SPACING)
    )
    sizes = " ".join(map(str, array.shape))
    head = (
        f"NRRD0004\n# by a test\ntype: unsigned char\ndimension: {array.ndim}\n"
        f"space: left-posterior-superior\nsizes: {sizes}\n"
        f"space directions: {'none ' if layers else ''}{directions}\nencoding: {encoding}\n"
        f"space origin: ({','.join(map(str, ORIGIN))})\n{extra}\n"
    )
    data = array.astype(np.uint8).tobytes(order="F")
    path.write_bytes(head.encode() + (gzip.compress(data) if encoding == "gzip" else data))


def write_dicom(folder, volume, *, leave_out=()):
    """`volume` (X, Y, Z) as axial slices, written in a shuffled order of file names."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    folder.mkdir(parents=True)
    for z in range(volume.shape[2]):
        if z in leave_out:
            continue
        meta = pydicom.dataset.FileMetaDataset()
        meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = (
            ExplicitVRLittleEndian,
            "1.2.840.10008.5.1.4.1.1.4",
        )
        meta.MediaStorageSOPInstanceUID = generate_uid()
        data = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
        data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
        data.Rows, data.Columns = volume.shape[1], volume.shape[0]
        data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
        data.ImagePositionPatient = [ORIGIN[0], ORIGIN[1], ORIGIN[2] + z * SPACING[2]]
        data.PixelSpacing, data.SliceThickness = [SPACING[1], SPACING[0]], SPACING[2]
        data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 1
        data.RescaleSlope, data.RescaleIntercept = 2, -10
        data.PixelData = volume[:, :, z].T.astype(np.int16).tobytes()
        data.save_as(folder / f"{(7 * z) % 16:03d}.dcm", enforce_file_format=True)


@pytest.fixture
def volume():
    return np.random.default_rng(0).integers(0, 900, SHAPE)


def test_dicom_series_is_read_in_place_and_in_its_units(volume, tmp_path):
    write_dicom(tmp_path / "series", volume)
    image = read_image(tmp_path / "series")
    np.testing.assert_array_equal(image.array, 2 * volume - 10)
    np.testing.assert_allclose(np.diag(image.affine), (-1.5, -1.2, 2.0, 1))
    np.testing.assert_allclose(image.affine[:3, 3], (15, 40, 7))
    write_dicom(tmp_path / "gap", volume, leave_out=(5,))
    with pytest.raises(InputError, match="not evenly spaced"):
        read_image(tmp_path / "gap")
    (tmp_path / "series" / "003.dcm").write_bytes(b"no")
    with pytest.raises(InputError, match="003.dcm"):
        read_image(tmp_path / "series")


@pytest.mark.parametrize("encoding", ["gzip", "raw"])
def test_nrrd_keeps_values_and_place(tmp_path, encoding):
    array = np.random.default_rng(0).integers(0, 3, SHAPE)
    write_nrrd(tmp_path / "a.nrrd", array, encoding=encoding)
    read, affine = read_nrrd(tmp_path / "a.nrrd")
    np.testing.assert_array_equal(read, array)
    np.testing.assert_allclose(affine[:3, 3], (15, 40, 7))
    (tmp_path / "a.nrrd").write_bytes((tmp_path / "a.nrrd").read_bytes()[:-20])
    with pytest.raises(InputError, match="a.nrrd: not a complete NRRD"):
        read_nrrd(tmp_path / "a.nrrd")


def test_a_segment_is_found_by_name_in_its_layer(tmp_path):
    array = np.zeros((2, *SHAPE))
    array[0, :5], array[1, 3:9] = 2, 1
    names = "Segment0_Name:=Dense\nSegment0_LabelValue:=2\nSegment0_Layer:=0\n"
    names += "Segment1_Name:=Vessels\nSegment1_LabelValue:=1\nSegment1_Layer:=1\n"
    write_nrrd(tmp_path / "s.seg.nrrd", array, extra=names, layers=True)
    vessels, _ = read_nrrd(tmp_path / "s.seg.nrrd", "vessel")
    np.testing.assert_array_equal(vessels, array[1] == 1)


def test_duke_as_published_becomes_image_breast_and_vessels(volume, tmp_path):
    raw, patient = tmp_path / "raw", "Breast_MRI_001"
    study = raw / "Duke-Breast-Cancer-MRI" / patient / "01-01-1990"
    write_dicom(study / "2.000-ax dyn pre-1", volume)
    write_dicom(study / "3.000-ax dyn 1st pass-2", volume[::-1])
    write_dicom(study / "4.000-Ph2ax dyn-3", volume[::-1])
    maps = raw / "maps" / patient
    maps.mkdir(parents=True)
    breast, other = np.zeros(SHAPE), np.zeros(SHAPE)
    breast[2:15, 3:20, 2:14], other[4:7, 5:9, 4:9], other[8:11, 5:9, 4:9] = 1, 1, 2
    write_nrrd(maps / f"Segmentation_{patient}_Breast.seg.nrrd", breast)
    write_nrrd(maps / f"Segmentation_{patient}_Dense_and_Vessels.seg.nrrd", other)
    (case,) = duke.index(raw)
    assert "pre-1" in case.paths["image"] and case.subject == patient
    grid = (
        "data.preprocess.in_plane_size=null",
        "data.preprocess.min_size=null",
        "data.image_size=[16,24,24]",
    )
    options = (f"data.raw={raw}", f"data.root={tmp_path / 'out'}", "data.num_workers=0", *grid)
    prepare.task(compose_config("prepare", "data=duke", *options))
    (record,) = read_images(tmp_path / "out")
    counts = np.bincount(record.mask.ravel())
    assert counts[2] == 3 * 4 * 5 and counts[1] == 13 * 17 * 12 - counts[2]
    assert load_index(tmp_path / "out")["cases"][0]["original_shape"] == list(SHAPE)


def write_text_nrrd(path, array, encoding, *, space="left-posterior-superior", origin=(0, 0, 0), extra=""):
    """`array` (X, Y, Z) of big-endian 16-bit numbers with a header of axis-aligned voxels of 1 mm."""
    import bz2

    head = (
        f"NRRD0004\ntype: short\ndimension: 3\n{f'space: {space}' if space else '# nowhere'}\n"
        f"sizes: {' '.join(map(str, array.shape))}\nspace directions: (1,0,0) (0,1,0) (0,0,1)\n"
        f"endian: big\nencoding: {encoding}\nspace origin: ({','.join(map(str, origin))})\n{extra}\n"
    )
    data = array.astype(">i2").tobytes(order="F")
    if encoding in ("ascii", "text"):
        data = " ".join(map(str, array.ravel(order="F"))).encode()
    packed = {"gzip": gzip.compress, "bzip2": bz2.compress, "bz2": bz2.compress}.get(encoding, bytes)(data)
    path.write_bytes(head.encode() + (data.hex().encode() if encoding == "hex" else packed))


@pytest.mark.parametrize("encoding", ["raw", "gzip", "bzip2", "bz2", "ascii", "text"])
def test_every_encoding_of_nrrd_gives_the_same_numbers(tmp_path, encoding):
    array = np.arange(-60, 60, dtype=np.int16).reshape(4, 5, 6)
    write_text_nrrd(tmp_path / "a.nrrd", array, encoding)
    np.testing.assert_array_equal(read_nrrd(tmp_path / "a.nrrd")[0], array)


def test_an_nrrd_header_leads_to_its_data_and_over_what_stands_before_it(tmp_path):
    array = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    write_text_nrrd(tmp_path / "a.nhdr", array, "raw", extra="line skip: 1\nbyte skip: 3\ndata file: a.raw\n")
    (tmp_path / "a.raw").write_bytes(b"a line\nabc" + array.astype(">i2").tobytes(order="F"))
    np.testing.assert_array_equal(read_image(tmp_path / "a.nhdr").array, array)
    assert files_of(tmp_path / "a.nhdr") == [tmp_path / "a.nhdr", tmp_path / "a.raw"]


@pytest.mark.parametrize(
    "space", ["LAS", "RAS", "LPS", "left-anterior-superior", "right-anterior-superior", ""]
)
def test_every_space_of_the_body_leads_to_one_place(tmp_path, space, caplog):
    """RAS (1, 2, 3) is (-1, 2, 3) in LAS and (-1, -2, 3) in LPS, which is also what a silent header means."""
    signs = {"l": -1, "r": 1}, {"p": -1, "a": 1}
    words = (space or "LPS").lower().split("-")
    first, second = (words[0][0], words[1][0]) if len(words) > 1 else words[0][:2]
    sign = np.array([signs[0][first], signs[1][second], 1])
    write_text_nrrd(tmp_path / "a.nrrd", np.ones((4, 5, 6)), "gzip", space=space, origin=sign * (1, 2, 3))
    affine = read_nrrd(tmp_path / "a.nrrd")[1]
    np.testing.assert_array_equal(affine[:3, 3], (1, 2, 3))
    np.testing.assert_array_equal(affine[:3, :3], np.diag(sign))
    assert ("names no space" in caplog.text) == (space == "")


def vector_nrrd(path):
    import nrrd

    directions = [[np.nan] * 3, [1, 0, 0], [0, 1, 0], [0, 0, 1]]
    facts = {"kinds": ["vector", "domain", "domain", "domain"], "space": "left-posterior-superior"}
    nrrd.write(str(path), np.ones((3, 4, 5, 6)), {**facts, "space directions": directions})


def two_layers_without_a_choice(path):
    named = "Segment0_Name:=a\nSegment0_Layer:=0\nSegment1_Name:=b\nSegment1_Layer:=1\n"
    write_nrrd(path, np.ones((2, *SHAPE)), extra=named, layers=True)


CENTIMETRES = 'space units: "cm" "cm" "cm"\n'


@pytest.mark.parametrize(
    "options, message",
    [
        ({"encoding": "hex"}, "hex.*save it with encoding gzip"),
        ({"space": "scanner-xyz"}, "does not say where left"),
        ({"extra": CENTIMETRES}, "save it in mm"),
        ({"encoding": "raw", "extra": "data file: b.raw\n"}, "b.raw"),
        (vector_nrrd, "3 values a voxel .*vector"),
        (two_layers_without_a_choice, "2 values a voxel .*label map"),
    ],
)
def test_an_nrrd_file_that_cannot_be_read_rightly_is_refused(tmp_path, options, message):
    if callable(options):
        options(tmp_path / "a.nrrd")
    else:
        write_text_nrrd(tmp_path / "a.nrrd", np.ones((4, 5, 6)), **{"encoding": "gzip"} | options)
    with pytest.raises(InputError, match=f"a.nrrd: .*{message}"):
        read_image(tmp_path / "a.nrrd")


def test_a_segment_that_is_not_there_is_not_replaced_by_another(tmp_path, caplog):
    named = "Segment0_Name:={}\nSegment1_Name:={}\nSegment1_LabelValue:=2\n"
    array = np.arange(np.prod(SHAPE)).reshape(SHAPE) % 3
    write_nrrd(tmp_path / "a.seg.nrrd", array, extra=named.format("breast", "dense"))
    with pytest.raises(InputError, match="no segment 'vessel', but breast, dense"):
        read_image(f"{tmp_path / 'a.seg.nrrd'}::vessel")
    write_nrrd(tmp_path / "b.seg.nrrd", array, extra=named.format("Segment_1", "Segment_2"))
    np.testing.assert_array_equal(read_image(f"{tmp_path / 'b.seg.nrrd'}::vessel").array, array == 1)
    assert "names no segments; its label 1 is taken for 'vessel'" in caplog.text


@pytest.mark.parametrize("suffix", ["mha", "mhd"])
def test_meta_image_is_read_in_its_place(tmp_path, suffix):
    sitk = pytest.importorskip("SimpleITK")
    array = np.arange(120, dtype=np.int16).reshape(4, 5, 6)
    image = sitk.GetImageFromArray(array.transpose(2, 1, 0))
    image.SetSpacing((1.5, 2, 3))
    image.SetOrigin((10, 20, 30))
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    sitk.WriteImage(image, str(tmp_path / f"a.{suffix}"))
    read = read_image(tmp_path / f"a.{suffix}")
    np.testing.assert_array_equal(read.array, array)
    np.testing.assert_allclose(read.spacing, (1.5, 2, 3))
    np.testing.assert_allclose(
        read.affine, [[0, -2, 0, -10], [-1.5, 0, 0, -20], [0, 0, -3, 30], [0, 0, 0, 1]], atol=1e-9
    )
    assert len(files_of(tmp_path / f"a.{suffix}")) == (2 if suffix == "mhd" else 1)


def test_what_is_an_image_is_told_by_its_name_or_its_content(volume, tmp_path):
    write_dicom(tmp_path / "series", volume)
    write_dicom(tmp_path / "1.2.840.7", volume)
    for path in (tmp_path / "1.2.840.7").iterdir():  # as a PACS exports them
        path.rename(path.with_suffix(""))
    (tmp_path / "nothing").mkdir()
    for name in ("a.nrrd", "b.MHA", "c.nii.gz", "._c.nii.gz", "notes.txt"):
        (tmp_path / name).touch()
    found = sorted(path.name for path in tmp_path.iterdir() if is_image(path))
    assert found == ["1.2.840.7", "a.nrrd", "b.MHA", "c.nii.gz", "series"]
    np.testing.assert_array_equal(
        read_image(tmp_path / "1.2.840.7").array, read_image(tmp_path / "series").array
    )


def change_dicom(folder, change):
    pydicom = pytest.importorskip("pydicom")
    for k, path in enumerate(
        sorted(folder.iterdir(), key=lambda p: pydicom.dcmread(p).ImagePositionPatient[2])
    ):
        data = pydicom.dcmread(path)
        change(k, data)
        data.save_as(path)


def move(k, data):
    data.ImagePositionPatient[2] = ORIGIN[2] + k // 2 * SPACING[2]


def tilt(k, data):
    data.ImagePositionPatient[1] += 0.2 * k


def series(k, data):
    data.SeriesInstanceUID = f"1.2.{k % 2}"


def turn(k, data):
    data.ImageOrientationPatient = [0, 1, 0, 1, 0, 0] if k == 3 else data.ImageOrientationPatient


def colours(k, data):
    data.PhotometricInterpretation, data.SamplesPerPixel = "RGB", 3


def ct_as_monochrome1(k, data):
    data.PhotometricInterpretation, data.Modality = "MONOCHROME1", "CT"


@pytest.mark.parametrize(
    "change, message",
    [
        (move, "two slices lie at the same position"),
        (tilt, "gantry tilt.*dcm2niix"),
        (series, "several series"),
        (turn, "differ in ImageOrientationPatient"),
        (colours, "RGB pictures"),
        (ct_as_monochrome1, "CT as MONOCHROME1"),
    ],
)
def test_a_dicom_folder_that_is_no_one_volume_is_refused(volume, tmp_path, change, message):
    write_dicom(tmp_path / "series", volume)
    change_dicom(tmp_path / "series", change)
    with pytest.raises(InputError, match=f"series: .*{message}"):
        read_image(tmp_path / "series")


def test_a_missing_slice_is_seen_however_thin_slices_are(volume, tmp_path):
    write_dicom(tmp_path / "series", volume, leave_out=(7,))
    change_dicom(tmp_path / "series", lambda k, data: setattr(
        data, "ImagePositionPatient", [0, 0, 0.02 * (k + (k > 6))]
    ))  # fmt: skip
    with pytest.raises(InputError, match="not evenly spaced, 0.02 to 0.04 mm"):
        read_image(tmp_path / "series")


def test_monochrome1_is_turned_and_every_slice_has_its_own_slope(volume, tmp_path):
    write_dicom(tmp_path / "series", volume)

    def change(k, data):
        data.PhotometricInterpretation, data.RescaleSlope, data.RescaleIntercept = "MONOCHROME1", k + 1, 0

    change_dicom(tmp_path / "series", change)
    expected = (-1 - volume.astype(np.float32)) * np.arange(1, volume.shape[2] + 1)
    np.testing.assert_array_equal(read_image(tmp_path / "series").array, expected)


def write_radiograph(path, stored, **changes):
    """A computed radiograph of 12 stored bits: no place in a volume, 0.15 mm a pixel at the detector."""
    pydicom = pytest.importorskip("pydicom")
    from pydicom.uid import ExplicitVRLittleEndian, generate_uid

    meta = pydicom.dataset.FileMetaDataset()
    meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
    meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = generate_uid(), ExplicitVRLittleEndian
    data = pydicom.dataset.FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID, data.SOPInstanceUID = meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID
    data.SeriesInstanceUID, data.Modality = generate_uid(), "CR"
    data.Rows, data.Columns = stored.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    data.ImagerPixelSpacing = [0.15, 0.2]
    for name, value in changes.items():
        setattr(data, name, value)
    data.PixelData = stored.astype(np.uint16).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    data.save_as(path, enforce_file_format=True)


STORED = np.random.default_rng(3).integers(0, 4096, (20, 24))


def modality_lut(values, bits):
    from pydicom.dataset import Dataset

    item = Dataset()
    item.LUTDescriptor, item.ModalityLUTType, item.LUTData = (
        [len(values), 0, bits],
        "US",
        values.astype(np.uint16).tobytes(),
    )
    return [item]


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, STORED),
        ({"RescaleSlope": 2, "RescaleIntercept": -7}, 2 * STORED - 7),
        ({"PhotometricInterpretation": "MONOCHROME1"}, 4095 - STORED),
        ({"ModalityLUTSequence": "squares"}, STORED**2 // 4096),
        ({"ModalityLUTSequence": "squares", "PhotometricInterpretation": "MONOCHROME1"},
         4095 - STORED**2 // 4096),
    ],
)  # fmt: skip
def test_a_radiograph_is_a_picture_in_the_values_it_means(tmp_path, changes, expected):
    if "ModalityLUTSequence" in changes:
        pytest.importorskip("pydicom")
        changes = changes | {"ModalityLUTSequence": modality_lut(np.arange(4096) ** 2 // 4096, 12)}
    write_radiograph(tmp_path / "a.dcm", STORED, **changes)
    image = read_image(tmp_path / "a.dcm")
    np.testing.assert_array_equal(image.array, expected)
    assert image.affine is None and image.spacing == (0.15, 0.2)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"PhotometricInterpretation": "RGB", "SamplesPerPixel": 3},
            "a.dcm: RGB pictures, which are not grey",
        ),
        ({"NumberOfFrames": 2}, "a.dcm: several frames"),
        ({"PixelData": b"", "Rows": 999}, "a.dcm: not a readable DICOM picture"),
    ],
)
def test_a_radiograph_that_is_no_one_picture_is_refused(tmp_path, changes, message):
    write_radiograph(tmp_path / "a.dcm", STORED, **changes)
    with pytest.raises(InputError, match=message):
        read_image(tmp_path / "a.dcm")


def test_radiographs_are_an_image_each_and_series_one_volume(volume, tmp_path):
    for name in ("p1", "p2"):
        write_radiograph(tmp_path / "images" / f"{name}.dcm", STORED, PhotometricInterpretation="MONOCHROME1")
    write_dicom(tmp_path / "images" / "series", volume)
    cases = folder.index(tmp_path)
    assert [case.id for case in cases] == ["p1", "p2", "series"]
    with pytest.raises(InputError, match="000.dcm: one slice of a volume; name the folder of its series"):
        read_image(tmp_path / "images" / "series" / "000.dcm")


def test_class_folders_of_radiographs_are_prepared_once_turned(tmp_path):
    """MONOCHROME1 is turned by the reader; no rule of the recipe turns it again."""
    ramp = np.broadcast_to(np.arange(24) * 150, (20, 24))
    for label in ("normal", "pneumonia"):
        for i in range(2):
            write_radiograph(
                tmp_path / "raw" / label / f"{i}.dcm", ramp, PhotometricInterpretation="MONOCHROME1"
            )
    options = (f"data.raw={tmp_path / 'raw'}", f"data.root={tmp_path / 'out'}", "data.num_workers=0")
    prepare.task(
        compose_config(
            "prepare", "data=class_folders", "data.image_size=16", "data.preprocess.invert=auto", *options
        )
    )
    index = load_index(tmp_path / "out")
    assert index["label_values"] == ["normal", "pneumonia"] and len(index["cases"]) == 4
    assert index["inventory"]["files_used"] == 4 and index["inventory"]["left_out"] == []
    record = next(read_images(tmp_path / "out"))
    assert record.image[0, 8, 0] > 0 > record.image[0, 8, -1]
    np.testing.assert_allclose(record.attributes["spacing"], (0.15 * 20 / 16, 0.2 * 24 / 16), rtol=1e-6)


def test_nih_radiographs_in_dicom_are_prepared_like_the_pictures_of_their_names(tmp_path):
    ramp = np.broadcast_to(np.arange(24) * 150, (20, 24))
    images = tmp_path / "raw" / "images_001" / "images"
    for name in ("00000001_000", "00000001_001"):
        write_radiograph(images / f"{name}.dcm", ramp, PhotometricInterpretation="MONOCHROME1")
    cv2.imwrite(str(images / "00000002_000.png"), np.ascontiguousarray(ramp[:, ::-1] / 14).astype(np.uint8))
    rows = ["Image Index,Finding Labels,Patient ID,View Position"]
    rows += ["00000001_000.png,Mass,1,PA", "00000001_001.png,No Finding,1,AP", "00000002_000.png,Mass,2,PA"]
    (tmp_path / "raw" / "Data_Entry_2017.csv").write_text("\n".join(rows))
    paths = (f"data.raw={tmp_path / 'raw'}", f"data.root={tmp_path / 'out'}", "data.num_workers=0")
    prepare.task(compose_config("prepare", "data=nih_cxr14", "data.image_size=16", *paths))
    index = load_index(tmp_path / "out")
    assert [case["subject"] for case in index["cases"]] == ["00000001", "00000002"]
    assert index["cases"][0]["slices"]["label"] == [0, 1] and index["inventory"]["files_used"] == 3
    values = np.concatenate([record.image for record in read_images(tmp_path / "out")])
    assert (values[:, 8, 1] > 0).all() and (values[:, 8, -2] < 0).all()
    cv2.imwrite(str(images / "00000001_000.png"), np.zeros((20, 24), np.uint8))
    with pytest.raises(InputError, match=r"00000001_000\.png: .*\.dcm is the same picture in another format"):
        nih_cxr14.index(tmp_path / "raw")
