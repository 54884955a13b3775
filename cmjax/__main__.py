"""The command `cmjax`, also `python -m cmjax`: from here on, a signal is one line."""

import sys

from cmjax.interrupt import leave_at_once

leave_at_once()  # while modules are imported; then `cmjax.console.exit_code` takes over

from cmjax.cli import main  # noqa: E402 - behind the handlers

if __name__ == "__main__":
    sys.exit(main())
