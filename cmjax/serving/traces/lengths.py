"""JSON lines with token counts: a measured run of an engine, or what a load generator sent."""

from array import array
from typing import Any

from cmjax.inputs import shown
from cmjax.serving.traces.clock import Clock
from cmjax.serving.traces.columns import (
    Columns,
    ids_of,
    json_record,
    number_of,
    prefix_ids,
    whole,
)

_PROMPT = ("input_length", "input_toks", "input_tokens", "prompt_tokens", "prompt_len", "input_len")
_OUTPUT = (
    "output_length", "output_toks", "output_tokens", "completion_tokens", "output_len",
)  # fmt: skip
_CLOCKS = {
    "queued_ts": lambda: Clock(1.0, from_first=True),
    "arrival_time_ns": lambda: Clock(1e-9, sure=True, from_first=True),
    "arrival_time": lambda: Clock(1.0, from_first=True),
    "arrival_s": lambda: Clock(1.0, sure=True, from_first=True),
    "timestamp_ms": lambda: Clock(1e-3, sure=True, from_first=True),
    "timestamp": lambda: Clock(1e-3),  # in ms from the start, as Mooncake has it
}
_IDS = ("input_tok_ids", "prompt_token_ids")


class LengthsReader:
    """Times count from the first request, unless they are a `timestamp`; ids of prompt tokens, if
    there are, become blocks."""

    has_header = False

    def __init__(self, first: dict[str, Any], block_tokens: int):
        self.prompt = _one_of(_PROMPT, first, "prompt tokens")
        self.output = _one_of(_OUTPUT, first, "output tokens")
        self.time = next((name for name in _CLOCKS if name in first), None)
        self.clock = None if self.time is None else _CLOCKS[self.time]()
        self.ids = next((name for name in _IDS if name in first), None)
        self.block_tokens = block_tokens

    def add(self, line: bytes, columns: Columns) -> None:
        record = json_record(line)
        time = None
        if self.time is not None and self.clock is not None:
            given = number_of(record, self.time)
            if self.time in ("timestamp", "timestamp_ms") and given < 0:
                raise ValueError(f"{self.time} {given}; times start at 0 or later")
            time = self.clock.seconds(given)
        prompt, output = whole(record[self.prompt]), whole(record[self.output])
        blocks: list[int] = []
        if self.ids is not None:
            ids, size = ids_of(record, self.ids), self.block_tokens
            if len(ids) != prompt:
                raise ValueError(
                    f"{len(ids)} {self.ids} for {self.prompt} {shown(prompt)}; they must agree"
                )
            blocks = prefix_ids(
                array("q", ids[i : i + size]).tobytes() for i in range(0, len(ids), size)
            )
        columns.add(time, prompt, output, blocks)


def _one_of(names: tuple[str, ...], record: dict[str, Any], what: str) -> str:
    for name in names:
        if name in record:
            return name
    raise ValueError(f"no {what} ({', '.join(names)}) in a record with {', '.join(record)}")
