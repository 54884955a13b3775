"""Chats as ShareGPT has them: every answer is a request whose prompt is all that was said before.

Text is counted as a token per 4 bytes of UTF-8, which is near what tokenizers of English make of
it.
"""

from typing import Any

from cmjax.inputs import shown
from cmjax.serving.traces.columns import Columns, json_record, prefix_ids

_BYTES_PER_TOKEN = 4
_ANSWERS = ("gpt", "assistant", "model", "bot", "chatgpt")


class ChatReader:
    has_header = False

    def __init__(self, block_tokens: int):
        self.block_bytes = block_tokens * _BYTES_PER_TOKEN

    def add(self, line: bytes, columns: Columns) -> None:
        record = json_record(line)
        said = b""
        turns = record.get("conversations") or record.get("messages") or []
        if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
            raise ValueError(f"a chat must be a list of objects, got {shown(turns)}")
        for turn in turns:
            speaker = turn.get("from") or turn.get("role")
            if not isinstance(speaker, str):
                raise ValueError(f"nobody says (from, role) a turn of {shown(turn)}")
            text = _text(turn.get("value") or turn.get("content") or "")
            if speaker in _ANSWERS and said and text:
                tokens = -(-len(said) // _BYTES_PER_TOKEN)
                size = self.block_bytes
                pieces = [said[i : i + size] for i in range(0, len(said), size)]
                columns.add(None, tokens, -(-len(text) // _BYTES_PER_TOKEN), prefix_ids(pieces))
            said += text


def _text(content: Any) -> bytes:
    """What is said: text, or parts of which some are text."""
    parts = content if isinstance(content, list) else [content]
    parts = [part.get("text", "") if isinstance(part, dict) else part for part in parts]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"what is said must be text, got {shown(content)}")
    return "".join(parts).encode(errors="surrogatepass")
