"""Ctrl-C and SIGTERM: what is being written is finished first, then one line is said.

    exit code 130 after Ctrl-C, 143 after SIGTERM, as a shell has them

A checkpoint is written by threads of Orbax; to leave while they work hangs or tears them apart.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
    if not _in_main_thread():  # signals are the main thread's
        yield came
        return

    def stop(number: int, frame: FrameType | None) -> None:
        came.append(number)
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    before = {n: signal.getsignal(n) for n in _SIGNALS}
    heeded = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
    try:
        for number in heeded:
            signal.signal(number, stop)
        yield came
    finally:
        for number in heeded:
            signal.signal(number, before[number])


@contextmanager
def left_at_once() -> Iterator[None]:
    """Inside, where modules are imported and nothing is written, a signal ends the process with its
    line: a library that an exception meets half imported prints a traceback of its own."""
    if not _in_main_thread():
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:
        os.write(2, b"terminated\n" if number == signal.SIGTERM else b"interrupted\n")
        os._exit(128 + number)

    before = {n: signal.getsignal(n) for n in _SIGNALS}
    heeded = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
    try:
        for number in heeded:
            signal.signal(number, leave)
        yield
    finally:
        for number in heeded:
            signal.signal(number, before[number])


@contextmanager
def finished_first() -> Iterator[None]:
    """What is done inside is done to its end; Ctrl-C and SIGTERM take effect behind it."""
    if not _in_main_thread():
        yield
        return
    came: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        came.append(number)

    before = {number: signal.signal(number, remember) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            signal.raise_signal(came[0])


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
