"""Files are known by content, not by name, size or place."""

import os
import shutil

import numpy as np
import pytest

from medldm import fingerprints
from medldm.data.raw.readers import files_of
from medldm.fingerprints import array_digest, content_of, recall


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    monkeypatch.setattr(fingerprints, "KNOWN", {})


def test_a_change_in_place_with_the_same_size_and_time_is_seen(tmp_path):
    path = tmp_path / "p0.png"
    path.write_bytes(b"one")
    os.utime(path, (1, 1))
    before = content_of(path)
    path.write_bytes(b"two")
    os.utime(path, (1, 1))
    fingerprints.KNOWN.clear()
    recall([before])
    after = content_of(path)
    assert (after["size"], after["mtime_ns"]) == (before["size"], before["mtime_ns"])
    assert after["sha256"] != before["sha256"]


def test_an_unchanged_file_is_read_once_and_a_young_one_again(tmp_path, monkeypatch):
    path = tmp_path / "p0.png"
    path.write_bytes(b"one")
    young = content_of(path)
    settled = young | {"read_ns": young["ctime_ns"] + 2 * fingerprints.SETTLED_NS}
    reads = []
    monkeypatch.setattr(fingerprints, "file_sha256", lambda p: reads.append(p) or young["sha256"])
    for record, count in ((settled, 0), (young, 1), ({"path": str(path), "size": 3, "mtime_ns": 0}, 2)):
        fingerprints.KNOWN.clear()
        recall([record])
        content_of(path)
        assert len(reads) == count


@pytest.mark.parametrize("names", [("a.dcm", "b.dcm"), ("scan.nhdr", "scan.raw"), ("scan.mhd", "scan.raw")])
def test_an_image_of_several_files_is_known_by_all_of_them(tmp_path, names):
    def content(folder):
        path = folder if names[0] == "a.dcm" else folder / names[0]
        return content_of(path, files_of(path))["sha256"]

    series = tmp_path / "series"
    series.mkdir()
    header = "data file: scan.raw\nElementDataFile = scan.raw\n"
    for name in names:
        (series / name).write_text(header)
    moved = shutil.copytree(series, tmp_path / "elsewhere")
    assert content(series) == content(moved)
    (moved / names[1]).write_bytes(b"other voxels")
    assert content(series) != content(moved)


def test_arrays_differ_by_value_shape_and_type():
    x = np.arange(6, dtype=np.float16)
    others = (x + 1, x.reshape(2, 3), x.astype(np.float32))
    assert len({array_digest(a) for a in (x, *others)}) == 4
    assert array_digest(x) == array_digest(np.asfortranarray(x.reshape(2, 3)).reshape(-1))
    assert array_digest(x.reshape(2, 3)) == array_digest(np.asfortranarray(x.reshape(2, 3)))
    assert array_digest(np.zeros((0, 3))) != array_digest(np.zeros(0))
