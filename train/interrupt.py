"""Ctrl-C and SIGTERM in a training: what is being written is finished first, then one line is said.

    exit code 130 after Ctrl-C, 143 after SIGTERM, as a shell has them

A checkpoint is written by threads of Orbax; to leave while they work hangs or tears them apart.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from cmjax.console import exit_code

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Terminated(KeyboardInterrupt):
    """SIGTERM came; as with Ctrl-C, no handler of errors stops it."""


def training_exit_code(run: Callable[[], None]) -> int:
    """`cmjax.console.exit_code` of a training: 143 after SIGTERM, besides."""
    terminated = False

    def guarded() -> None:
        nonlocal terminated
        try:
            run()
        except Terminated:
            terminated = True

    if not _in_main_thread():
        return exit_code(run)
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        code = exit_code(guarded)
    finally:
        signal.signal(signal.SIGTERM, before)
    if terminated:
        print("terminated", file=sys.stderr)
        return 128 + signal.SIGTERM
    return code


@contextmanager
def finished_first() -> Iterator[None]:
    """What is done inside is done to its end; Ctrl-C and SIGTERM take effect behind it."""
    if not _in_main_thread():  # signals are the main thread's
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


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
