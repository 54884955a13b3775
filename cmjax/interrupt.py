"""Ctrl-C and SIGTERM: what is being written is finished first, then one line is said.

    exit code 130 after Ctrl-C, 143 after SIGTERM, as a shell has them

A checkpoint is written by threads of Orbax; to leave while they work hangs or tears them apart.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_Handler = Callable[[int, FrameType | None], None]


class Terminated(KeyboardInterrupt):
    """SIGTERM came; as with Ctrl-C, no handler of errors stops it."""


@contextmanager
def raised_signals() -> Iterator[list[int]]:
    """Inside, Ctrl-C raises KeyboardInterrupt and SIGTERM `Terminated`, wherever the program is.

    A signal that is ignored, as under `nohup`, stays so.

    Yields: a list to which the number of every signal is added as it comes: what is imported in
      that moment may turn the exception into one of its own.
    """
    came: list[int] = []

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    with _handled_by(stop):
        yield came


@contextmanager
def left_at_once() -> Iterator[None]:
    """Inside, where modules are imported and nothing is written, a signal ends the process with its
    line: a library that an exception meets half imported prints a traceback of its own."""
    with _handled_by(_leave):
        yield


@contextmanager
def finished_first() -> Iterator[None]:
    """What is done inside is done to its end; Ctrl-C and SIGTERM take effect behind it."""
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    try:
        with _handled_by(remember):
            yield
    finally:
        if came:
            signal.raise_signal(came[0])


def leave_at_once() -> None:
    """From here on, a signal ends the process with its line, until another handler takes over. The
    line of a worker process is its parent's."""
    # who started a worker had it import the module; others start 10 ms sooner without
    processes = sys.modules.get("multiprocessing.process")
    # a worker has its name before it imports its modules, and its parent only then
    if processes is not None and processes.current_process().name != "MainProcess":
        leave_to_parent()
    else:
        _handle_by(_leave)


def leave(code: int) -> NoReturn:
    """End the process with a program's exit code.

    After a signal, Python is not taken down first: XLA may still compute, in threads of its own
    that then fall over what is gone (a segmentation fault in place of 130).
    """
    if code not in [128 + number for number in _SIGNALS]:
        sys.exit(code)
    workers = sys.modules.get("multiprocessing.util")
    if workers is not None:  # its semaphores outlive a process that says nothing
        workers._exit_function()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        with suppress(OSError):
            stream.flush()
    os._exit(code)


def leave_to_parent() -> None:
    """A worker process has nothing to say: Ctrl-C comes to all processes of a terminal, and the
    parent ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(number: int, frame: FrameType | None) -> None:
    """Handle a signal: one line, and the process ends."""
    os.write(2, b"terminated\n" if number == signal.SIGTERM else b"interrupted\n")
    os._exit(128 + number)


@contextmanager
def _handled_by(handler: _Handler) -> Iterator[None]:
    """Inside, signals that are not ignored go to `handler`; signals are the main thread's."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = _handle_by(handler)
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def _handle_by(handler: _Handler) -> dict[signal.Signals, Any]:
    """What handled the signals before, of those that now go to `handler`."""
    before = {n: signal.getsignal(n) for n in _SIGNALS}
    heeded = {n: earlier for n, earlier in before.items() if earlier is not signal.SIG_IGN}
    for number in heeded:
        signal.signal(number, handler)
    return heeded
