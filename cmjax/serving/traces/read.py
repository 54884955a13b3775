"""Read a trace, whatever it was recorded by.

A file is read record by record and only its columns are kept, so that its size on disk does not
matter; `.gz` is unpacked on the way. What kind it is, its first record says.
"""

import gzip
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cmjax.inputs import check_count, check_seed
from cmjax.serving.traces.azure import AzureReader, is_azure
from cmjax.serving.traces.chats import ChatReader
from cmjax.serving.traces.columns import Columns, json_record
from cmjax.serving.traces.documents import opened, records
from cmjax.serving.traces.generate import generate
from cmjax.serving.traces.lengths import LengthsReader
from cmjax.serving.traces.mooncake import MooncakeReader
from cmjax.serving.traces.trace import Trace

_REPORT_EVERY = 1 << 14  # records
_GENERATORS = ("poisson", "gamma", "constant")


def read_trace(
    source: str | Path,
    *,
    requests: int | None = None,
    rate: float | None = None,
    block_tokens: int = 512,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> Trace:
    """Read a trace file, or draw what a specification says.

    Args:
      source: a file, plain or `.gz`: Mooncake (JSON lines with `timestamp` in ms, `input_length`,
        `output_length`, `hash_ids`), Azure or BurstGPT (CSV of TIMESTAMP, ContextTokens,
        GeneratedTokens), a measured run or any JSON lines with token counts (`lengths.py` has the
        names), the result of a benchmark (`input_lens`, `output_lens`), chats (`conversations`, as
        ShareGPT has them); an array in place of lines. Times since 1970 may be in s, ms, us or ns.
        Or `poisson:rate=4,requests=1000,...`, with the arguments of `generate`; `gamma:` and
        `constant:` likewise.
      requests: read the first so many only.
      rate: requests per second, drawn as a Poisson process: needed where the file has no times, and
        in place of them where it has.
      block_tokens: of a prefix block of the file. seed: of what is drawn.
      progress: called with bytes read, bytes of the file, "".
    Raises: ValueError: no such file, an unknown kind, a line that does not make sense, named.
    """
    if requests is not None:
        check_count("first (requests)", requests)
    check_count("block_tokens", block_tokens)
    check_seed("seed", seed)
    kind, colon, options = str(source).partition(":")
    if colon and kind in _GENERATORS:
        trace = generate(kind, **({"seed": seed} | _options(str(source), options)))
        trace = trace if requests is None else trace.first(requests)
        return trace if rate is None else trace.at_rate(rate, seed)
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"{source}: no such trace file; a synthetic one is called poisson:rate=4,requests=1000"
        )
    columns = _read(path, requests, block_tokens, progress)
    if not columns.arrival_s and rate is None:
        raise ValueError(f"{path}: the trace has no times; give a rate in requests per second")
    trace = columns.trace(str(path), block_tokens)
    return trace if rate is None else trace.at_rate(rate, seed)


def _read(path: Path, requests, block_tokens: int, progress) -> Columns:
    size = path.stat().st_size
    columns = Columns()
    where = ""
    with opened(path) as (file, raw):
        try:
            reader = None
            for number, found in enumerate(records(file), 1):
                where, record = found
                if reader is None:
                    reader = _reader_of(record, block_tokens)
                    if reader.has_header:
                        continue
                reader.add(record, columns)
                if progress is not None and number % _REPORT_EVERY == 0:
                    progress(raw.tell(), size, "")
                if requests is not None and len(columns.prompt) >= requests:
                    columns.keep(requests)
                    break
        except (EOFError, gzip.BadGzipFile, zlib.error, OSError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"{path}{where and ' '}{where}: {what}") from None
    if not columns.prompt:
        raise ValueError(f"{path}: no requests")
    return columns


def _reader_of(first: bytes, block_tokens: int):
    if first.lstrip(b"\xef\xbb\xbf \t").startswith(b"{"):
        record = json_record(first)
        if "hash_ids" in record:
            return MooncakeReader(block_tokens)
        if "conversations" in record or "messages" in record:
            return ChatReader(block_tokens)
        return LengthsReader(record, block_tokens)
    if is_azure(first):
        return AzureReader(first)
    raise ValueError(
        f"neither a JSON object nor Azure's header TIMESTAMP,ContextTokens,"
        f"GeneratedTokens: {first[:60].decode(errors='replace').strip()!r}"
    )


def _options(source: str, text: str) -> dict[str, Any]:
    """`rate=4,requests=1000` as arguments."""
    names: dict[str, Any] = generate.__kwdefaults__ or {}
    found: dict[str, Any] = {}
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not equals or name not in names:
            raise ValueError(f"{source}: {part!r} is none of {', '.join(names)} with a value")
        try:
            found[name] = type(names[name])(value)
        except ValueError:
            raise ValueError(f"{source}: {name} takes a number, got {value!r}") from None
    return found
