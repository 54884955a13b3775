"""The run: metrics, checkpoints, and resumption as if never stopped."""

import dataclasses
import math
import time
from pathlib import Path

import jax
from rich.console import Console

from cmjax.mesh import RankMesh
from cmjax.models.moe.model import MoEModel, abstract_model, assemble
from cmjax.models.moe.parallelism import one_rank
from cmjax.models.moe.steps import abstract_params
from cmjax.processes import from_rows, own_rows
from train.data.text import Windows
from train.loop import resumed, run_steps, save
from train.moe.config import LanguageModelConfig
from train.moe.train_step import TrainState, initial, make_step, one_rank_params


@dataclasses.dataclass
class LanguageModelRun:
    """A run in its folder.

    Attributes:
      config, mesh, windows: what to learn, on which ranks, from which text.
      state: parameters and optimizer.
      step: steps made.
    """

    config: LanguageModelConfig
    mesh: RankMesh
    windows: Windows
    state: TrainState
    step: int = 0


def start(config: LanguageModelConfig, console: Console) -> LanguageModelRun:
    """Read the text, and the last checkpoint of the folder if there is one.

    Raises:
      ValueError: a text too short or unreadable, a mesh that does not fit, a checkpoint of another
        configuration.
    """
    mesh = RankMesh.parse(config.mesh)
    windows = Windows(config.learned_text(), config.length, config.seed)
    state, made = resumed(config, lambda: initial(config, mesh), console)
    return LanguageModelRun(config, mesh, windows, state, made)


def train(run: LanguageModelRun, console: Console) -> None:
    """Every step that is left.

    Raises:
      LossNotFinite: the loss or its gradient is; the batch is saved.
    """
    config = run.config
    make, own = make_step(config, run.mesh), own_rows(config.batch)

    def step(number: int) -> dict[str, float]:
        tokens = from_rows(run.windows.batch(number, config.batch, own), run.mesh)
        began = time.perf_counter()
        run.state, result = jax.block_until_ready(make(run.state, tokens))
        seconds = time.perf_counter() - began
        loss = float(result.loss)
        run.step = number + 1
        return {
            "loss": loss,
            "bits_per_byte": loss / math.log(2),
            "gradient_norm": float(result.gradient_norm),
            "busiest_expert_over_mean": float(result.load),
            "tokens_per_s": round(config.batch * config.length / seconds, 1),
            "resident_bytes": resident_bytes(),
        }

    run_steps(
        config, run.windows, run.step, step,
        save=lambda: save(config, run.state, run.step), console=console,
    )  # fmt: skip


def trained_model(run: LanguageModelRun) -> MoEModel:
    """The model on one rank."""
    config = run.config.model
    parallelism = one_rank(config)
    params = one_rank_params(run.state.params, run.config)
    assert jax.tree.structure(params) == jax.tree.structure(
        abstract_params(config, parallelism, "float32")
    )
    return assemble(abstract_model(config, parallelism, "float32")[0], params)


def resident_bytes() -> int:
    """Memory that the process holds, from /proc; 0 where there is none."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * 4096
