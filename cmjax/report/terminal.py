"""The console that programs print on."""

from rich.console import Console

_WIDE = 150  # columns that the widest table needs


def terminal() -> Console:
    """A console on standard output: as wide as the terminal, or wide enough for every table where
    output goes to a file or a pipe, which rich would cut at 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)
