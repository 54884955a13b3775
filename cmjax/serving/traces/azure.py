"""Azure's LLM inference traces (Patel et al., ISCA 2024), and BurstGPT's: CSV of times and lengths.

Times are dates, or numbers of seconds.
"""

import re

import numpy as np

from cmjax.inputs import parse_row
from cmjax.serving.traces.clock import Clock
from cmjax.serving.traces.columns import Columns, whole

_FIRST, _LAST = np.datetime64("1700"), np.datetime64("2250")  # what nanoseconds hold
_STAMP = re.compile(
    r"(\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?)?)(?:Z|([+-]\d\d):?(\d\d))?", re.A
)
_NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", re.A)
_COLUMNS = {
    "TIMESTAMP": {"timestamp"},
    "ContextTokens": {"contexttokens", "requesttokens"},
    "GeneratedTokens": {"generatedtokens", "responsetokens"},
}
"""Names, and how they are written without blanks and case in the traces of Azure and BurstGPT."""


def is_azure(first: bytes) -> bool:
    """Whether a line is the header of such a trace."""
    try:
        return "timestamp" in map(_plain, _header(first)[0])
    except ValueError:
        return False


class AzureReader:
    has_header = True

    def __init__(self, header: bytes):
        names, self.delimiter = _header(header)
        plain = [_plain(name) for name in names]
        at = {c: [i for i, n in enumerate(plain) if n in known] for c, known in _COLUMNS.items()}
        missing = [column for column, found in at.items() if not found]
        if missing:
            raise ValueError(
                f"Azure's header lacks {', '.join(missing)}; it has {', '.join(names)}"
            )
        self.at = [found[0] for found in at.values()]
        self.zero: np.datetime64 | None = None
        self.clock = Clock(1.0, from_first=True)

    def add(self, line: bytes, columns: Columns) -> None:
        cells = parse_row(line.decode().strip(), self.delimiter)
        if len(cells) <= max(self.at):
            raise ValueError(f"{len(cells)} columns; {max(self.at) + 1} are needed")
        stamp, prompt, output = (cells[i].strip() for i in self.at)
        time_s = self._seconds(stamp)
        columns.add(time_s, _whole("ContextTokens", prompt), _whole("GeneratedTokens", output))

    def _seconds(self, stamp: str) -> float:
        if _NUMBER.fullmatch(stamp):
            return self.clock.seconds(float(stamp))
        time = _time(stamp)
        if time is None or not _FIRST < time.astype("M8[Y]") < _LAST:
            raise ValueError(f"TIMESTAMP {stamp!r}; a time between {_FIRST} and {_LAST} is needed")
        if self.zero is None:
            self.zero = time
        return float((time - self.zero).astype(np.int64)) * 1e-9


def _header(line: bytes) -> tuple[list[str], str]:
    """Names of columns, and what stands between them."""
    text = line.decode("utf-8-sig").strip()
    delimiter = max(",;\t", key=text.count)
    return parse_row(text, delimiter), delimiter


def _plain(name: str) -> str:
    return re.sub(r"[\s_]", "", name).lower()


def _whole(name: str, cell: str) -> int:
    try:
        found = whole(float(cell))
    except ValueError:
        found = cell
    if not isinstance(found, int):
        raise ValueError(f"{name} {cell!r}; a whole number is needed")
    return found


def _time(stamp: str) -> np.datetime64 | None:
    """A time in UTC; `None` for what is none."""
    found = _STAMP.fullmatch(stamp.strip())
    if found is None:
        return None
    text, hours, minutes = found.groups()
    try:
        time = np.datetime64(text, "ns")
    except ValueError:  # a month 13
        return None
    if hours is None:
        return time
    east = int(hours[1:]) * 60 + int(minutes)
    return time - np.timedelta64(-east if hours[0] == "-" else east, "m")
