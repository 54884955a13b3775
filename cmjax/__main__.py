"""The command `cmjax`, also `python -m cmjax`: from here on, a signal is one line."""

from typing import NoReturn

from cmjax.interrupt import leave, leave_at_once

leave_at_once()  # while modules are imported; then `cmjax.console.exit_code` takes over

from cmjax import cli  # noqa: E402 - behind the handlers


def main() -> NoReturn:
    """Run the command of `sys.argv`, and end the process with its exit code."""
    leave(cli.main())


if __name__ == "__main__":
    main()
