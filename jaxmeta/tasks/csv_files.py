"""Tables in csv files of several dialects, with line numbers for error messages."""

import csv
import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from jaxmeta.checks import ArgumentError

_DELIMITERS = (",", ";", "\t")


class _CsvFile(NamedTuple):
    """A table.

    Attributes:
      header: column names, stripped.
      rows: pairs of the line number and the cells of a row, one cell per column; empty rows are skipped.
    """

    header: list[str]
    rows: Iterator[tuple[int, list[str]]]


def read_csv(path: Path, argument: str, count_known: Callable[[Sequence[str]], int]) -> _CsvFile:
    """Read a table with a header, in UTF-8 or UTF-16, with commas, semicolons or tabs as delimiter.

    Args:
      path: path of the file.
      argument: name of the caller's argument, for the messages.
      count_known: function that counts the columns of a header that the caller uses; the delimiter with the
        largest count is chosen.

    Raises:
      ArgumentError: the file has another encoding; or, while rows are read, a row has more or fewer
        cells than the header, or a quote is not closed.
    """
    text = _text(path, argument)
    header, delimiter = _header(text, count_known)
    return _CsvFile(header, _rows(path, argument, text, len(header), delimiter))


def read_header(path: Path, count_known: Callable[[Sequence[str]], int]) -> list[str]:
    """Return the column names of a file, which need not be a table."""
    with path.open("rb") as file:
        raw = file.read(1 << 14)
    return _header(raw.decode(_encoding(raw), errors="replace"), count_known)[0]


def _encoding(raw: bytes) -> str:
    return "utf-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"


def _text(path: Path, argument: str) -> str:
    raw = path.read_bytes()
    try:
        return raw.decode(_encoding(raw))
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ArgumentError(argument, f"{path}, line {line}: not UTF-8; save the file as UTF-8") from None


def _header(text: str, count_known: Callable[[Sequence[str]], int]) -> tuple[list[str], str]:
    """Return the column names and the delimiter."""
    first = next((line for line in text.splitlines() if line.strip()), "")
    candidates: list[tuple[list[str], str]] = []
    for delimiter in _DELIMITERS:
        try:
            cells = next(csv.reader([first], delimiter=delimiter), [])
        except csv.Error:
            continue
        names = [cell.strip() for cell in cells]
        while names and not names[-1]:
            names.pop()
        candidates.append((names, delimiter))
    # The delimiter with most known columns, then with most columns.
    return max(candidates, key=lambda pair: (count_known(pair[0]), len(pair[0])), default=([], ","))


def _rows(
    path: Path, argument: str, text: str, columns: int, delimiter: str
) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    in_body = False
    try:
        for cells in rows:
            if not any(cell.strip() for cell in cells):
                continue
            if not in_body:  # the header
                in_body = True
                continue
            # Spreadsheet programs may pad rows with empty cells.
            while len(cells) > columns and not cells[-1].strip():
                cells.pop()
            if len(cells) != columns:
                raise ArgumentError(
                    argument,
                    f"{path}, line {rows.line_num}: expected {columns} cells, got {len(cells)}",
                )
            yield rows.line_num, cells
    except csv.Error as error:
        raise ArgumentError(
            argument, f"{path}, line {rows.line_num}: cannot be read as csv ({error})"
        ) from None
