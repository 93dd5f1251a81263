"""Tables in csv files as programs and people write them: rows, and their lines for errors."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxmeta.checks import ArgumentError

_DELIMITERS = (",", ";", "\t")


class CsvFile(NamedTuple):
    """A table.

    Attributes:
      header: names of the columns, without blanks around them.
      rows: the line of each row, and its cells, one for each column; empty rows are left out.
    """

    header: list[str]
    rows: Iterator[tuple[int, list[str]]]


def read_csv(path: Path, argument: str, known: Callable[[Sequence[str]], int]) -> CsvFile:
    """Read a table with a header, in UTF-8 or UTF-16, with commas, semicolons or tabs between its cells.

    Args:
      path: the file.
      argument: that named it, for the messages.
      known: how many columns of a header are of use, which tells what stands between cells.

    Raises:
      ArgumentError: it is in another encoding; or, as rows are read, one has another number of cells than the
        header, or quotes that do not end.
    """
    text = _text(path, argument)
    header, delimiter = _header(text, known)
    return CsvFile(header, _rows(path, argument, text, len(header), delimiter))


def read_header(path: Path, known: Callable[[Sequence[str]], int]) -> list[str]:
    """Return the names of the columns of a file, which may be no table."""
    with path.open("rb") as file:
        raw = file.read(1 << 14)
    return _header(raw.decode(_encoding(raw), errors="replace"), known)[0]


def _encoding(raw: bytes) -> str:
    return "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _text(path: Path, argument: str) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode(_encoding(raw))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ArgumentError(argument, f"{path}, line {line}: is not UTF-8; save the file as such") from None


def _header(text: str, known: Callable[[Sequence[str]], int]) -> tuple[list[str], str]:
    """Return the names of the columns, and what stands between cells."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    found: list[tuple[list[str], str]] = []
    for delimiter in _DELIMITERS:
        try:
            cells = next(csv.reader([first], delimiter=delimiter), [])
        except csv.Error:
            continue
        names = [cell.strip() for cell in cells]
        while names and not names[-1]:
            names.pop()
        found.append((names, delimiter))
    # The one that tells the columns apart, else the one that tells most.
    return max(found, key=lambda each: (known(each[0]), len(each[0])), default=([], ","))


def _rows(
    path: Path, argument: str, text: str, columns: int, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    begun = False
    try:
        for cells in rows:
            if not any(cell.strip() for cell in cells):
                continue
            if not begun:  # the header
                begun = True
                continue
            # Programs for tables end rows with empty cells.
            while len(cells) > columns and not cells[-1].strip():
                cells.pop()
            if len(cells) != columns:
                raise ArgumentError(
                    argument,
                    f"{path}, line {rows.line_num}: got {len(cells)} cells, and there are {columns} columns",
                )
            yield rows.line_num, cells
    except csv.Error as error:
        raise ArgumentError(
            argument, f"{path}, line {rows.line_num}: cannot be read as csv ({error})"
        ) from None
