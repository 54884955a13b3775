"""Comma-separated tables: rows with the lines they stand on."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from cmjax.inputs.text import in_one_line, read_text

Row = tuple[int, list[str]]
"""The line on which a row ends, and its cells."""


def read_csv(path: str | Path, *, source: str | None = None) -> list[Row]:
    """The rows that are not empty; see `parse_csv`."""
    return parse_csv(read_text(path, source=source), str(path) if source is None else source)


def parse_csv(text: str, source: str) -> list[Row]:
    """The rows of a text that are not empty.

    Raises: ValueError: a zero byte, or a cell without end; the line is named.

    >>> parse_csv("layer,expert\\n3,7\\n", "counts.csv")
    [(1, ['layer', 'expert']), (2, ['3', '7'])]
    """
    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(
            f"{source} line {reader.line_num}: no comma-separated text: {in_one_line(error)}"
        ) from None


def parse_row(line: str, delimiter: str = ",") -> list[str]:
    """The cells of one line, for tables that are read line by line.

    Raises: ValueError: a zero byte, or a cell without end.

    >>> parse_row('3;"a;b"', ";")
    ['3', 'a;b']
    """
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error as error:
        raise ValueError(f"no row of a table: {in_one_line(error)}") from None


def read_records(path: str | Path, columns: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """(line, cell by column) of every row below the header; see `records_of`."""
    return records_of(read_csv(path), columns, str(path))


def records_of(
    rows: Sequence[Row], columns: Sequence[str], source: str
) -> list[tuple[int, dict[str, str]]]:
    """(line, cell by column) of every row below the first, which names the columns.

    Raises: ValueError: one of `columns` is missing or named twice, a row has another number of
      cells, or there is no row.
    """
    names = [" ".join(name.split()) for name in rows[0][1]] if rows else []
    if missing := [name for name in columns if names.count(name) != 1]:
        raise ValueError(
            f"{source}: no column {missing[0]}, or several; expected {', '.join(columns)}, found "
            f"{', '.join(names) or 'nothing'}"
        )
    if len(rows) < 2:
        raise ValueError(f"{source}: no rows")
    for line, cells in rows[1:]:
        if len(cells) != len(names):
            raise ValueError(
                f"{source} line {line}: expected {len(names)} columns, found {len(cells)}"
            )
    return [(line, dict(zip(names, cells, strict=True))) for line, cells in rows[1:]]
