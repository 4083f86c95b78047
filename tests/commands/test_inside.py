"""Nothing leaves its folder: names from an index or a manifest, and links that lie in the way."""

import json
import shutil
from pathlib import Path

import pytest

from medldm.commands import encode, evaluate, export, prepare, sample, train
from medldm.errors import InputError
from medldm.files import inside, leads_out
from medldm.schemas import Provenance, read_checked
from tests.helpers import compose_config
from tests.training import VQVAE, train_config

OUTSIDE = ("../evil", "/tmp/evil", "a/../../evil", "..", "", "a\0b", "..\\evil")


@pytest.mark.parametrize("name", OUTSIDE)
def test_no_name_leads_out_of_its_folder(name, tmp_path):
    assert leads_out(name)
    with pytest.raises(InputError, match="leads out of"):
        inside(tmp_path, name)
    with pytest.raises(InputError, match="leads out of"):
        inside(tmp_path, "png", name)


def test_names_below_a_folder_are_its_paths_also_through_a_link_to_it(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    for name in ("a.h5", "png/a.png", "..a", "a..b/c", "a:b"):
        assert inside(tmp_path / "link", name) == tmp_path / "link" / name


def hostile(prepared, root, **changes):
    """A prepared folder whose first case has other entries in its index."""
    shutil.copytree(prepared, root)
    index = json.loads((root / "index.json").read_text())
    index["cases"][0] |= changes
    (root / "index.json").write_text(json.dumps(index))
    return root


def tasks(root, output, first_stage):
    """Every command that reads a prepared folder."""
    data, out = f"data.root={root}", f"output={output}"
    checkpoint = f"checkpoint={first_stage}"
    return {
        "encode": lambda: encode.task(compose_config("encode", checkpoint, data)),
        "sample": lambda: sample.task(compose_config("sample", checkpoint, data, out, "split=all")),
        "export": lambda: export.task(compose_config("export", f"root={root}", out)),
        "evaluate": lambda: evaluate.task(
            compose_config("evaluate", f"generated={root}", f"reference={root}", out)
        ),
        "train": lambda: train.task(train_config(root, output, VQVAE)),
    }


ID, FILE = {"id": "../../evil"}, {"file": "../../evil.h5"}


@pytest.mark.parametrize(
    ("command", "changes"),
    [
        ("encode", ID), ("sample", ID), ("evaluate", ID), ("train", ID), ("export", ID), ("export", FILE),
        ("export", {"id": "/evil"}), ("export", {"file": "/etc/passwd"}),
    ],
)  # fmt: skip
def test_a_hostile_index_is_refused_by_every_command(command, changes, prepared, first_stage, tmp_path):
    root = hostile(prepared, tmp_path / "data", **changes)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=r"index\.json: cases\.0\.(id|file): .*(name of a file|leads out)"):
        tasks(root, tmp_path / "out", first_stage)[command]()
    assert sorted(tmp_path.rglob("*")) == before


def linked(folder: Path, elsewhere: Path) -> None:
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / "keep.png").write_bytes(b"keep")
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.symlink_to(elsewhere)


@pytest.mark.parametrize(
    ("command", "link"),
    [("encode", "data/latents"), ("sample", "out/png"), ("export", "out/images"), ("prepare", "again/cases")],
)
def test_a_link_that_leads_out_is_not_written_through(
    command, link, prepared, phantom_raw, first_stage, tmp_path
):
    elsewhere = tmp_path / "elsewhere"
    if link.startswith("data"):
        shutil.copytree(prepared, tmp_path / "data")
    linked(tmp_path / link, elsewhere)
    root = tmp_path / "data" if link.startswith("data") else prepared
    paths = (f"data.raw={phantom_raw}", f"data.root={tmp_path / 'again'}", "data.num_workers=0")
    run = tasks(root, tmp_path / "out", first_stage) | {
        "prepare": lambda: prepare.task(compose_config("prepare", *paths))
    }
    with pytest.raises(InputError, match="is a link that leads out of"):
        run[command]()
    assert [path.name for path in elsewhere.iterdir()] == ["keep.png"]


def test_pictures_of_an_evaluation_are_not_deleted_through_a_link(tmp_path):
    from medldm.evaluation.run import write_panels

    linked(tmp_path / "out/panels", tmp_path / "elsewhere")
    with pytest.raises(InputError, match="is a link that leads out of"):
        write_panels(tmp_path / "out", None, None, 1)
    assert (tmp_path / "elsewhere/keep.png").exists()


def test_a_subject_of_a_manifest_stays_in_its_folder(tmp_path):
    import cv2
    import numpy as np

    (tmp_path / "raw/images").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 255, (16, 16))
    for name in ("a", "b", "c"):
        cv2.imwrite(str(tmp_path / f"raw/images/{name}.png"), noise)
    rows = ("images/a.png,../../evil", f"images/b.png,{tmp_path}/evil", "images/c.png,..")
    (tmp_path / "raw/manifest.csv").write_text("image,subject\n" + "\n".join(rows))
    paths = (f"data.raw={tmp_path / 'raw'}", f"data.root={tmp_path / 'deep/data'}", "data.num_workers=0")
    prepare.task(compose_config("prepare", "data=folder", *paths, "data.image_size=16"))
    written = {path for path in tmp_path.rglob("*.h5")}
    assert len(written) == 3 and all(path.parent == tmp_path / "deep/data/cases" for path in written)


def test_an_earlier_provenance_of_translations_that_is_none_is_told(tmp_path):
    (tmp_path / "provenance.json").write_text(json.dumps({"images": ["../evil"]}))
    with pytest.raises(InputError, match=r"provenance\.json: images: Input should be a valid dictionary"):
        read_checked(tmp_path / "provenance.json", Provenance, "delete it")
