"""Samples know their conditions and settings; what is made from them knows whether they are still those."""

import json
import shutil

import h5py
import pytest

from medldm.commands import export
from medldm.data.loading.datamodule import CaseDataModule
from medldm.errors import InputError
from tests.helpers import compose_config
from tests.provenance.conftest import draw, run_evaluate, run_prepare, run_sample
from tests.provenance.test_caches import renewed, without_fingerprints


def ldm(folder):
    return folder / "ldm" / "checkpoints" / "last.ckpt"


def begin(copied, *overrides):
    return run_sample(ldm(copied), copied / "data", copied / "out", "split=all", *overrides)


def test_a_begun_folder_is_continued_wherever_the_data_lie(copied):
    first = begin(copied, "limit=3")
    shutil.move(copied / "data", copied / "elsewhere")
    again = run_sample(ldm(copied), copied / "elsewhere", copied / "out", "split=all")
    assert (
        len(first) == 3 and len(again) == 5 and renewed(first, again) == sorted(again.keys() - first.keys())
    )


def test_samples_of_older_maps_are_made_anew_and_not_judged(copied, caplog):
    first = begin(copied)
    draw(copied / "raw", 0, turned=True, key="masks")
    run_prepare(copied / "raw", copied / "data")
    with pytest.raises(InputError, match=r"1 cases \(p0, ...\) were prepared otherwise .*medldm sample"):
        run_evaluate(copied / "out", copied / "data", copied / "evaluation")
    elsewhere = shutil.copytree(copied / "data", copied / "elsewhere")
    results = run_evaluate(copied / "out", elsewhere, copied / "evaluation")
    assert any("prepared otherwise" in line for line in results["warnings"])
    with pytest.raises(InputError, match=r"p0\.h5: made under another map"):
        CaseDataModule(
            copied / "data",
            batch_size=1,
            keys=("image", "mask"),
            train_on="synthetic",
            synthetic=copied / "out",
        ).items("train")
    assert renewed(first, begin(copied)) == ["p0"]
    assert "1 of 5 cases made anew, of cases as prepared before" in caplog.text
    results = run_evaluate(copied / "out", copied / "data", copied / "evaluation")
    assert not any("prepared otherwise" in line for line in results["warnings"])


def test_files_of_two_runs_in_one_folder_are_not_judged(copied):
    begin(copied, "limit=2")
    with h5py.File(copied / "out/p1.h5", "a") as file:
        file.attrs["settings_digest"] = "another run"
    with pytest.raises(InputError, match=r"p1\.h5: sampled with other settings than p0\.h5"):
        run_evaluate(copied / "out", copied / "data", copied / "evaluation")


@pytest.mark.parametrize("other", ["drop=[mask]", "sampler.num_steps=1"])
def test_other_settings_are_refused_or_made_anew(copied, other):
    first = begin(copied, "limit=1")
    with pytest.raises(InputError, match=f"holds images of another {other.split('=')[0].split('.')[0]}"):
        begin(copied, "limit=1", other)
    (copied / "out/provenance.json").unlink()
    assert renewed(first, begin(copied, "limit=1", other)) == ["p0"]


def test_another_split_of_the_same_name_is_refused(copied):
    run_sample(ldm(copied), copied / "data", copied / "out", "split=train")
    splits = json.loads((copied / "data/splits.json").read_text())["default"]
    splits = {"default": splits | {"train": splits["train"][1:], "val": splits["val"] + splits["train"][:1]}}
    (copied / "data/splits.json").write_text(json.dumps(splits))
    with pytest.raises(InputError, match="another set of cases"):
        run_sample(ldm(copied), copied / "data", copied / "out", "split=train")


def test_samples_of_an_older_medldm_are_made_anew(copied, caplog):
    first = begin(copied, "limit=2")
    with h5py.File(copied / "out/p0.h5", "a") as file:
        del file.attrs["made_from"], file.attrs["settings_digest"]
    again = begin(copied, "limit=2")
    assert renewed(first, again) == ["p0"] and "of unknown conditions" in caplog.text
    without_fingerprints(copied / "data")
    assert begin(copied, "limit=2") == again and "kept by the cases' names" in caplog.text


def test_exported_slices_follow_their_cases(copied, caplog):
    def run():
        export.task(compose_config("export", f"root={copied / 'data'}", f"output={copied / 'png'}"))
        return {path.stem: path.stat().st_mtime_ns for path in (copied / "png/images").rglob("*.png")}

    first = run()
    assert run() == first
    draw(copied / "raw", 4, turned=True)
    run_prepare(copied / "raw", copied / "data")
    assert renewed(first, run()) == ["p4_000"] and "1 of 5 cases changed" in caplog.text
