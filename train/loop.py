"""The run of a language model: resumption, then progress, metrics and checkpoints to the end, or to
a loss that is none."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cmjax.files import replaced
from cmjax.processes import is_first
from train import checkpoint
from train.data.text import Windows
from train.language_model import FREE, LanguageModelOptions
from train.metrics import LossNotFinite, MetricsLog


def resumed[State](
    config: LanguageModelOptions, first: Callable[[], State], console: Console
) -> tuple[State, int]:
    """The state of the folder's last checkpoint and the steps it has made; or a first one.

    Args: first: makes a state; where there is a checkpoint, for its shapes and places.
    Raises: ValueError: a checkpoint of another configuration.
    """
    found = checkpoint.latest(config.out / "checkpoints")
    if found is None:
        return first(), 0
    found.check_config(config.record(), ignore=FREE)
    state = found.arrays(first(), placed=True)
    made = found.count("step", config.steps)
    console.print(f"going on from {found.path}")
    return state, made


def save(config: LanguageModelOptions, state: Any, made: int) -> Path:
    """Write a checkpoint, every process its part."""
    folder = config.out / "checkpoints"
    return checkpoint.save(folder, state, config=config.record(), progress={"step": made})


def run_steps(
    config: LanguageModelOptions,
    windows: Windows,
    first: int,
    step: Callable[[int], dict[str, Any]],
    save: Callable[[], object],
    console: Console,
) -> None:
    """Steps `first` to `config.steps - 1`.

    Args:
      step: makes a step, and gives its line of metrics, with `loss` and `gradient_norm`.
      save: writes a checkpoint, every `config.checkpoint_every` steps and at the end.
    Raises: LossNotFinite: the loss or its gradient is; the batch is saved.
    """
    out, steps = config.out, config.steps
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
                        np.savez(file, tokens=windows.batch(number, config.batch), step=number)
                raise LossNotFinite(
                    f"the loss or its gradient is not finite at step {number}; the batch is in "
                    f"{path}. A lower learning rate may do"
                )
            if log is not None:
                log.write(step=number, **line)
            bar.update(task, advance=1, loss=line["loss"])
            if (number + 1) % config.checkpoint_every == 0 or number + 1 == steps:
                save()
