"""JSON lines with token counts: a measured run of an engine, or what a load generator sent."""

from array import array
from typing import Any

from cmjax.serving.traces.columns import Columns, ids_of, json_record, number_of, prefix_ids

_PROMPT = ("input_length", "input_toks", "input_tokens", "prompt_tokens", "prompt_len", "input_len")
_OUTPUT = (
    "output_length", "output_toks", "output_tokens", "completion_tokens", "output_len",
)  # fmt: skip
_TIMES = {
    "queued_ts": 1.0, "arrival_time_ns": 1e-9, "arrival_time": 1.0, "arrival_s": 1.0,
    "timestamp_ms": 1e-3, "timestamp": 1e-3,
}  # fmt: skip
"""Names of a time and their unit in s; `timestamp` is in ms, as Mooncake has it."""
_IDS = ("input_tok_ids", "prompt_token_ids")


class LengthsReader:
    """Times count from the first request; ids of prompt tokens, if there are, become blocks."""

    has_header = False

    def __init__(self, first: dict[str, Any], block_tokens: int):
        self.prompt = _one_of(_PROMPT, first, "prompt tokens")
        self.output = _one_of(_OUTPUT, first, "output tokens")
        self.time = next((name for name in _TIMES if name in first), None)
        self.ids = next((name for name in _IDS if name in first), None)
        self.block_tokens = block_tokens
        self.zero: float | None = None

    def add(self, line: bytes, columns: Columns) -> None:
        record = json_record(line)
        time = None
        if self.time is not None:
            given = number_of(record, self.time)
            if self.zero is None:
                self.zero = given if self.time != "timestamp" else 0
            time = float(given - self.zero) * _TIMES[self.time]
            if self.time in ("timestamp", "timestamp_ms") and given < 0:
                raise ValueError(f"{self.time} {given}; times start at 0 or later")
        blocks: list[int] = []
        if self.ids is not None:
            ids, size = ids_of(record, self.ids), self.block_tokens
            if len(ids) != record[self.prompt]:
                raise ValueError(
                    f"{len(ids)} {self.ids} for {self.prompt} "
                    f"{record[self.prompt]}; they must agree"
                )
            blocks = prefix_ids(
                array("q", ids[i : i + size]).tobytes() for i in range(0, len(ids), size)
            )
        columns.add(time, record[self.prompt], record[self.output], blocks)


def _one_of(names: tuple[str, ...], record: dict[str, Any], what: str) -> str:
    for name in names:
        if name in record:
            return name
    raise ValueError(f"no {what} ({', '.join(names)}) in a record with {', '.join(record)}")
