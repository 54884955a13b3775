"""The command `cmjax`, also `python -m cmjax`: from here on, a signal is one line."""

import os
import signal
import sys
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    """While modules are imported; then `cmjax.console.exit_code` takes over."""
    os.write(2, b"terminated\n" if number == signal.SIGTERM else b"interrupted\n")
    os._exit(128 + number)


for _number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(_number) is not signal.SIG_IGN:
        signal.signal(_number, _leave)

from cmjax.cli import main  # noqa: E402 - behind the handlers

if __name__ == "__main__":
    sys.exit(main())
