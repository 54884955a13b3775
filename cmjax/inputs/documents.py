"""JSON and TOML: no deeper than `MOST_DEPTH`, no name twice, every complaint with file and line."""

import collections
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from cmjax.inputs.text import in_one_line, read_text

MOST_DEPTH = 64
"""Lists and objects inside one another; what walks a document may call itself so often."""
_MOST_TOML_BYTES = 4_000_000
_PART = r"""(?:[\w-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(
    rf"(?m)(?:^|[{{,])[ \t]*\[{{0,2}}[ \t]*(?:{_PART}[ \t]*\.[ \t]*){{{MOST_DEPTH}}}"
)


def parse_json(text: str | bytes, source: str, *, line: int = 1) -> Any:
    """What JSON holds.

    Args:
      text: a document; bytes are UTF-8.
      source: of the text, for messages; "" where the caller says it.
      line: of the file on which the text begins, for messages.
    Returns: also NaN and Infinity, which are no JSON but often written.
    Raises: ValueError: no JSON, nested too deeply, or a name that comes twice in an object.

    >>> parse_json('{"a": [1, 2]}', "loads.json")
    {'a': [1, 2]}
    >>> parse_json('{"a": 1,}', "loads.json")
    Traceback (most recent call last):
    ValueError: loads.json line 1: not valid JSON (...
    """
    try:
        given = text.decode("utf-8-sig") if isinstance(text, bytes) else text.removeprefix("\ufeff")
        found = json.loads(given, object_pairs_hook=_distinct)
        _check_depth(found)
    except json.JSONDecodeError as error:
        line += error.lineno - 1
        problem = f"not valid JSON ({error.msg} in column {error.colno})"
    except RecursionError:
        problem = "not valid JSON (nested too deeply)"
    except ValueError as error:
        problem = f"not valid JSON ({in_one_line(error)})"
    else:
        return found
    raise ValueError(": ".join(filter(None, (source and f"{source} line {line}", problem))))


def read_json(path: str | Path) -> Any:
    """What a JSON file holds; see `read_text` and `parse_json`."""
    return parse_json(read_text(path), str(path))


def read_json_lines(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line, what it holds) of every line of JSON that is not empty.

    Raises: ValueError as `read_text` and `parse_json` do; the line is named.
    """
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield number, parse_json(line, f"{path}", line=number)


def parse_toml(text: str, source: str) -> dict[str, Any]:
    """What TOML holds.

    Raises: ValueError: no TOML, or nested too deeply.

    >>> parse_toml("nodes = 48", "mine.toml")
    {'nodes': 48}
    """
    if found := _LONG_KEY.search(text):
        line = text[: found.end()].count("\n") + 1
        raise ValueError(
            f"{source} line {line}: not valid TOML: a key of more than {MOST_DEPTH} parts"
        )
    try:
        tree = tomllib.loads(text)
        _check_depth(tree)
    except RecursionError:
        raise ValueError(f"{source}: not valid TOML: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{source}: not valid TOML: {in_one_line(error)}") from None
    return tree


def read_toml(path: str | Path) -> dict[str, Any]:
    """What a TOML file holds; see `read_text` and `parse_toml`."""
    return parse_toml(read_text(path, most_bytes=_MOST_TOML_BYTES), str(path))


def listed(names: Sequence[str]) -> str:
    """The first of many names, and how many there are."""
    few = ", ".join(names[:4])
    return few + (f", ... ({len(names):,} in all)" if len(names) > 4 else "")


def _check_depth(document: Any) -> None:
    """Raise RecursionError for what is nested deeper than `MOST_DEPTH`."""
    level = [document] if isinstance(document, list | dict) else []
    for _ in range(MOST_DEPTH):
        if not level:
            return
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent)
            if isinstance(child, list | dict)
        ]
    if level:
        raise RecursionError


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object in which no name comes twice.

    Raises: ValueError: one does.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = collections.Counter(name for name, _ in pairs)
        twice = sorted(name for name, count in counts.items() if count > 1)
        raise ValueError(f"named twice: {listed(twice)}")
    return found
