"""Writing files so that a reader never meets half of one."""

import os
from pathlib import Path


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8; see `replace_bytes`."""
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: str | Path, data: bytes) -> None:
    """Write `data`; an existing file is replaced only once the new one is complete.

    The bytes go to a temporary file in the same folder, which is then renamed over `path`. A path
    that is no regular file (`/dev/stdout`, a pipe) is written to directly.

    Raises: OSError if the folder is missing or the disk full; `path` is then as it was.
    """
    path = Path(path).resolve()  # a link stays a link: what it points to is replaced
    if path.exists() and not path.is_file():
        path.write_bytes(data)
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
