"""`cmjax`: how fast a model runs on a supernode, where its experts live, and its text.

Every command prints a table; `--json -` prints the same as JSON and nothing else. Exit code 0 is
success, 1 a failure of the machine (a full disk, say), 2 bad input, with one line on stderr.
"""

import argparse
import difflib
import gc
import inspect
import itertools
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cmjax import commands
from cmjax.console import exit_code, terminal
from cmjax.interrupt import left_at_once
from cmjax.options import parsed
from cmjax.version import about

_COMMANDS = {
    "predict": ("Predict", "a serving instance: step time, TPOT or TTFT, tokens per second"),
    "place": ("Place", "where experts live, by the priced time of the MoE layer"),
    "parallel": ("Parallel", "how to split training: plans by time and memory"),
    "serve": ("Serve", "a request trace: TTFT, TPOT, goodput, queues, cache hits"),
    "plan": ("Plan", "how many NPUs for prefill and decode, for a trace and an SLO"),
    "price": ("Price", "any JAX function, on any machine"),
    "generate": ("Generate", "text from a model, on an emulated supernode"),
    "transcribe": ("Transcribe", "text from sound files, by a trained recognizer"),
    "export": ("Export", "a trained recognizer as ONNX, in int8"),
    "xl3m": ("XL3M", "an answer from a text longer than the model's window"),
    "validate": ("Validate", "predictions beside published measurements"),
    "fit": ("Fit", "a machine's constants, from micro-measurements"),
    "micro": ("Micro", "one kernel or one exchange, as vendors measure them"),
    "machines": ("Machines", "the catalog, and the source of every number in it"),
}
"""Subcommand -> its class in `cmjax.commands`, and what it gives."""

_MAY_BE_EMPTY = ("--prompt", "--system", "--question", "--without-ranks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the `cmjax` command; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="cmjax", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="versions, for a report")
    parsers = parser.add_subparsers(metavar="COMMAND ARGS", required=True, dest="command")
    for name, (_, gives) in _COMMANDS.items():
        parsers.add_parser(name, help=gives, add_help=False)
    if given and not given[0].startswith("-") and given[0] not in _COMMANDS:
        return exit_code(lambda: _refuse_command(given[0]))
    name = parser.parse_args(given[:1]).command

    def run() -> None:
        _refuse_empty(given[1:])
        with left_at_once(), _for_good():
            kind = getattr(commands, _COMMANDS[name][0])
        command = parsed(kind, given[1:], description=_description(kind), prog=f"cmjax {name}")
        with _rarely_collected():
            command.run(terminal())

    return exit_code(run)


class _Version(argparse.Action):
    """Prints versions, which are looked for when asked for."""

    def __call__(self, parser, *_):
        print(about())
        parser.exit()


@contextmanager
def _for_good() -> Iterator[None]:
    """What is imported inside lives as long as the process: the garbage collector walks it neither
    now nor later, which would be a third of the CPU time of a repeated prediction."""
    collected, before = gc.isenabled(), len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > before:
            gc.freeze()
        if collected:
            gc.enable()


@contextmanager
def _rarely_collected() -> Iterator[None]:
    """What is traced inside is many objects that are kept: looking through them for garbage after
    every 700 new ones is a sixth of the CPU time of a search for plans."""
    before = gc.get_threshold()
    gc.set_threshold(20_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _refuse_command(name: str) -> None:
    """Raise ValueError: there is no such command, and which ones are like it."""
    close = difflib.get_close_matches(name, _COMMANDS)
    meant = f"; perhaps {' or '.join(close)}?" if close else ""
    raise ValueError(f"no command {name!r}{meant} (cmjax --help)")


def _refuse_empty(arguments: Sequence[str]) -> None:
    """Raise ValueError for an argument without a letter where a name is wanted: as a path it would
    be the current folder, which nobody named."""
    for before, argument in itertools.pairwise(["", *arguments]):
        option, equals, value = argument.partition("=")
        if argument and not (option.startswith("--") and equals and not value):
            continue
        option = option if argument else before
        if option not in _MAY_BE_EMPTY:
            what = option if option.startswith("--") else "an argument"
            raise ValueError(f"{what} is empty; give it a value, or leave it out")


def _description(kind: type) -> str:
    """The first sentence of a docstring: tyro does not wrap what is longer than a line."""
    return (inspect.getdoc(kind) or "").partition("\n\n")[0]
