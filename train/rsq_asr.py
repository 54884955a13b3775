"""Train a speech recogniser in float32, then quantization-aware for int8-Winograd convolutions.

    python -m train.rsq_asr                                        synthetic digits, a few minutes
    python -m train.rsq_asr --data fsdd --data-dir FOLDER          Free Spoken Digit Dataset
    python -m train.rsq_asr --help                                 everything that can be told

Prints error rates of the float32 and the integer network, and writes metrics.jsonl, results.json,
errors.json and checkpoints into the output folder. Run again, it goes on where it was stopped.
Several processes train one network with --devices N --coordinator HOST:PORT --processes N
--process-id I, or under srun or mpirun.
"""

import contextlib
from collections.abc import Sequence

import jax
from rich.console import Console
from rich.table import Table

from cmjax.console import terminal
from cmjax.interrupt import leave
from cmjax.options import run_program
from cmjax.processes import meet, of_first
from train.asr.config import Config
from train.asr.evaluate import Result
from train.asr.run import measure, start, train, write_recognizer
from train.only_run import only_run


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code: 0, 1 if training or saving failed, 2 for bad input,
    130 after Ctrl-C, 143 after SIGTERM."""

    def train(config: Config) -> None:
        train_and_test(config, terminal())

    return run_program(train, Config, __doc__, arguments)


def train_and_test(config: Config, console: Console) -> None:
    """Train what is left to train, test, and print the results.

    Raises: ValueError: another run writes into the folder.
    """
    # The first process holds the folder for all of them.
    writes = config.group.first and (config.out.is_dir() or not config.evaluate_only)
    with only_run(config.out) if writes else contextlib.nullcontext():
        config.group.join(config.devices)
        console = of_first(console)
        if config.compiled is not None:
            jax.config.update("jax_compilation_cache_dir", str(config.compiled.absolute()))
        run = start(config, console)
        if config.evaluate_only:
            write_recognizer(run)
        else:
            train(run, console)
        console.print(results_table(measure(run)))
        meet("done")


def results_table(results: dict[str, dict[str, Result]]) -> Table:
    """Error rates by arithmetic and test set."""
    table = Table(
        title="Error rates",
        caption="S/D/I: words substituted, deleted, inserted; exact: utterances without an error; "
        "speed: seconds of speech per second",
    )
    for column in ("arithmetic", "test set"):
        table.add_column(column, no_wrap=True)
    for column in ("words", "WER, %", "S/D/I", "exact, %", "speed"):
        table.add_column(column, justify="right", no_wrap=True)
    for precision, by_set in results.items():
        for name, result in by_set.items():
            words = result.words
            table.add_row(
                precision,
                name,
                str(words.length),
                f"{100 * words.rate:.2f}",
                f"{words.substitutions}/{words.deletions}/{words.insertions}",
                f"{100 * words.exact:.2f}",
                f"{result.seconds / result.compute_s:.0f}",
            )
    return table


if __name__ == "__main__":
    leave(main())
