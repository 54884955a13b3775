"""The records of a file: its lines, the items of a JSON array, or what a benchmark measured.

An array is read item by item, as ShareGPT's 600 MB are one. A benchmark of vLLM or SGLang writes
one object with a list per column: `input_lens`, `output_lens`, and, of its newer versions,
`start_times`, `ttfts` and `itls`.
"""

import codecs
import gzip
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from cmjax.inputs import check_number, shown
from cmjax.serving.traces.columns import json_record

MOST_BYTES = 50_000_000
"""Of one record."""
_PART = 1 << 20
_BETWEEN = re.compile(r"[\s,]*")


@contextmanager
def opened(path: Path) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file, plain or packed, and what is read of it: (unpacked, as it is on disk)."""
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0, os.SEEK_SET)
        yield (gzip.GzipFile(fileobj=raw) if packed else raw), raw  # type: ignore[misc]


def records(file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """(where it stands, record) of a file, one after another.

    Raises: ValueError: a benchmark's result that makes no sense. OSError: a record of more than
      `MOST_BYTES`, or an array that is cut off.
    """
    lines = _lines(file)
    number, first = next(lines, (0, b""))
    start = first.removeprefix(codecs.BOM_UTF8).strip()
    if start.startswith(b"["):
        yield from _items(first, file)
        return
    if start == b"{":  # an object over several lines
        document = first + file.read(MOST_BYTES)
        if len(document) >= MOST_BYTES:
            raise OSError(f"an object of more than {MOST_BYTES:,} bytes")
        lines, first = iter(()), document
    if start.startswith(b"{") and (b'"input_lens"' in first or b'"total_input_tokens"' in first):
        for line in (first, *(line for _, line in lines)):
            yield from _requests_of(json_record(line))
        return
    if first:
        yield f"line {number}", first
    for number, line in lines:
        yield f"line {number}", line


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    number = 0
    while line := file.readline(MOST_BYTES + 1):
        number += 1
        if len(line) > MOST_BYTES:
            if number == 1 and line.lstrip(codecs.BOM_UTF8 + b" \t").startswith(b"["):
                yield number, line
                return
            raise OSError(f"a line of more than {MOST_BYTES:,} bytes")
        if line.strip():
            yield number, line


def _items(start: bytes, file: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Of a JSON array, as bytes again; only a part of the file is held at a time."""
    decode = codecs.getincrementaldecoder("utf-8-sig")().decode
    scan, number, part = json.JSONDecoder().raw_decode, 0, _PART
    text = decode(start)
    at = text.index("[") + 1
    while True:
        at = _BETWEEN.match(text, at).end()  # type: ignore[union-attr]
        if text.startswith("]", at):
            return
        try:
            _, end = scan(text, at)
        except ValueError:
            end = len(text)
        if end == len(text):  # the item goes on, or may do so
            more = file.read(part)
            if not more:
                raise OSError(f"item {number + 1} of the array is no JSON, or cut off")
            if len(text) - at > MOST_BYTES:
                raise OSError(f"an item of more than {MOST_BYTES:,} bytes")
            text, at, part = text[at:] + decode(more), 0, 2 * part
            continue
        number, part = number + 1, _PART
        yield f"item {number}", text[at:end].encode(errors="surrogatepass")
        at = end


def _requests_of(result: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """The requests of a benchmark that were answered, by their start where that is known."""
    names = ("input_lens", "output_lens", "start_times", "ttfts", "itls", "errors")
    columns = {name: result[name] for name in names if result.get(name)}
    if "input_lens" not in columns or "output_lens" not in columns:
        raise ValueError(
            "a benchmark's summary, without its requests (input_lens, output_lens); "
            "vLLM writes them with --save-detailed"
        )
    sizes = {name: len(of) if isinstance(of, list) else -1 for name, of in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"lists of different lengths: {sizes}")
    found = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    answered = [(i, of) for i, of in enumerate(found, 1) if not of.get("errors")]
    for number, of in answered:
        _check_times(number, of)
    if "start_times" in columns:
        answered.sort(key=lambda numbered: numbered[1]["start_times"])
    for number, of in answered:
        yield f"request {number}", json.dumps(_record(of)).encode()


def _check_times(number: int, of: dict[str, Any]) -> None:
    gaps = of.get("itls", [])
    if not isinstance(gaps, list):
        raise ValueError(f"request {number}: itls must be a list of times, got {shown(gaps)}")
    times = [(name, of[name]) for name in ("start_times", "ttfts") if name in of]
    for name, value in (*times, *(("itls", gap) for gap in gaps)):
        check_number(f"request {number}: {name}", value)


def _record(of: dict[str, Any]) -> dict[str, Any]:
    record = {"input_tokens": of["input_lens"], "output_tokens": of["output_lens"]}
    if "start_times" in of:
        record["queued_ts"] = start = of["start_times"]
        if "ttfts" in of and "itls" in of:
            record["first_token_ts"] = first = start + of["ttfts"]
            record["last_token_ts"] = first + sum(of["itls"])
    return record
