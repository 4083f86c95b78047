"""Raw files and prepared folders from strangers: what they claim is believed within a bound, what they link
to is not opened, and damage is seen.
"""

import bz2
import gzip
import shutil
import struct
import tracemalloc
import zipfile
import zlib
from contextlib import suppress
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest
from PIL import Image as Picture

from medldm.bounds import VARIABLE
from medldm.checkpoints import read_checkpoint
from medldm.commands import prepare
from medldm.data.hdf5 import HDF5Reader
from medldm.data.loading.dataset import CaseDataset, case_items
from medldm.data.prepared import load_index
from medldm.data.raw.readers import read_image
from medldm.data.raw.tables import read_rows
from medldm.data.records import read_images
from medldm.errors import InputError
from medldm.files import read_json
from medldm.training.configs import read_config
from tests.helpers import compose_config

MIB = 2**20
VOXELS = np.random.default_rng(0).normal(size=(12, 13, 14)).astype(np.float32)


def nifti(shape=(8, 8, 8), data=b""):
    header = nibabel.Nifti1Header()
    header.set_data_dtype(np.float32)
    header.set_data_shape((8, 8, 8))
    raw = bytearray(header.binaryblock) + bytes(4) + data
    struct.pack_into("<8h", raw, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    return bytes(raw)


def nrrd(sizes, data, encoding="gzip", kind="float", more=""):
    lines = (
        f"NRRD0004\ntype: {kind}\ndimension: 3\nspace: left-posterior-superior\nsizes: {sizes}\n"
        f"space directions: (1,0,0) (0,1,0) (0,0,1)\nendian: little\nencoding: {encoding}\n{more}\n"
    )
    return lines.encode() + data


def npy(shape, data=b"", dtype="<f4"):
    head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head) + 1) + head + b"\n" + data


def png(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = chunk(b"IDAT", zlib.compress(bytes(MIB)))
    return b"\x89PNG\r\n\x1a\n" + head + rows + chunk(b"IEND", b"")


ZEROS = gzip.compress(bytes(64 * MIB), 9)
CLAIMS = {  # what is said, and which part of the line tells that it was noticed
    "more_than_the_file.nii": (nifti((30000, 30000, 30000)), "more than the file can hold"),
    "more_than_the_file.nii.gz": (gzip.compress(nifti((30000, 30000, 30000))), "more than the file can hold"),
    "beyond_the_bound.nii.gz": (gzip.compress(nifti((256, 256, 256)) + bytes(64 * MIB)), "the bound is"),
    "bomb_behind_the_voxels.nii.gz": (gzip.compress(nifti() + bytes(2048)) + ZEROS, "without end"),
    "claim.npy": (npy((10**6, 10**6)), "more than the file can hold"),
    "negative.npy": (npy((-1, 10)), "which is no size"),
    "objects.npy": (npy((10,), bytes(80), "|O"), "not a complete NumPy array"),
    "claim.nrrd": (nrrd("30000 30000 30000", bytes(64), "raw"), "more than the file can hold"),
    "bomb.nrrd": (nrrd("8 8 8", ZEROS), "unpacks to more"),
    "bomb_bzip2.nrrd": (nrrd("8 8 8", bz2.compress(bytes(64 * MIB)), "bzip2"), "unpacks to more"),
    "lines.nrrd": (nrrd("8 8 8", bytes(2048), "raw", more="line skip: 999999999999\n"), "more lines"),
    "elsewhere.nhdr": (nrrd("8 8 8", b"", "raw", more="data file: ../secret.raw\n"), "outside of its folder"),
    "absolute.nhdr": (nrrd("8 8 8", b"", "raw", more="datafile: /etc/passwd\n"), "outside of its folder"),
    "claim.mha": (
        b"ObjectType = Image\nNDims = 3\nDimSize = 9000 9000 9000\nElementType = MET_FLOAT\n"
        b"ElementSpacing = 1 1 1\nElementDataFile = LOCAL\n" + bytes(64),
        "more than the file can hold",
    ),
    "claim.png": (png(30000, 30000), "the bound is"),
}  # fmt: skip


@pytest.mark.parametrize("name", CLAIMS)
def test_a_header_is_believed_within_the_bound_and_a_bomb_stops_at_it(name, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(16 / 1024))
    content, line = CLAIMS[name]
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=line) as caught:
            read_image(tmp_path / name)
        assert tracemalloc.get_traced_memory()[1] < 24 * MIB + 2 * len(content)
    finally:
        tracemalloc.stop()
    assert "\n" not in str(caught.value) and str(tmp_path / name) in str(caught.value)


def test_the_bound_is_a_share_of_free_memory_unless_it_is_given(monkeypatch):
    from medldm import bounds

    monkeypatch.setattr(bounds, "free_memory", lambda: 8 * bounds.GIBIBYTE)
    assert bounds.largest() == 4 * bounds.GIBIBYTE
    monkeypatch.setenv(VARIABLE, "1.5")
    assert bounds.largest() == 1.5 * bounds.GIBIBYTE
    monkeypatch.setenv(VARIABLE, "much")
    with pytest.raises(InputError, match=f"{VARIABLE}=much: give a number of GiB above 0"):
        bounds.largest()


# ---- HDF5 ----


def external_link(file, folder):
    with h5py.File(folder / "other.h5", "w") as other:
        other["image"] = VOXELS
    file["image"] = h5py.ExternalLink(str(folder / "other.h5"), "/image")


def soft_link_to_an_external_one(file, folder):
    external_link(file, folder)
    file.move("image", "away")
    file["image"] = h5py.SoftLink("/away")


def external_storage(file, folder):
    (folder / "secret.raw").write_bytes(bytes(64))
    file.create_dataset("image", (4, 4), "f4", external=[(str(folder / "secret.raw"), 0, 64)])


def virtual(file, folder):
    layout = h5py.VirtualLayout((4, 4), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "image", (4, 4))
    file.create_virtual_dataset("image", layout)


def texts(file, folder):
    file.create_dataset("image", data=["a", "b"], dtype=h5py.string_dtype(), chunks=(1,))


def ragged(file, folder):
    file.create_dataset("image", (3, 2), h5py.vlen_dtype(np.float32), chunks=(1, 2))


def claimed(file, folder):
    file.create_dataset("image", (2**20, 2**20), "f4", chunks=(1, 2**10))


def bomb(file, folder):
    dataset = file.create_dataset("image", (64, 64), "u1", chunks=(64, 64), compression="gzip")
    dataset.id.write_direct_chunk((0, 0), zlib.compress(bytes(64 * MIB), 9))


def circle(file, folder):
    file["image"], file["other"] = h5py.SoftLink("/other"), h5py.SoftLink("/image")


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (external_link, "a link into another file"),
        (soft_link_to_an_external_one, "a link into another file"),
        (external_storage, "its values lie in other files"),
        (virtual, "its values lie in other files"),
        (texts, "holds object, no numbers"),
        (ragged, "holds object, no numbers"),
        (claimed, "the bound is"),
        (bomb, "unpacks to more"),
        (circle, "lead in circles"),
    ],
)
def test_hdf5_leads_nowhere_else_and_holds_numbers_within_the_bound(make, line, tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(1 / 32))
    with h5py.File(tmp_path / "case.h5", "w") as file:
        make(file, tmp_path)
    with pytest.raises(InputError, match=line):
        HDF5Reader(tmp_path / "case.h5").read_row("image", 0)
    with pytest.raises(InputError, match=line):
        read_image(f"{tmp_path / 'case.h5'}::image")


def test_soft_links_within_a_file_are_followed(tmp_path):
    with h5py.File(tmp_path / "case.h5", "w") as file:
        file["deep/stored"] = VOXELS
        file["deep/link"] = h5py.SoftLink("stored")
        file["link"] = h5py.SoftLink("/deep/link")
    np.testing.assert_array_equal(read_image(f"{tmp_path / 'case.h5'}::link").array, VOXELS)


# ---- damage ----


def flipped(data, rng):
    place, bit = int(rng.integers(len(data))), int(rng.integers(8))
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def unnoticed(path, original, read, count, seed=0):
    """How many of `count` flipped bits were read as other values."""
    rng, expected, wrong = np.random.default_rng(seed), read(path), 0
    for i in range(count):
        other = path.with_name(f"{i}_{path.name}")
        other.write_bytes(flipped(original, rng))
        with suppress(InputError):
            wrong += not np.array_equal(read(other), expected)
        other.unlink()
    return wrong


def test_no_flipped_bit_of_a_compressed_volume_changes_a_voxel(tmp_path):
    path = tmp_path / "a.nii.gz"
    nibabel.save(nibabel.Nifti1Image(VOXELS, np.eye(4)), path)
    assert unnoticed(path, path.read_bytes(), lambda p: read_image(p).array, 500) == 0


def test_no_flipped_bit_of_a_prepared_case_changes_an_array(prepared, tmp_path):
    case = load_index(prepared)["cases"][0]
    path = Path(shutil.copy(prepared / case["file"], tmp_path))

    def read(file):
        reader = HDF5Reader(file)
        for key, digest in case["content"].items():
            reader.check_content(key, digest)
        arrays = [reader.read(key) for key in case["content"]]
        reader.close()
        return np.stack(arrays)

    assert len(case["content"]) == 3
    assert unnoticed(path, path.read_bytes(), read, 300) == 0


def test_a_dataset_and_a_folder_of_images_compare_the_digest_of_what_they_read(prepared, tmp_path):
    root = Path(shutil.copytree(prepared, tmp_path / "data"))
    index = load_index(root)
    path = root / index["cases"][0]["file"]
    with h5py.File(path, "r+") as file:
        file["images"][0, 0, 0] += 0.25
    dataset = CaseDataset(root, index, case_items(index, 0), keys=("image",))
    with pytest.raises(InputError, match="dataset 'image' is damaged: it differs from what index.json says"):
        dataset.read("image", dataset.items[0])
    with pytest.raises(InputError, match="dataset 'image' is damaged"):
        list(read_images(root))


def test_no_flipped_bit_of_a_checkpoint_changes_a_weight(first_stage, tmp_path):
    path = tmp_path / "a.ckpt"
    path.write_bytes(first_stage.read_bytes())
    with zipfile.ZipFile(path) as archive:
        largest = max(archive.infolist(), key=lambda entry: entry.file_size)
    content = bytearray(path.read_bytes())
    content[largest.header_offset + 4096] ^= 1  # within its values
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a readable checkpoint"):
        read_checkpoint(path)


def test_a_damaged_case_is_made_anew_by_prepare(prepared, phantom_raw, tmp_path, caplog):
    root = Path(shutil.copytree(prepared, tmp_path / "data"))
    index = load_index(root)
    with h5py.File(root / index["cases"][0]["file"], "r+") as file:
        file["images"][0, 0, 0] += 0.25
    paths = (f"data.raw={phantom_raw}", f"data.root={root}", "data.num_workers=0", "data.image_size=64")
    prepare.task(compose_config("prepare", *paths))
    assert "1 of 4 cases made anew" in caplog.text and "their files were damaged or replaced" in caplog.text
    assert [case["content"] for case in load_index(root)["cases"]] == [c["content"] for c in index["cases"]]


# ---- tables and texts ----


def test_a_quote_without_end_and_deep_json_are_told(tmp_path):
    (tmp_path / "manifest.csv").write_text('image,label\n"' + "x" * 200_000)
    with pytest.raises(InputError, match=r"manifest\.csv: line \d+ cannot be read"):
        read_rows(tmp_path / "manifest.csv", ["image"])
    (tmp_path / "index.json").write_text("[" * 200_000)
    with pytest.raises(InputError, match="nested too deeply"):
        read_json(tmp_path / "index.json", "prepare again")


def test_a_config_that_grows_by_references_to_itself_is_refused(tmp_path):
    text = "a: &a [1, 2]\n" + "".join(f"b{i}: &b{i} [*a, *a]\n" for i in range(40))
    for wrong, line in (
        (text, "holds YAML aliases"),
        ("a: [1", "not the config of a run"),
        ("- 1", "config"),
    ):
        with pytest.raises(InputError, match=line):
            read_config(wrong, tmp_path / "config.yaml")
    assert read_config("a:\n  b: ${c}", tmp_path / "config.yaml") == {"a": {"b": "${c}"}}


def test_what_a_library_says_of_a_damaged_picture_is_not_passed_on(tmp_path, capfd):
    Picture.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(tmp_path / "a.png")
    data = bytearray((tmp_path / "a.png").read_bytes())
    data[50] ^= 255
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(InputError, match="not a complete image"):
        read_image(tmp_path / "a.png")
    assert capfd.readouterr().err == ""
