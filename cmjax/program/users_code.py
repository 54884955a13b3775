"""A user's own program: what goes wrong in it is shown by their lines of the traceback.

Code that `cmjax price` is given is trusted and runs; what it raises, or that it ends the process,
is no fault of this library.
"""

import sysconfig
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cmjax.console import UsersFault

_FRAMES, _LINES = 3, 3
_OURS = (str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "models"))
_LIBRARIES = tuple(
    folder for name, folder in sysconfig.get_paths().items() if name.endswith(("lib", "stdlib"))
)


@contextmanager
def users_code(target: str) -> Iterator[None]:
    """Inside, code of a user runs.

    Raises: UsersFault: it fails, or calls `sys.exit`. What this library refuses in it passes as it
      is.
    """
    try:
        yield
    except SystemExit as error:
        raise UsersFault(f"program {target!r}: it ends with sys.exit({error.code!r})", "") from None
    except SyntaxError as error:
        shown = "".join(traceback.format_exception_only(error)[:-1]).rstrip()
        raise UsersFault(
            f"program {target!r}: {type(error).__name__}: {error.msg}", shown
        ) from None
    except Exception as error:
        frames = [
            (frame, _is_users(frame.filename))
            for frame in traceback.extract_tb(error.__traceback__)
        ]
        theirs = [frame for frame, users in frames if users]
        if not theirs or (isinstance(error, ValueError) and not frames[-1][1]):
            raise
        said = [line for line in str(error).splitlines() if line.strip()][:_LINES]
        shown = "".join(traceback.format_list(theirs[-_FRAMES:])).rstrip()
        raise UsersFault(
            f"program {target!r}: {type(error).__name__}: {' '.join(said)}", shown
        ) from error


def _is_users(file: str) -> bool:
    return not file.startswith(("<frozen", *_OURS, *_LIBRARIES))
