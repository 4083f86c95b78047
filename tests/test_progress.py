"""How long work is shown where there is no terminal: lines of the log, once a minute."""

import logging

import pytest
from pytorch_lightning import Trainer
from pytorch_lightning.demos.boring_classes import BoringModel

from medldm import progress as shown
from medldm.callbacks import ProgressBar, ProgressLines
from medldm.commands import train
from medldm.training import trainer as training
from tests.training import VQVAE, run_training


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_line_says_how_long_the_rest_takes_at_the_rate_so_far():
    clock = Clock()
    lines = shown.Pace("evaluating", 100, clock=clock)
    clock.now = 59.0
    assert not lines.due()
    clock.now = 60.0
    assert lines.due()
    assert lines.line(20) == "evaluating: 20 of 100, 0:04:00 left"
    assert not lines.due()
    clock.now = 120.0
    assert lines.due()
    assert lines.line(100) == "evaluating: 100 of 100"


def test_what_a_resumed_run_did_before_does_not_count_as_speed():
    clock = Clock()
    lines = shown.Pace("update", 1000, clock=clock)
    lines.begin(500)
    clock.now = 100.0
    assert lines.line(600, ", loss 0.5") == "update: 600 of 1000, loss 0.5, 0:06:40 left"
    assert shown.Pace("update", None, clock=clock).line(600) == "update: 600"  # no end is known


def test_outside_a_terminal_work_is_counted_in_the_log(monkeypatch, caplog):
    monkeypatch.setattr(shown, "has_bars", lambda: False)
    monkeypatch.setattr(shown, "INTERVAL", 0.0)
    with caplog.at_level(logging.INFO):
        assert list(shown.tracked("abc", "reading")) == ["a", "b", "c"]
    said = [record.message.split(",")[0] for record in caplog.records]
    assert said == ["reading: 1 of 3", "reading: 2 of 3", "reading: 3 of 3"]
    caplog.clear()
    monkeypatch.setattr(shown, "INTERVAL", 60.0)
    with caplog.at_level(logging.INFO):
        list(shown.tracked("abc", "reading"))
    assert not caplog.records  # short work needs no line


def test_on_a_terminal_it_is_a_bar(monkeypatch, capsys, caplog):
    monkeypatch.setattr(shown, "has_bars", lambda: True)
    monkeypatch.setattr(shown, "INTERVAL", 0.0)
    with caplog.at_level(logging.INFO), shown.progress("reading", 3) as advance:
        advance(2)
        advance(1)
    assert "reading" in capsys.readouterr().out
    assert not caplog.records


class Loud(BoringModel):
    def training_step(self, batch, batch_idx):
        self.log("loss", 0.5, prog_bar=True)
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize(("interval", "num_lines"), [(0.0, 4), (60.0, 0)])
def test_a_training_without_a_terminal_says_update_loss_and_time(monkeypatch, caplog, interval, num_lines):
    monkeypatch.setattr(shown, "INTERVAL", interval)
    trainer = Trainer(
        accelerator="cpu", max_steps=8, limit_val_batches=0, logger=False, log_every_n_steps=2,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False,
        callbacks=[ProgressLines()],
    )  # fmt: skip
    with caplog.at_level(logging.INFO, logger="medldm"):
        trainer.fit(Loud())
    said = [record.message for record in caplog.records if record.name == "medldm.callbacks.progress"]
    assert len(said) == num_lines
    for line, update in zip(said, (2, 4, 6, 8), strict=False):
        assert line.startswith(f"update: {update} of 8, epoch 0, loss 0.5")


@pytest.mark.parametrize("is_terminal", [False, True])
def test_a_training_has_one_way_of_showing_how_far_it_is(prepared, tmp_path, monkeypatch, is_terminal):
    made = []
    monkeypatch.setattr(train, "fit", lambda trainer, *others: made.append(trainer))
    monkeypatch.setattr(training, "has_bars", lambda: is_terminal)
    run_training(prepared, tmp_path / "run", VQVAE, "trainer.enable_progress_bar=true")
    bar = made[0].progress_bar_callback
    assert (type(bar) is ProgressBar) if is_terminal else bar is None
    assert any(isinstance(callback, ProgressLines) for callback in made[0].callbacks) != is_terminal
