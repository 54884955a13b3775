"""How commands speak: a table for people, the same as JSON for machines, progress on stderr, and
one line where something is wrong."""

import codecs
import html
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar

from cmjax.files import check_writable, replace_text
from cmjax.interrupt import Terminated, raised_signals
from cmjax.version import about

_WIDE = 150  # columns that the widest table needs
_PLAIN = {
    "→": "->", "←": "<-", "µ": "u", "μ": "u", "×": "x", "±": "+-", "…": "...", "≤": "<=", "≥": ">=",
    "≈": "~", "·": "*", "−": "-", "–": "-", "—": "-", "‘": "'", "’": "'", "“": '"', "”": '"',
    "█": "#", "▏": "|", "━": "-", "╸": "-", "╺": "-", "²": "2",
}  # fmt: skip
"""Symbols as a terminal without them shows them; others are escaped."""
Progress = Callable[[int, int, str], None]
"""How long work says how far it is: `progress(done, total, note)`, with `done` up to `total` and a
note such as the best time so far, which may be empty."""


class UsersFault(ValueError):
    """A program that a user gave failed; `lines` are those of its traceback, shown before the
    message."""

    def __init__(self, message: str, lines: str):
        super().__init__(message)
        self.lines = lines


def exit_code(run: Callable[[], None]) -> int:
    """Run a program and say how it went, with one line on stderr if it failed.

    Returns: 0 for success, 1 for a failure of the machine (a full disk, say), of a training that
      diverged or of cmjax itself, whose traceback goes to a file that the line names; 2 for bad
      input; 130 after Ctrl-C, 143 after SIGTERM.
    """
    _speak_any_encoding()
    with raised_signals() as came:
        try:
            run()
            if sys.stdout is not None:
                sys.stdout.flush()
            return 0
        except KeyboardInterrupt as error:
            return _stopped(isinstance(error, Terminated))
        except Exception as error:
            expected = isinstance(error, ValueError | OSError | FloatingPointError)
            if came and not expected:  # what was being imported, say, fell over it
                return _stopped(came[0] != 2)
            return _failed(error)


def _stopped(terminated: bool) -> int:
    _say("terminated" if terminated else "interrupted")
    return 143 if terminated else 130


def _failed(error: Exception) -> int:
    """Say what is wrong in one line; the exit code."""
    said = " ".join(str(error).split())
    if isinstance(error, UsersFault) and error.lines:
        _say(error.lines)
    if isinstance(error, ValueError):
        _say(f"error: {said or type(error).__name__}")
        return 2
    if isinstance(error, OverflowError):
        _say(f"error: a number is too large to compute with: {said}")
        return 2
    if isinstance(error, RecursionError):
        _say("error: what is given is nested too deeply")
        return 2
    if isinstance(error, RuntimeError) and "Unable to initialize backend" in said:
        _say(f"error: JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: {said}")
        return 2
    if isinstance(error, OSError):
        _forget_stdout()  # so that Python's own last flush is quiet
        if not isinstance(error, BrokenPipeError):  # `cmjax ... | head` has read enough
            _say(f"error: {said or type(error).__name__}")
        return 1
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in said:
        _say(f"error: not enough memory{f': {said}'[:200] if said else ''}")
        return 1
    if isinstance(error, FloatingPointError):
        _say(f"error: {said}")
        return 1
    _say(
        f"error: cmjax itself failed ({type(error).__name__}: {said[:200]}); please report it with "
        f"{_logged(error)}"
    )
    return 1


def _logged(error: Exception) -> str:
    """Where the traceback of a fault of cmjax was written."""
    text = "".join(traceback.format_exception(error))
    try:
        with tempfile.NamedTemporaryFile(
            "w", prefix="cmjax-", suffix=".log", delete=False, encoding="utf-8", errors="replace"
        ) as file:
            file.write(f"{about()}\n{sys.argv}\n\n{text}")
    except OSError:
        return "what you did: its traceback could not be written"
    return file.name


def _say(line: str) -> None:
    if sys.stderr is not None:
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


def _forget_stdout() -> None:
    """Where standard output cannot be written, nothing more is."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _speak_any_encoding() -> None:
    """A terminal that lacks a symbol shows another one, and no program ends for it."""
    codecs.register_error("cmjax-plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="cmjax-plain")


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError), error
    there = error.object[error.start : error.end]
    escaped = (c.encode("ascii", "backslashreplace").decode() for c in there)
    shown = (_PLAIN.get(c, e) for c, e in zip(there, escaped, strict=True))
    return "".join(shown), error.end


def terminal() -> Console:
    """A console on standard output: as wide as the terminal, or wide enough for every table where
    output goes to a file or a pipe, which rich would cut at 80 columns.

    What it prints is shown as it is: names of users' files and machines are no markup.

    Raises: OSError: standard output is closed, and nothing would be delivered.
    """
    if sys.stdout is None:
        raise OSError("standard output is closed")
    console = Console(markup=False, emoji=False)
    return console if console.is_terminal else Console(width=_WIDE, markup=False, emoji=False)


def log() -> Console:
    """A console on standard error, for what is said beside results."""
    return Console(stderr=True, markup=False, emoji=False)


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
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
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
    """Before long work: can these files be written? `-` and `None` are none.

    Raises: ValueError: one cannot, as `cmjax.files.check_writable` says, or two are the same file.
    """
    given = [Path(path) for path in paths if path is not None and str(path) != "-"]
    for number, path in enumerate(given):
        check_writable(path)
        if os.path.realpath(path) in map(os.path.realpath, given[:number]):
            raise ValueError(f"cannot write {path}: two outputs are written there")
