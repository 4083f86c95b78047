"""How far long work has come: a bar on a terminal, elsewhere a line of the log once a minute."""

import logging
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

log = logging.getLogger(__name__)

T = TypeVar("T")
INTERVAL = 60.0  # seconds between two lines


def has_bars() -> bool:
    """Whether a bar can be drawn: on a terminal and in a notebook, not in a file or a pipe."""
    from rich.console import Console  # not needed by the processes that load data

    console = Console()
    return console.is_terminal or console.is_jupyter


class Pace:
    """Says once a minute how far the work has come, and how long the rest takes at the same rate.

    `begin` starts the clock, at `done` of the `total` that were finished before. `due` tells whether a minute
    is over; `line` gives the text and begins the next minute.
    """

    def __init__(self, description: str, total: int | None, *, clock: Callable[[], float] = time.monotonic):
        self.description, self.total, self.clock = description, total, clock
        self.begin(0)

    def begin(self, done: int) -> None:
        self.first, self.start = done, self.clock()
        self.last = self.start

    def due(self) -> bool:
        return self.clock() - self.last >= INTERVAL

    def line(self, done: int, more: str = "") -> str:
        self.last = self.clock()
        rate = (done - self.first) / max(self.last - self.start, 1e-9)
        text = f"{self.description}: {done}" + (f" of {self.total}" if self.total else "") + more
        if not self.total or not rate:
            return text
        left = timedelta(seconds=round(max(0, self.total - done) / rate))
        return f"{text}, {left} left" if done < self.total else text


@contextmanager
def progress(description: str, total: int, *, transient: bool = False) -> Iterator[Callable[[int], None]]:
    """Yields `advance(n)`, which is told of each n finished items of `total`."""
    if not has_bars():
        lines, done = Pace(description, total), 0

        def count(num: int = 1) -> None:
            nonlocal done
            done += num
            if lines.due():
                log.info("%s", lines.line(done))

        yield count
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, transient=transient) as bar:
        task = bar.add_task(description, total=total)
        yield lambda num=1: bar.advance(task, num)


def tracked(items: Collection[T], description: str, *, transient: bool = False) -> Iterator[T]:
    """The items one by one; an item is finished when the loop asks for the next."""
    with progress(description, len(items), transient=transient) as advance:
        for item in items:
            yield item
            advance(1)
