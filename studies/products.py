"""Matrix products that an H800 was timed at, beside their prices: those fitted to, and the rest.

    CMJAX_DATA=FOLDER python -m studies.products

The rows are `measurements_public/infersim/bench_data` of the public data sets (InferSim, commit
f2293da): 110 dense products of 8 bits, and stacks of experts as decode and prefill have them. The
constants of the `h800-pod` are fitted to 38 of them; a row that is not among these is a prediction.
"""

import os
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
    "dense": "gemm/h800/data.csv",
    "experts, decode": "grouped_gemm/decode/h800/data.csv",
    "experts, prefill": "grouped_gemm/prefill/h800/data.csv",
}


def measurements(kind: str, data: Path = DATA) -> list[Measurement]:
    """Every product of a file.

    Raises: ValueError: the files are not there.
    """
    path = data / "measurements_public" / "infersim" / "bench_data" / FILES[kind]
    if not path.is_file():
        raise ValueError(f"CMJAX_DATA: {data} has no file {path.relative_to(data)}")
    (_, header), *rows = read_csv(path)
    read = _dense if kind == "dense" else _experts
    return [row for _, cells in rows for row in read(dict(zip(header, cells, strict=True)))]


def _dense(row: dict[str, str]) -> Iterator[Measurement]:
    yield _measurement("", row["m"], row["k"], row["n"], row["latency_us"])


def _experts(row: dict[str, str]) -> Iterator[Measurement]:
    """Two products: to gate and up, and down."""
    groups = f"--groups {row['num_local_experts']} "
    rows, hidden, ffn = row["tokens_per_expert"], row["hidden_size"], row["intermediate_size"]
    yield _measurement(groups, rows, hidden, str(2 * int(ffn)), row["up_proj_us"])
    yield _measurement(groups, rows, ffn, hidden, row["down_proj_us"])


def _measurement(groups: str, m: str, k: str, n: str, us: str) -> Measurement:
    command = f"micro gemm {groups}--m {m} --k {k} --n {n}"
    return Measurement(command, "calibrate", tuple(command.split()), "us", float(us), "InferSim")


def compared(data: Path = DATA) -> dict[tuple[str, bool], list[ValidationRow]]:
    """Rows by kind and by whether the machine's constants were fitted to them."""
    known = {row.command for row in read_measurements(MACHINE)}
    found: dict[tuple[str, bool], list[ValidationRow]] = {}
    for kind in FILES:
        rows = measurements(kind, data)
        for row, priced in zip(rows, validate(rows, MACHINE), strict=True):
            found.setdefault((kind, row.command in known), []).append(priced)
    return found


def main(console: Console) -> None:
    """Print the table."""
    table = simple_table(
        "matrix products of an H800", "products", "fitted", "rows", "mean error", "worst",
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
