"""A row per request, for whoever looks at them with other tools."""

import csv
import io
from pathlib import Path

import numpy as np

from cmjax.files import replace_bytes
from cmjax.serving.engine.outputs import EngineOutputs
from cmjax.serving.metrics import Latencies
from cmjax.serving.traces import Trace

ENDED = ("unserved", "completed", "rejected", "rejected_after_prefill")
SUFFIXES = (".csv", ".parquet")


def columns_of(trace: Trace, out: EngineOutputs, found: Latencies) -> dict[str, np.ndarray]:
    """By name; times in s, and NaN where a request has none."""

    def known(seconds: np.ndarray) -> np.ndarray:
        return np.where(seconds < 0, np.nan, seconds)

    return {
        "request": np.arange(trace.requests),
        "ended": np.array(ENDED)[out.ended],
        "prompt_tokens": trace.prompt,
        "output_tokens": trace.output,
        "hit_tokens": out.hit_tokens,
        "arrival_s": out.arrival_s,
        "scheduled_s": known(out.scheduled_s),
        "first_token_s": known(out.first_s),
        "decode_s": known(out.decode_s),
        "last_token_s": known(out.last_s),
        "ttft_s": found.ttft,
        "tpot_s": found.tpot,
        "retries": out.retries,
        "prefill_instance": out.prefill_worker,
        "decode_instance": out.decode_worker,
    }


def check_suffix(path: str | Path) -> None:
    """Raise ValueError for a file that `write_columns` would not write."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: requests are written as {' or '.join(SUFFIXES)}")
    if suffix == ".parquet":
        try:
            import pyarrow.parquet  # noqa: F401 - an optional peer
        except ImportError:
            raise ValueError(
                f"{path}: Parquet needs pyarrow (pip install 'cmjax[cluster]'); .csv needs nothing"
            ) from None


def write_columns(columns: dict[str, np.ndarray], path: str | Path) -> None:
    """Write them; an existing file is replaced only by a complete one.

    Raises: ValueError as `check_suffix` does.
    """
    check_suffix(path)
    if Path(path).suffix.lower() == ".parquet":
        import pyarrow
        import pyarrow.parquet

        sink = pyarrow.BufferOutputStream()
        pyarrow.parquet.write_table(pyarrow.table(columns), sink)
        replace_bytes(path, sink.getvalue().to_pybytes())
        return
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*(c.tolist() for c in columns.values()), strict=True))
    replace_bytes(path, text.getvalue().encode())
