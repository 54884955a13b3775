"""One run at a time in an output folder: two would write over each other's checkpoints."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from cmjax.files import lock_file

FILE = ".running"


@contextlib.contextmanager
def only_run(out: Path) -> Iterator[None]:
    """Inside, the folder is this run's. The lock goes with the process, however that ends.

    Raises: ValueError: another process is running in it; OSError: it cannot be made.
    """
    out.mkdir(parents=True, exist_ok=True)
    with (out / FILE).open("a+", encoding="utf-8") as file:
        if not lock_file(file):
            file.seek(0)
            other = file.read(20).strip() or "?"
            raise ValueError(
                f"--out {out}: another run writes there (process {other}); wait for it, or "
                "name another folder"
            )
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        try:
            yield
        finally:
            if [path.name for path in out.iterdir()] == [FILE]:  # nothing came of it
                (out / FILE).unlink()
                out.rmdir()
