"""Train a byte-level mixture-of-experts language model, sharded over data and experts.

    python -m train.moe_lm                                         a grammar's text, a few minutes
    python -m train.moe_lm --text FILE [FILE ...] --mesh 2x2       files, on four emulated ranks
    python -m train.moe_lm --help                                  everything that can be told

Writes metrics.jsonl and checkpoints into the output folder. Run again, it goes on where it was
stopped. Prints the loss on text that was held out. Several processes train one model with
--coordinator HOST:PORT --processes N --process-id I, or under srun or mpirun.
"""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Int
from rich.console import Console

from cmjax.console import terminal
from cmjax.interrupt import leave
from cmjax.mesh import RankMesh
from cmjax.models.moe.model import MoEModel
from cmjax.options import run_program
from cmjax.processes import is_first, meet, of_first
from train.metrics import read_metrics
from train.moe.config import LanguageModelConfig
from train.moe.run import start, train, trained_model
from train.only_run import only_run


def main(config: LanguageModelConfig, console: Console) -> None:
    """Train what is left to train, and test.

    Raises: ValueError: another run writes into the folder.
    """
    # The first process holds the folder for all of them.
    with only_run(config.out) if config.group.first else contextlib.nullcontext():
        config.group.join(RankMesh.parse(config.mesh).nodes)
        console = of_first(console)
        run = start(config, console)
        train(run, console)
        loss = held_out_loss(trained_model(run), run.windows.held_out(config.test_windows))
        if is_first():
            _report(config, loss, console)
        meet("done")


def _report(config: LanguageModelConfig, loss: float, console: Console) -> None:
    lines = read_metrics(config.out / "metrics.jsonl")
    rate = np.median([line["tokens_per_s"] for line in lines])
    half = lines[len(lines) // 2 :]
    growth = half[-1]["resident_bytes"] - half[0]["resident_bytes"]
    console.print(
        f"held-out loss {loss:.4f} nats, {loss / math.log(2):.4f} bits per byte; "
        f"{rate:,.0f} tokens/s; busiest expert {lines[-1]['busiest_expert_over_mean']:.2f} times "
        f"the mean; memory over the second half of the run {growth / 1e6:+.1f} MB",
        highlight=False,
    )


def held_out_loss(model: MoEModel, tokens: Int[np.ndarray, "windows length"]) -> float:
    """Mean cross-entropy of the next byte, nats."""
    logits = jax.jit(lambda model, tokens: model(tokens))(model, tokens[:, :-1])
    labels = jnp.asarray(tokens[:, 1:])
    return float(jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels)))


if __name__ == "__main__":
    leave(run_program(lambda config: main(config, terminal()), LanguageModelConfig, __doc__))
