"""DICOM series and NRRD maps, as Duke Breast is published."""

import gzip

import numpy as np
import pytest

from medldm.commands import prepare
from medldm.data.datasets import duke
from medldm.data.formats import read_nrrd
from medldm.data.readers import load_index, read_image, read_images
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
