"""Azure's LLM inference traces (Patel et al., ISCA 2024): CSV of times and lengths."""

import re

import numpy as np

from cmjax.serving.traces.columns import Columns

_FIRST, _LAST = np.datetime64("1700"), np.datetime64("2250")  # what nanoseconds hold
_STAMP = re.compile(
    r"(\d{4}-\d\d-\d\d(?:[ T]\d\d:\d\d(?::\d\d(?:\.\d{1,9})?)?)?)(?:Z|([+-]\d\d):?(\d\d))?", re.A
)
_COLUMNS = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


class AzureReader:
    has_header = True

    def __init__(self, header: bytes):
        names = [name.strip() for name in header.decode("utf-8-sig").split(",")]
        missing = [name for name in _COLUMNS if name not in names]
        if missing:
            raise ValueError(
                f"Azure's header lacks {', '.join(missing)}; it has {', '.join(names)}"
            )
        self.at = [names.index(name) for name in _COLUMNS]
        self.zero: np.datetime64 | None = None

    def add(self, line: bytes, columns: Columns) -> None:
        cells = line.decode().strip().split(",")
        if len(cells) <= max(self.at):
            raise ValueError(f"{len(cells)} columns; {max(self.at) + 1} are needed")
        stamp, prompt, output = (cells[i] for i in self.at)
        time = _time(stamp)
        if time is None or not _FIRST < time.astype("M8[Y]") < _LAST:
            raise ValueError(f"TIMESTAMP {stamp!r}; a time between {_FIRST} and {_LAST} is needed")
        if self.zero is None:
            self.zero = time
        columns.add(float((time - self.zero).astype(np.int64)) * 1e-9, int(prompt), int(output))


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
