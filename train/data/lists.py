"""Lists on disk as people's programs write them: lines, pairs, tables; every error names the line.

Text is UTF-8, with a byte-order mark or without, or UTF-16 or UTF-32 with one. Another encoding has
to be named: guessing one would make wrong letters of it without a word. A line ends where an editor
ends it; U+2028 and the like are text.
"""

import codecs
import csv
import io
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_MARKS = (  # UTF-32 first: its mark begins as that of UTF-16
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SEPARATORS = (",", "\t", ";", "|")
_BLANK = " \t\r\n\v\f"


class Line(NamedTuple):
    """A line of a list that is not empty.

    Attributes:
      where: file and number, for messages.
      text: without the blanks around it.
    """

    where: str
    text: str


def read_list(path: Path, encoding: str = "utf-8") -> str:
    """The text of a file.

    Raises: ValueError: no such file, an unknown encoding, or bytes that it does not have; names
      file and line.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"no file {path}") from None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    encoding = next((name for mark, name in _MARKS if data.startswith(mark)), encoding)
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path}, line {line}: byte 0x{data[error.start]:02x} is not {encoding}; name the "
            "encoding with --encoding, such as latin-1 or cp1251"
        ) from None
    except LookupError:
        raise ValueError(f"--encoding: no encoding is called {encoding!r}") from None


def lines(path: Path, encoding: str = "utf-8") -> list[Line]:
    """Every line that is not empty. Raises: see `read_list`."""
    numbered = enumerate(re.split("\r\n|\r|\n", read_list(path, encoding)), 1)
    stripped = ((number, text.strip(_BLANK)) for number, text in numbered)
    return [Line(f"{path}, line {number}", text) for number, text in stripped if text]


def pairs(path: Path, encoding: str = "utf-8") -> dict[str, Line]:
    """`name rest of the line`, separated by blanks or tabs, by name.

    Raises: ValueError: a name for the second time; see also `read_list`.
    """
    found: dict[str, Line] = {}
    for where, text in lines(path, encoding):
        name, rest = head(text)
        if name in found:
            raise ValueError(f"{where}: {name!r} for the second time")
        found[name] = Line(where, rest)
    return found


def head(text: str) -> tuple[str, str]:
    """(first word, the rest) of a line; blanks or tabs are between them."""
    name, *rest = re.split(r"[ \t]+", text, maxsplit=1)
    return name, rest[0] if rest else ""


def table(path: Path, columns: tuple[str, ...], encoding: str = "utf-8") -> list[tuple[str, dict]]:
    """(where, column -> value) of every row of a table that begins with the names of its columns.

    The separator is the one among comma, tab, semicolon and bar that gives the wanted columns.
    Names are lower-cased.

    Raises: ValueError: no such columns, a row with fewer or more values than columns, or quotes
      that do not close; names the line. See also `read_list`.
    """
    text = read_list(path, encoding)
    first = next((row for row in re.split("\r\n|\r|\n", text) if row.strip()), "")
    separator = max(_SEPARATORS, key=lambda mark: _columns(first, mark, columns))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows, names = [], None
    try:
        for values in reader:
            where = f"{path}, line {reader.line_num}"
            if not any(value.strip() for value in values):
                continue
            if names is None:
                names = [value.strip(_BLANK).lower() for value in values]
                missing = [column for column in columns if column not in names]
                if missing:
                    raise ValueError(
                        f"{path}: no column {', '.join(missing)}; there are {', '.join(names)}"
                    )
                continue
            if len(values) != len(names):
                raise ValueError(
                    f"{where}: {len(values)} values in {len(names)} columns ({', '.join(names)})"
                )
            rows.append((where, dict(zip(names, (v.strip(_BLANK) for v in values), strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def number(
    given: object, where: str, name: str, *, whole: bool = False, least: float = 0.0
) -> float | None:
    """A number of a list, or None where it is absent: missing, null or empty.

    Raises: ValueError: not a number, not finite, below `least`, or a fraction where `whole`.
    """
    if given is None or (isinstance(given, str) and not given.strip()):
        return None
    try:
        if isinstance(given, bool) or not isinstance(given, str | int | float):
            raise ValueError
        value = float(given)
        if not math.isfinite(value) or value < least or (whole and not value.is_integer()):
            raise ValueError
    except (ValueError, OverflowError):
        wanted = "a whole number" if whole else "a number"
        shown = repr(given)[:40]
        raise ValueError(
            f"{where}: {name} must be {wanted}, at least {least:g}, got {shown}"
        ) from None
    return value


def text_of(row: Mapping, where: str, name: str) -> str:
    """A text of a list; empty where it is null.

    Raises: ValueError: missing, or no text.
    """
    if name not in row:
        raise ValueError(f"{where}: no {name!r}")
    value = row[name]
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be a text, got {str(value)[:40]!r}")
    return value or ""


def _columns(first: str, separator: str, wanted: tuple[str, ...]) -> int:
    names = {name.strip(_BLANK + '"').lower() for name in first.split(separator)}
    return len(names & set(wanted)) * 1000 + first.count(separator)
