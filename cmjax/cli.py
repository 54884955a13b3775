"""`cmjax`: price programs, predict deployments, calibrate, validate, place experts.

Every command prints a table; `--json -` prints the same as JSON and nothing else. Exit code 0 is
success, 1 a failure of the machine (a full disk, say), 2 bad input, with one line on stderr.
"""

import sys
from typing import Annotated

import tyro

from cmjax.commands import Fit, Machines, Micro, Place, Predict, Price, Validate
from cmjax.console import exit_code
from cmjax.report import terminal

_Command = (
    Annotated[Price, tyro.conf.subcommand("price")]
    | Annotated[Predict, tyro.conf.subcommand("predict")]
    | Annotated[Micro, tyro.conf.subcommand("micro")]
    | Annotated[Fit, tyro.conf.subcommand("fit")]
    | Annotated[Validate, tyro.conf.subcommand("validate")]
    | Annotated[Place, tyro.conf.subcommand("place")]
    | Annotated[Machines, tyro.conf.subcommand("machines")]
)


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the `cmjax` command; returns the exit code."""
    command = tyro.cli(_Command, args=arguments, prog="cmjax", description=__doc__)
    return exit_code(lambda: command.run(terminal()))


if __name__ == "__main__":
    sys.exit(main())
