"""metrics.csv grows row by row and survives a kill."""

import csv

from medldm.callbacks import MetricsFile


def read(path):
    with open(path, newline="") as file:
        return {int(row.pop("step")): {k: v for k, v in row.items() if v} for row in csv.DictReader(file)}


def log(logger, step, **values):
    logger.log_metrics(values, step)
    logger.save()


def test_rows_are_appended_completed_and_given_new_columns(tmp_path):
    path = tmp_path / "metrics.csv"
    logger = MetricsFile(path)
    log(logger, 0, loss=1.5)
    log(logger, 9, loss=0.5)
    inode = path.stat().st_ino
    log(logger, 19, loss=0.25)
    assert path.stat().st_ino == inode  # appended
    log(logger, 19, val=2.0)  # a new column, and the row in which it stands is there already
    assert path.stat().st_ino != inode
    log(logger, 29, loss=0.125)
    log(logger, 29, val=1.0)  # the last row is completed in place
    expected = {0: ("1.5", ""), 9: ("0.5", ""), 19: ("0.25", "2.0"), 29: ("0.125", "1.0")}
    keys = ("loss", "val")
    assert read(path) == {
        step: {k: v for k, v in zip(keys, row, strict=True) if v} for step, row in expected.items()
    }


def test_a_resumed_file_loses_later_rows_and_a_line_cut_short(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,loss\n0,1.0\n99,0.5\n199,0.25\n1")  # "1" of "1299,..."
    logger = MetricsFile(path, resumed_step=150)
    log(logger, 150, loss=0.3)
    assert read(path) == {0: {"loss": "1.0"}, 99: {"loss": "0.5"}, 150: {"loss": "0.3"}}
