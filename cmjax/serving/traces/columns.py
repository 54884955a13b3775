"""Columns of a trace as they are read: compact arrays that grow."""

import hashlib
from array import array
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from cmjax.inputs import check_count, check_number, parse_json, shown
from cmjax.serving.traces.trace import MOST_S, Trace, compact

_MOST_TOKENS = 10**12


class Columns:
    """What readers append to."""

    def __init__(self):
        self.arrival_s = array("d")
        self.prompt = array("q")
        self.output = array("q")
        self.block_end = array("q")
        self.block = array("i")  # of 64 bits with the first id that needs them

    def add(
        self, arrival_s: float | None, prompt: int, output: int, blocks: Sequence[int] = ()
    ) -> None:
        """One request; ids of blocks are any 64-bit numbers.

        Raises: ValueError: a time or a length that makes no sense, or before the last one's.
        """
        if arrival_s is not None:
            if not 0 <= arrival_s < float("inf"):
                raise ValueError(
                    f"time {arrival_s:g} s; times start at 0 or later and do not decrease"
                )
            if arrival_s > MOST_S:
                raise ValueError(f"time {arrival_s:g} s; times end before {MOST_S:g} s")
            if self.arrival_s and arrival_s < self.arrival_s[-1]:
                raise ValueError(
                    f"time {arrival_s:g} s is before the one above it ({self.arrival_s[-1]:g} s); "
                    "sort the trace by time"
                )
            self.arrival_s.append(arrival_s)
        for name, tokens in (("prompt", prompt), ("output", output)):
            if type(tokens) is not int or tokens < 1:
                raise ValueError(
                    f"{name} of {shown(tokens)} tokens; a whole number of at least 1 is needed"
                )
            check_count(f"{name} tokens", tokens, most=_MOST_TOKENS)
        self.prompt.append(prompt)
        self.output.append(output)
        self._add_blocks(blocks)
        self.block_end.append(len(self.block))

    def _add_blocks(self, blocks: Sequence[int]) -> None:
        if self.block.typecode == "i":
            try:
                self.block.extend(array("i", blocks))
                return
            except OverflowError:
                self.block = array("q", self.block)
        self.block.extend(array("q", blocks))

    def keep(self, requests: int) -> None:
        """Only the first so many."""
        for column in (self.arrival_s, self.prompt, self.output, self.block_end):
            del column[requests:]
        del self.block[self.block_end[-1] :]

    def trace(self, source: str, block_tokens: int) -> Trace:
        count = len(self.prompt)
        if self.arrival_s and len(self.arrival_s) != count:
            raise ValueError(f"{source}: some requests have a time and some have none")
        arrival_s = np.array(self.arrival_s) if self.arrival_s else np.zeros(count)
        return Trace(
            arrival_s=arrival_s,
            prompt=np.array(self.prompt, np.int64),
            output=np.array(self.output, np.int64),
            block_start=np.concatenate([[0], np.array(self.block_end, np.int64)]),
            block=compact(np.array(self.block, copy=False)),
            block_tokens=block_tokens,
            source=source,
        )  # fmt: skip


def json_record(line: bytes | str) -> dict[str, Any]:
    """The object that a line of JSON holds.

    Raises: ValueError: it holds none.
    """
    record = parse_json(line, "")
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but a {type(record).__name__}")
    return record


def number_of(record: dict[str, Any], name: str) -> int | float:
    """The number that a record has under a name.

    Raises: KeyError: it has none. ValueError: it is no finite number.
    """
    value = record[name]
    check_number(name, value)
    return value


def whole(value: Any) -> Any:
    """A number without a fraction as a whole one, anything else as it is."""
    return int(value) if type(value) is float and value.is_integer() else value


def ids_of(record: dict[str, Any], name: str) -> list[int]:
    """The list of whole numbers of 64 bits that a record has under a name.

    Raises: KeyError: it has none. ValueError: it is something else.
    """
    ids = record[name]
    if not isinstance(ids, list):
        raise ValueError(f"{name} must be a list of whole numbers, got {shown(ids)}")
    if ids and (set(map(type, ids)) != {int} or min(ids) < -(2**63) or max(ids) >= 2**63):
        wrong = next(v for v in ids if type(v) is not int or not -(2**63) <= v < 2**63)
        raise ValueError(f"{name} must hold whole numbers of 64 bits, got {shown(wrong)}")
    return ids


def prefix_ids(pieces: Iterable[bytes]) -> list[int]:
    """An id per piece that says it and all pieces before it: equal ids are equal prefixes."""
    ids, before = [], b""
    for piece in pieces:
        before = hashlib.blake2b(before + piece, digest_size=8).digest()
        ids.append(int.from_bytes(before, "little", signed=True))
    return ids
