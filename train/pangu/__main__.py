"""Train a tiny PanGu-alpha under a plan: data, tensor and pipeline parallel, sharded optimizer.

    python -m train.pangu                                          one device, a few minutes
    python -m train.pangu --plan data=2,tensor=2,pipeline=2,optimizer=zero1
    python -m train.pangu --plan search --devices 4                the plan that a search finds
    python -m train.pangu --help                                   everything that can be told

Writes metrics.jsonl and checkpoints into the output folder. Run again, it goes on where it was
stopped. Prints loss and perplexity on text that was held out. Several processes train one model
with --coordinator HOST:PORT --processes N --process-id I, or under srun or mpirun.
"""

import contextlib
import math

import numpy as np
from rich.console import Console

from cmjax.console import terminal
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.processes import is_first, meet, of_first
from train.metrics import read_metrics
from train.only_run import only_run
from train.pangu.config import PanguConfig
from train.pangu.run import held_out_loss, start, train


def main(config: PanguConfig, console: Console) -> None:
    """Train what is left to train, and test.

    Raises: ValueError: another run writes into the folder.
    """
    # The first process holds the folder for all of them.
    with only_run(config.out) if config.group.first else contextlib.nullcontext():
        run = start(config, console)
        console = of_first(console)
        train(run, console)
        loss = held_out_loss(run)
        if is_first():
            rate = np.median(
                [m["tokens_per_s"] for m in read_metrics(config.out / "metrics.jsonl")]
            )
            console.print(
                f"held-out loss {loss:.4f} nats, perplexity {math.exp(loss):.3f}; "
                f"{rate:,.0f} tokens/s",
                highlight=False,
            )
        meet("done")


if __name__ == "__main__":
    leave(run_program(lambda config: main(config, terminal()), PanguConfig, __doc__))
