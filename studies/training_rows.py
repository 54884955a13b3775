"""Published training runs beside their prices: time, rank, memory, and the bubble.

    CMJAX_DATA=FOLDER python -m studies.training_rows

The rows are `measurements_training` of the public data sets: vTrain's multi-node plans, Megatron
2021 (arXiv 2104.04473), Korthikanti 2022 (arXiv 2205.05198; time and memory), and the bubble of
Pangu Ultra (16 micro-batches on 8 stages, with 1 and 6 virtual ones). None sets a constant.
"""

import dataclasses
import os
from pathlib import Path

from rich.console import Console

from cmjax.console import exit_code, terminal
from cmjax.hardware import load_machine
from cmjax.inputs import read_csv
from cmjax.interrupt import leave
from cmjax.models.dense import DenseConfig
from cmjax.parallelism import Comparison, Plan, bubble, compare, memory_of
from cmjax.parallelism.result import GIB
from cmjax.report.tables import simple_table

DATA = Path(os.environ.get("CMJAX_DATA", Path(__file__).parents[1] / "../shared/data"))
RUNS = (
    ("vTrain, 3.6B and 18.4B", "vtrain_multi_node.csv", "a100-pod"),
    ("Megatron 2021, 1.7B to 1T", "megatron_2021.csv", "selene"),
    ("Korthikanti 2022, 22B and 175B", "korthikanti_2022.csv", "selene"),
)
"""What was run, its file, and the machine."""
PANGU_ULTRA = ((1, 30.45), (6, 6.8))
"""Virtual stages, and the bubble in per cent that was reported."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryRow:
    """GiB of a published row: of parameters and optimizer, and of activations without and with
    selective recomputation, each as predicted and as published."""

    billions: str
    state: tuple[float, float]
    activations: tuple[float, float]
    selective: tuple[float, float]

    @property
    def worst(self) -> float:
        """The largest relative error."""
        pairs = (self.state, self.activations, self.selective)
        return max(abs(ours / theirs - 1) for ours, theirs in pairs)


def times(data: Path = DATA) -> dict[str, Comparison]:
    """Every file's rows, priced.

    Raises: ValueError: the files are not there.
    """
    folder = data / "measurements_training"
    if not folder.is_dir():
        raise ValueError(f"CMJAX_DATA: {data} has no folder measurements_training")
    return {what: compare(folder / file, load_machine(machine)) for what, file, machine in RUNS}


def memories(data: Path = DATA) -> list[MemoryRow]:
    """Korthikanti's tables 3 and 5."""
    (_, header), *rows = read_csv(data / "measurements_training" / "korthikanti_2022.csv")
    return [_memory(dict(zip(header, cells, strict=True))) for _, cells in rows]


def _memory(row: dict[str, str]) -> MemoryRow:
    hidden, chunks = int(row["hidden"]), int(row["interleave"])
    model = DenseConfig(
        layers=int(row["layers"]), hidden=hidden, heads=int(row["heads"]), ffn=4 * hidden,
        vocab=int(row["vocab"]), sequence=int(row["sequence"]), dropout=0.1,
    )  # fmt: skip
    whole = Plan(
        tensor=int(row["tensor"]), pipeline=int(row["pipeline"]), interleave=chunks,
        schedule="interleaved" if chunks > 1 else "1f1b", micro_batch=int(row["micro_batch"]),
        recompute="none",
    )  # fmt: skip
    lean = dataclasses.replace(whole, recompute="selective", sequence_parallel=True)
    batch = int(row["global_batch"])
    found, less = memory_of(model, whole, batch), memory_of(model, lean, batch)
    state = (found.parameters + found.gradients + found.optimizer) / GIB
    return MemoryRow(
        billions=row["params_billion"],
        state=(state, float(row["params_optimizer_gib"])),
        activations=(found.activations / GIB, float(row["activations_gib"])),
        selective=(less.activations / GIB, float(row["activations_selective_sequence_gib"])),
    )


def main(console: Console) -> None:
    """Print the three tables."""
    table = simple_table("steps", "runs", "rows", "mean error", "worst", "Kendall's tau")
    for what, found in times().items():
        tau = found.kendall_tau
        table.add_row(
            what, str(len(found.rows)), f"{found.mean_error:.1%}", f"{found.worst_error:.1%}",
            "" if tau is None else f"{tau:.2f}",
        )  # fmt: skip
    console.print(table)
    table = simple_table(
        "GiB a device: predicted / published", "model", "state", "activations", "selective",
        "worst error",
    )  # fmt: skip
    for row in memories():
        pairs = (row.state, row.activations, row.selective)
        cells = (f"{ours:.2f} / {theirs:.2f}" for ours, theirs in pairs)
        table.add_row(f"{row.billions}B", *cells, f"{row.worst:.1%}")
    console.print(table)
    table = simple_table("bubble of Pangu Ultra", "virtual stages", "predicted", "published")
    for chunks, published in PANGU_ULTRA:
        schedule = "interleaved" if chunks > 1 else "1f1b"
        table.add_row(str(chunks), f"{bubble(schedule, 16, 8, chunks):.2%}", f"{published} %")
    console.print(table)


if __name__ == "__main__":
    leave(exit_code(lambda: main(terminal())))
