"""The loop of a training run: progress, metrics, checkpoints, and a stop at a loss that is none."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cmjax.files import replaced
from cmjax.processes import is_first
from train.metrics import LossNotFinite, MetricsLog


def run_steps(
    first: int,
    steps: int,
    step: Callable[[int], dict[str, Any]],
    *,
    out: Path,
    batch: Callable[[int], np.ndarray],
    save: Callable[[int], object],
    save_every: int,
    console: Console,
) -> None:
    """Steps `first` to `steps - 1`.

    Args:
      step: makes a step, and gives its line of metrics, with `loss` and `gradient_norm`.
      out: folder of metrics.jsonl. batch: what a step learnt from, to be kept if it went wrong.
      save: is told the number of steps made, every `save_every` of them and at the end.
    Raises: LossNotFinite: the loss or its gradient is; the batch is saved.
    """
    log = MetricsLog(out / "metrics.jsonl", keep=first) if is_first() else None
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console)
    bar.disable = not console.is_terminal
    with bar:
        task = bar.add_task("", total=steps, completed=first, loss=math.nan)
        for number in range(first, steps):
            line = step(number)
            if not math.isfinite(line["loss"]) or not math.isfinite(line["gradient_norm"]):
                path = out / "bad_batch.npz"
                if is_first():
                    with replaced(path) as file:
                        np.savez(file, tokens=batch(number), step=number)
                raise LossNotFinite(
                    f"the loss or its gradient is not finite at step {number}; the batch is in "
                    f"{path}. A lower learning rate may do"
                )
            if log is not None:
                log.write(step=number, **line)
            bar.update(task, advance=1, loss=line["loss"])
            if (number + 1) % save_every == 0 or number + 1 == steps:
                save(number + 1)
