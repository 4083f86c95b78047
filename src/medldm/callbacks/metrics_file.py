"""The file metrics.csv of a run: one row for each logged step."""

import csv
from pathlib import Path
from typing import Any, TextIO

from pytorch_lightning.loggers.logger import Logger
from pytorch_lightning.utilities import rank_zero_only

from medldm.files import replacing


class MetricsFile(Logger):
    """metrics.csv, one row per logged update. Lightning's CSVLogger deletes the file of the run it resumes;
    this one drops the rows from after the checkpoint and goes on.

    A new row is appended; the file is written anew, aside, only where a column is new.
    """

    def __init__(self, path: str | Path, *, resumed_step: int | None = None) -> None:
        super().__init__()
        self.path = Path(path)
        self.rows: dict[int, dict[str, Any]] = {}
        self.changed: set[int] = set()
        self.columns: list[str] = []  # of the file as it stands
        self.last_row = (-1, 0)  # its step, and where in the file it begins
        if resumed_step is not None and self.path.is_file():
            self.rows = self.read_rows(resumed_step)

    def read_rows(self, resumed_step: int) -> dict[int, dict[str, Any]]:
        """The rows before the checkpoint; a line that a kill cut short is left out."""
        lines = self.path.read_text().splitlines(keepends=True)
        complete = (line for line in lines if line.endswith("\n"))
        rows = {}
        for row in csv.DictReader(complete):
            step = int(row.pop("step"))
            if step < resumed_step:  # rows count from 0: the n-th update is row n - 1
                rows[step] = {key: value for key, value in row.items() if value != ""}
        return rows

    @property
    def name(self) -> str:
        return "metrics"

    @property
    def version(self) -> str:
        return ""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing: config.yaml holds them."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        step = int(step or 0)
        self.rows.setdefault(step, {}).update(metrics)
        self.changed.add(step)

    @rank_zero_only
    def save(self) -> None:
        """Lightning calls this after every row."""
        if not self.changed:
            return
        columns = set().union(*(self.rows[step] for step in self.changed))
        is_next = min(self.changed) >= self.last_row[0] and self.path.is_file()
        if is_next and columns <= set(self.columns):
            self.append(sorted(self.changed))
        else:
            self.rewrite()
        self.changed.clear()

    def append(self, steps: list[int]) -> None:
        """The rows of `steps`; the file's last row is replaced where it is one of them."""
        with open(self.path, "r+", newline="") as file:
            file.seek(self.last_row[1]) if steps[0] == self.last_row[0] else file.seek(0, 2)
            file.truncate()
            self.write(file, steps)

    def rewrite(self) -> None:
        self.columns = sorted(set().union(*self.rows.values()))
        with replacing(self.path) as aside, open(aside, "w", newline="") as file:
            csv.DictWriter(file, fieldnames=["step", *self.columns]).writeheader()
            self.write(file, sorted(self.rows))

    def write(self, file: TextIO, steps: list[int]) -> None:
        writer = csv.DictWriter(file, fieldnames=["step", *self.columns], restval="")
        for step in steps:
            self.last_row = (step, file.tell())
            writer.writerow({"step": step, **self.rows[step]})

    def finalize(self, status: str) -> None:
        self.save()
