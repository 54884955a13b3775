"""How commands speak: a table for people, the same as JSON for machines, progress on stderr."""

import html
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from cmjax.files import replace_text

_WIDE = 150  # columns that the widest table needs
Progress = Callable[[int, int, str], None]
"""How long work says how far it is: `progress(done, total, note)`, with `done` up to `total` and a
note such as the best time so far, which may be empty."""


def exit_code(run: Callable[[], None]) -> int:
    """Run a program and say how it went, with one line on stderr if it failed.

    Returns: 0 for success, 1 for a failure of the machine (a full disk, say) or of a training that
      diverged, 2 for bad input, 130 after Ctrl-C.
    """
    try:
        run()
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `cmjax ... | head` has read enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - so that Python's own last flush is quiet
        return 1
    except (OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def terminal() -> Console:
    """A console on standard output: as wide as the terminal, or wide enough for every table where
    output goes to a file or a pipe, which rich would cut at 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=_WIDE)


def emit(console: Console, target: str | None, result: Any, *tables: Any) -> None:
    """Print the tables; write `result` as JSON to `target`. With `-` only the JSON is printed.

    `result` may be JSON text already. An existing file is replaced only by a complete one.
    """
    text = result.rstrip() if isinstance(result, str) else json.dumps(result, indent=1)
    if target == "-":
        print(text)
        return
    if target is not None:
        replace_text(target, text + "\n")
    for table in tables:
        console.print(table)


@contextmanager
def show_progress(description: str, *, quiet: bool = False) -> Iterator[Progress]:
    """A bar on stderr, moved by calls of what is yielded; a note takes the description's place."""
    with bar(quiet) as shown:
        task = shown.add_task(description, total=None)

        def progress(done: int, total: int, note: str) -> None:
            shown.update(task, total=total, completed=done, description=note or description)

        yield progress


def bar(quiet: bool) -> Bar:
    """A progress bar on stderr, so that stdout stays for results."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    hidden = quiet or not console.is_terminal  # a log file is no place for a moving bar
    return Bar(*columns, console=console, transient=True, disable=hidden)


def track[Item](items: Sequence[Item], description: str) -> Iterator[Item]:
    """Iterate with a progress bar."""
    with bar(quiet=False) as progress:
        yield from progress.track(items, description=description)


def html_table(title: str, rows: Iterable[Sequence[str]]) -> str:
    """A small table for a notebook: a caption, then rows of text, the first column a heading."""
    body = "".join(
        f"<tr><th style='text-align:left'>{html.escape(first)}</th>"
        + "".join(f"<td style='text-align:right'>{html.escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return f"<table><caption>{html.escape(title)}</caption>{body}</table>"


def check_target(*paths: Path | str | None) -> None:
    """Before long work: can these files be written?

    Raises: ValueError: the folder of one does not exist.
    """
    for path in _given(paths):
        if not path.parent.is_dir():
            raise ValueError(f"cannot write {path}: no folder {path.parent}")


def _given(paths: Iterable[Path | str | None]) -> Iterator[Path]:
    for path in paths:
        if path is not None and str(path) != "-":
            yield Path(path)
