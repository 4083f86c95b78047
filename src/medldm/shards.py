"""The share of one process, where several do the work of one command, each on its own cases."""

import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from medldm.errors import InputError

FORMS = "give k/n, such as shard=2/4, or array, tasks, or null"


class Shard(NamedTuple):
    """The share with this number, from 1, of `count`."""

    number: int
    count: int

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    def part(self, items: Sequence[Any]) -> list[Any]:
        """The consecutive items of this share. All shares together have each item once, and their sizes
        differ by at most one.
        """
        first, last = (len(items) * k // self.count for k in (self.number - 1, self.number))
        return list(items[first:last])


def read_shard(given: str | None) -> Shard | None:
    """What the key `shard` means: None for the whole; k/n; `array`, the element of a SLURM array; `tasks`,
    the task of a SLURM step (srun -n). InputError for anything else, or outside of SLURM.
    """
    if given is None:
        return None
    if given == "array":
        shard = of_array(*slurm_numbers(given, "ID", "COUNT", "MIN", "MAX", start="SLURM_ARRAY_TASK_"))
    elif given == "tasks":
        rank, count = slurm_numbers(given, "PROCID", "NTASKS", start="SLURM_")
        shard = Shard(rank + 1, count)
    else:
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", str(given))
        shard = Shard(*map(int, found.groups())) if found else Shard(0, 0)
    if not 1 <= shard.number <= shard.count:
        raise InputError(f"shard={given}: {FORMS}")
    return None if shard.count == 1 else shard


def of_array(number: int, count: int, first: int, last: int) -> Shard:
    """The share of an array's element, whose numbers run from `first` to `last` in even steps."""
    step = (last - first) // (count - 1) if count > 1 else 1
    if first + step * (count - 1) != last or (number - first) % max(step, 1):
        raise InputError(
            f"shard=array: the numbers of this SLURM array, {count} from {first} to {last}, are not evenly "
            "spaced; submit it as --array=1-N"
        )
    return Shard((number - first) // max(step, 1) + 1, count)


def slurm_numbers(given: str, *names: str, start: str) -> list[int]:
    found = [os.environ.get(start + name, "") for name in names]
    if not all(value.isdigit() for value in found):
        what = {"array": "sbatch --array=1-N", "tasks": "srun -n N"}[given]
        raise InputError(f"shard={given}: this process is not one of `{what}`; {FORMS}")
    return [int(value) for value in found]
