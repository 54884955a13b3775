"""What a run measured, one JSON object a line, in a file that survives a kill and a resumption."""

import json
from pathlib import Path
from typing import Any

from cmjax.files import replace_text
from cmjax.inputs import parse_json, read_text


class LossNotFinite(FloatingPointError):
    """Training went out of hand; the message says where the batch is saved."""


class MetricsLog:
    """Appends to a JSON-lines file; a line is on disk when `write` returns."""

    def __init__(self, path: Path, *, keep: int | None = None):
        """Open `path`; of what is there, keep lines whose "step" is below `keep` (None: all).

        A last line torn by a kill is dropped.
        """
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_metrics(path) if keep is None or line.get("step", -1) < keep]
        replace_text(path, "".join(json.dumps(line) + "\n" for line in kept))

    def write(self, **values: Any) -> None:
        """Append one line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(values) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole lines of a file; none if there is no file."""
    if not path.exists():
        return []
    lines = read_text(path).splitlines()
    out = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, "")
            if not isinstance(row, dict):
                raise ValueError("no object")
            out.append(row)
        except ValueError:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}: not JSON: {line[:80]!r}") from None
    return out
