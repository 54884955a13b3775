"""Mooncake's traces (FAST'25): times in ms, lengths, and ids of prefix blocks of 512 tokens."""

from cmjax.serving.traces.clock import Clock
from cmjax.serving.traces.columns import Columns, ids_of, json_record, number_of, whole


class MooncakeReader:
    has_header = False

    def __init__(self, block_tokens: int):
        self.block_tokens = block_tokens
        self.clock = Clock(1e-3)

    def add(self, line: bytes, columns: Columns) -> None:
        record = json_record(line)
        prompt, ids = whole(record["input_length"]), ids_of(record, "hash_ids")
        if type(prompt) is int and prompt > 0 and len(ids) != -(-prompt // self.block_tokens):
            raise ValueError(
                f"{len(ids)} hash_ids for input_length {prompt}; at {self.block_tokens} tokens a "
                f"block it needs {-(-prompt // self.block_tokens)}"
            )
        time_s = self.clock.seconds(number_of(record, "timestamp"))
        columns.add(time_s, prompt, whole(record["output_length"]), ids)
