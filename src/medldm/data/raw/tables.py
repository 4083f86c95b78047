"""Reads tables as people keep them and as pandas and spreadsheets write them: with commas, semicolons or
tabs, in UTF-8, UTF-16 or Windows' cp1252.
"""

import codecs
import csv
import io
import logging
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from medldm.errors import InputError

log = logging.getLogger(__name__)
Note = Callable[[str], None]  # takes a line that `medldm prepare` prints and keeps in index.json
DELIMITERS = (",", ";", "\t")
LARGEST_TABLE = 2**28  # bytes of a table
UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
UNNAMED_COLUMN = re.compile(r"(Unnamed: \d+(_level_\d+)?)?")  # how pandas names its column of row numbers
EMPTY_CELLS = {"", "nan", "<na>", "n/a", "#n/a", "null"}  # cells that state no value, in lower case


class Row(NamedTuple):
    """One row of a table."""

    line: int  # of the file, counted from 1
    cells: dict[str, str]  # by column; "" where nothing is stated


def read_text(path: Path, note: Note = log.info) -> str:
    """The text of a file in UTF-8, in UTF-16 with a byte order mark, or else in cp1252, which is told to
    `note`. InputError where it is none of them.
    """
    if path.stat().st_size > LARGEST_TABLE:
        raise InputError(
            f"{path}: larger than {LARGEST_TABLE // 2**20} MiB, which is too large for a table; "
            "move it elsewhere"
        )
    data = path.read_bytes()
    try:
        if data.startswith(UTF16):
            return data.decode("utf-16")
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass  # the next encoding is tried
    try:
        if b"\0" in data:
            raise ValueError("holds zero bytes")
        text = data.decode("cp1252")
    except ValueError as error:
        raise InputError(f"{path}: not a text in UTF-8 ({error}); save it as 'CSV UTF-8'") from error
    note(f"{path.name}: not in UTF-8, read as Windows cp1252; save it as 'CSV UTF-8' where names look wrong")
    return text


def read_rows(
    path: Path, needs: Collection[str], *, known: Collection[str] = (), note: Note = log.info
) -> list[Row]:
    """The rows of a table whose header has at least one column of `needs`, without empty rows.

    Spaces around column names are removed; those of `needs` and `known` are found in any case. Columns
    without a name are left out. InputError where the header does not fit, names a column twice, or a row has
    more cells than it.
    """
    text = read_text(path, note)
    delimiter = find_delimiter(text, {name.lower() for name in needs})
    if delimiter is None:
        wanted = " or ".join(f"'{name}'" for name in needs)
        raise InputError(f"{path}: needs a header line with the column {wanted} and at least one row")
    lines = list(parsed_lines(text, delimiter, path))
    columns = header_names(lines[0][1], {name.lower(): name for name in (*needs, *known)})
    twice = next((name for name, count in Counter(filter(None, columns)).items() if count > 1), None)
    if twice:
        raise InputError(f"{path}: has the column '{twice}' twice; rename or remove one of them")
    rows, has_unnamed = [], False
    for number, cells in lines[1:]:
        cells = ["" if cell.strip().lower() in EMPTY_CELLS else cell.strip() for cell in cells]
        if any(cells[len(columns) :]):
            raise InputError(
                f"{path}: line {number} has more cells than the header; put a value that holds a "
                f"'{delimiter}' into double quotes"
            )
        named = [(name, cell) for name, cell in zip(columns, cells, strict=False) if name]
        has_unnamed |= any(cell and not name for name, cell in zip(columns, cells, strict=False))
        if any(cell for _, cell in named):
            rows.append(Row(number, dict.fromkeys(filter(None, columns), "") | dict(named)))
    if not rows:
        raise InputError(f"{path}: has a header line and no row below it; add the rows")
    if has_unnamed:
        note(f"{path.name}: a column without a name is left out")
    return rows


def parsed_lines(text: str, delimiter: str, path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of the line, cells) of every row. InputError where a quoted cell is not closed."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for cells in reader:
            yield reader.line_num, cells
    except csv.Error as error:
        raise InputError(
            f"{path}: line {reader.line_num} cannot be read ({error}); is a quote open?"
        ) from error


def find_delimiter(text: str, needs: Collection[str]) -> str | None:
    """The delimiter under which the header has one of the columns `needs`; None where none does."""
    first = text.lstrip("\r\n").partition("\n")[0]
    for delimiter in DELIMITERS:
        try:
            cells = next(csv.reader([first[: csv.field_size_limit()]], delimiter=delimiter), [])
        except csv.Error:
            continue
        if {cell.strip().lower() for cell in cells} & set(needs):
            return delimiter
    return None


def header_names(cells: list[str], known: dict[str, str]) -> list[str]:
    """The column names, in the spelling of `known` where they are in it; "" for a column without a name."""
    names = [cell.strip() for cell in cells]
    return ["" if UNNAMED_COLUMN.fullmatch(name) else known.get(name.lower(), name) for name in names]
