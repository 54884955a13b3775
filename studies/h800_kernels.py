"""Kernels that an H800 was timed at, beside their prices: those that were fitted to, and the rest.

    CMJAX_DATA=FOLDER python -m studies.h800_kernels

The rows are `measurements_public/infersim/bench_data` of the public data sets (InferSim, commit
f2293da): dense products of 8 bits, stacks of experts as decode and prefill have them, and attention
of a decode step. Some set constants of the `h800-pod`; a row that is not among these is a
prediction.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console

from cmjax.console import exit_code, terminal
from cmjax.cost.measured import Measurement, read_measurements
from cmjax.deploy.validation import ValidationRow, summary, validate
from cmjax.inputs import read_csv
from cmjax.interrupt import leave
from cmjax.report.tables import simple_table

DATA = Path(os.environ.get("CMJAX_DATA", Path(__file__).parents[1] / "../shared/data"))
MACHINE = "h800-pod"
FILES = {
    "dense products": "gemm/h800/*.csv",
    "experts, decode": "grouped_gemm/decode/h800/*.csv",
    "experts, prefill": "grouped_gemm/prefill/h800/*.csv",
    "latent attention": "mla/decode/h800/*.csv",
    "grouped-query attention": "mha/decode/h800/*.csv",
}


def measurements(kind: str, data: Path = DATA) -> list[Measurement]:
    """Every kernel of a kind.

    Raises: ValueError: the files are not there.
    """
    folder = data / "measurements_public" / "infersim" / "bench_data"
    if not (files := sorted(folder.glob(FILES[kind]))):
        raise ValueError(
            f"CMJAX_DATA: {data} has no file {(folder / FILES[kind]).relative_to(data)}"
        )
    return [row for file in files for row in _rows(kind, file)]


def _rows(kind: str, file: Path) -> Iterator[Measurement]:
    (_, header), *rows = read_csv(file)
    for _, cells in rows:
        row = dict(zip(header, cells, strict=True))
        if kind == "dense products":
            yield _measurement(f"gemm --m {row['m']} --k {row['k']} --n {row['n']}", row)
        elif kind.startswith("experts"):
            yield from _experts(row)
        else:
            yield _measurement(_attention(kind, file, row), row)


def _experts(row: dict[str, str]) -> Iterator[Measurement]:
    """Two products: to gate and up, and down."""
    stack = f"gemm --groups {row['num_local_experts']} --m {row['tokens_per_expert']}"
    hidden, ffn = row["hidden_size"], row["intermediate_size"]
    yield _measurement(f"{stack} --k {hidden} --n {2 * int(ffn)}", row, "up_proj_us")
    yield _measurement(f"{stack} --k {ffn} --n {hidden}", row, "down_proj_us")


def _attention(kind: str, file: Path, row: dict[str, str]) -> str:
    cache = f"--batch {row['batch_size']} --context {row['kv_len']}"
    heads, kv_heads, d = re.findall(r"\d+", file.stem)  # of latent attention: heads, ranks
    if kind == "latent attention":
        return f"latent-attention {cache} --q-len 1 --heads {heads}"
    assert d == "128", file
    return f"decode-attention {cache} --heads {heads} --kv-heads {kv_heads}"


def _measurement(micro: str, row: dict[str, str], key: str = "latency_us") -> Measurement:
    command = ("micro", *micro.split())
    return Measurement(micro, "calibrate", command, "us", float(row[key]), "InferSim")


def compared(data: Path = DATA) -> dict[tuple[str, bool], list[ValidationRow]]:
    """Rows by kind and by whether the machine's constants were fitted to them."""
    known = {_options(row) for row in read_measurements(MACHINE)}
    found: dict[tuple[str, bool], list[ValidationRow]] = {}
    for kind in FILES:
        rows = measurements(kind, data)
        for row, priced in zip(rows, validate(rows, MACHINE), strict=True):
            found.setdefault((kind, _options(row) in known), []).append(priced)
    return found


def _options(row: Measurement) -> frozenset[tuple[str, ...]]:
    """A command without the order of its options."""
    _, operator, *options = row.command
    pairs = zip(options[::2], options[1::2], strict=False)
    return frozenset([(operator,), *pairs])


def main(console: Console) -> None:
    """Print the table."""
    table = simple_table(
        "kernels of an H800", "kernels", "fitted", "rows", "mean error", "worst",
        "in the 90 % interval",
    )  # fmt: skip
    for (kind, fitted), rows in compared().items():
        (of,) = summary(rows).values()
        shares = (of.mean_error, of.worst_error, of.coverage or 0.0)
        table.add_row(
            kind, "yes" if fitted else "no", str(len(rows)), *(f"{x:.1%}" for x in shares)
        )
    console.print(table)


if __name__ == "__main__":
    leave(exit_code(lambda: main(terminal())))
