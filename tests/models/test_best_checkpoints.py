"""The best k checkpoints: which stay, under which names, and what a restart makes of them."""

import math
from types import SimpleNamespace

import pytest

from medldm.callbacks import Checkpoints
from medldm.errors import InputError


class Run:
    """Validations of given values at steps 1, 2, ...; a checkpoint is the text of its step."""

    def __init__(self, folder, *, restored: dict | None = None, start: int = 0, **options) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.step = folder, start
        self.callback = Checkpoints(folder, **options)
        self.callback.save = self.save
        if restored is not None:
            self.callback.load_state_dict(restored)
            self.callback.on_train_start(SimpleNamespace(is_global_zero=True), None)

    def save(self, trainer, module, name: str) -> None:
        """As a checkpoint is written: a new file takes the old one's place."""
        (self.folder / name).unlink(missing_ok=True)
        (self.folder / name).write_text(str(self.step))

    def __call__(self, *values: float) -> "Run":
        for value in values:
            self.step += 1
            self.callback.keep(SimpleNamespace(global_step=self.step, is_global_zero=True), None, value)
        return self

    @property
    def files(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in sorted(self.folder.iterdir())}


def test_the_best_three_stay_and_best_is_the_first(tmp_path):
    run = Run(tmp_path / "a", keep_best=3)(0.5, 0.4, 0.7, 0.45, 0.3, 0.9)
    assert run.files == {
        "best.ckpt": "5",
        "step_0000002_0.4.ckpt": "2",
        "step_0000004_0.45.ckpt": "4",
        "step_0000005_0.3.ckpt": "5",
    }
    assert (tmp_path / "a/best.ckpt").samefile(tmp_path / "a/step_0000005_0.3.ckpt")
    assert Run(tmp_path / "b", keep_best=2, mode="max")(0.1, 0.3, 0.2).files.keys() == {
        "best.ckpt", "step_0000002_0.3.ckpt", "step_0000003_0.2.ckpt",
    }  # fmt: skip


def test_a_single_best_is_kept_as_before(tmp_path):
    run = Run(tmp_path / "run")(0.5, 0.4, 0.7)
    assert run.files == {"best.ckpt": "2"} and run.callback.state_dict() == {"best": 0.4}
    with pytest.raises(InputError, match="keep_best=0: give 1 or more"):
        Checkpoints(tmp_path, keep_best=0)


def test_a_restart_keeps_the_list_and_makes_later_files_again(tmp_path):
    values = (0.5, 0.4, 0.3, 0.2)
    whole = Run(tmp_path / "whole", keep_best=2)(*values, 0.35, 0.1)
    run = Run(tmp_path / "run", keep_best=2)(*values[:2])
    saved = run.callback.state_dict()
    run(*values[2:])  # after last.ckpt: a kill loses these from the list, not from the folder
    again = Run(tmp_path / "run", keep_best=2, restored=saved, start=2)
    assert sum(name.startswith("step_") for name in again.files) <= 2
    again(*values[2:], 0.35, 0.1)
    assert again.files == whole.files and again.callback.state_dict() == whole.callback.state_dict()


def test_a_value_that_is_no_number_is_never_the_best(tmp_path, caplog):
    assert Run(tmp_path / "run")(math.nan, 0.4).files == {"best.ckpt": "2"}
    assert "val/loss is not a number at step 1" in caplog.text
    assert "best.ckpt" in Run(tmp_path / "three", keep_best=3)(math.nan, 0.4, math.nan).files


def test_as_many_of_the_last_stay_and_those_beyond_a_restart_are_made_again(tmp_path):
    run = Run(tmp_path / "run", keep_last=2)
    for run.step in (10, 20, 30):
        run.callback.save_last(SimpleNamespace(global_step=run.step, is_global_zero=True), None)
    assert run.files == {"last.ckpt": "30", "last_0000020.ckpt": "20", "last_0000030.ckpt": "30"}
    run.callback.on_train_start(SimpleNamespace(global_step=20, is_global_zero=True), None)
    assert run.files.keys() == {"last.ckpt", "last_0000020.ckpt"}
    with pytest.raises(InputError, match="keep_last=0: give 1 or more"):
        Checkpoints(tmp_path, keep_last=0)
