"""`cmjax parallel`: how to split training over a machine."""

import dataclasses
from pathlib import Path

from rich.console import Console

import cmjax
from cmjax import report
from cmjax.console import check_target, emit
from cmjax.hardware import load_machine
from cmjax.models.dense import DenseConfig
from cmjax.parallelism import MoETraining, compare, named

_SIZES = ("layers", "hidden", "heads", "ffn", "vocab", "sequence")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel:
    """Split training over devices: search for plans, or price one."""

    model: str | None = None
    """A preset (pangu-2.6b, pangu-13b, pangu-200b, llama-2-7b, deepseek-v3, ...); or give sizes."""
    on: str = "ascend910-2048"
    """Machine: a name of the catalog, or a .toml file."""
    devices: int | None = None
    """Ranks to use (default: all of the machine, or as many as PLAN has)."""
    global_batch: int = 512
    """Sequences of a step."""
    sequence: int | None = None
    """Tokens of a sequence (default: the model's)."""
    layers: int | None = None
    """A GPT's layers."""
    hidden: int | None = None
    """Its width."""
    heads: int | None = None
    """Its attention heads."""
    ffn: int | None = None
    """Inner width of its feed-forward blocks (default: four times its width)."""
    vocab: int | None = None
    """Its vocabulary (default: 51,200)."""
    plan: str | None = None
    """Price this plan: data=16,tensor=8,pipeline=16,micro_batch=1,schedule=1f1b,..."""
    top: int = 5
    """Plans to list."""
    overlap: bool = True
    """Let the search reduce gradients while the last backward pass runs."""
    measured: Path | None = None
    """Price every row of this CSV of measured runs, and print the error table."""
    json: str | None = None
    """Write the result as JSON to this file; `-` is standard output."""
    plot: Path | None = None
    """Draw the plans' time and memory to this .png or .svg."""

    def run(self, console: Console) -> None:
        check_target(self.json, self.plot)
        if self.measured is not None:
            if self.plot is not None or self.plan is not None:
                raise ValueError("--measured takes neither --plan nor --plot")
            found = compare(self.measured, load_machine(self.on))
            emit(console, self.json, found.to_dict(), report.rows_table(found))
            return
        plans = cmjax.parallel(
            self.sizes(),
            self.on,
            devices=self.devices,
            global_batch=self.global_batch,
            plan=self.plan,
            top=self.top,
            overlap=self.overlap,
        )
        if self.model is not None:
            plans = dataclasses.replace(plans, model=self.model)
        if self.plot is not None:
            report.plot_plans(plans, self.plot)
        emit(console, self.json, plans.to_dict(), report.parallel_table(plans))

    def sizes(self) -> DenseConfig | MoETraining:
        """The model that the options describe."""
        given = {name: getattr(self, name) for name in _SIZES if getattr(self, name) is not None}
        if self.model is not None:
            if others := sorted(set(given) - {"sequence"}):
                raise ValueError(f"--{others[0]} does not go with --model; give one of the two")
            return dataclasses.replace(named(self.model), **given)
        if missing := [n for n in ("layers", "hidden", "heads") if n not in given]:
            raise ValueError(
                f"--{missing[0]} is needed, or --model with the name of a preset such as pangu-200b"
            )
        rest = {"ffn": 4 * given["hidden"], "vocab": 51_200, "sequence": 2048, "dropout": 0.1}
        return DenseConfig(**(rest | given))
