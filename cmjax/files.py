"""Writing files so that a reader never meets half of one, and where they are kept between runs."""

import contextlib
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import platformdirs

try:
    import fcntl
except ImportError:  # a system without: nothing is locked there
    fcntl = None


def replace_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8; see `replaced`."""
    replace_bytes(path, text.encode("utf-8", errors="surrogateescape"))


def replace_bytes(path: str | Path, data: bytes) -> None:
    """Write `data`; see `replaced`."""
    with replaced(path) as file:
        file.write(data)


@contextlib.contextmanager
def replaced(path: str | Path) -> Iterator[IO[bytes]]:
    """A file to write; what was at `path` is replaced only once the new one is complete.

    The bytes go to a temporary file in the same folder, which is brought to the disk and then
    renamed over `path`; what writers that were killed left there is removed. A link stays a link:
    what it points to is replaced. A path that is no regular file (`/dev/stdout`, a pipe) is written
    to directly.

    Raises: OSError if the folder is missing or the disk full; `path` is then as it was.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            yield file
        return
    _remove_abandoned(path.parent)
    temporary, file = _new_temporary(path.parent)
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            if path.exists():
                shutil.copymode(path, temporary)
            if fcntl is None:
                file.close()  # such a system renames no open file
            temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _new_temporary(folder: Path) -> tuple[Path, IO[bytes]]:
    """A file that is this process's as long as it is open."""
    while True:
        path = folder / f".cmjax-{os.getpid()}-{os.urandom(4).hex()}.tmp"
        file = path.open("xb")
        try:
            locked = lock_file(file)
        except OSError:  # a file system without locks
            return path, file
        if locked and os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # before it was locked, another process took it for abandoned


def _remove_abandoned(folder: Path) -> None:
    for path in folder.glob(".cmjax-*.tmp"):
        with contextlib.suppress(OSError), path.open("r+b") as file:  # OSError: another user's
            if lock_file(file):
                path.unlink()


def lock_file(file: IO) -> bool:
    """Lock an open file; the lock goes with its last descriptor, however the process ends.

    Returns: whether no other process holds it.
    Raises: OSError: its file system has no locks.
    """
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def check_writable(path: str | Path) -> None:
    """Before long work: can a file be written there?

    Raises: ValueError: its folder does not exist, it is a folder itself, its name is too long, its
      links lead in a circle, or this user may not write there.
    """
    path = Path(path)
    try:
        about = path.stat()
    except FileNotFoundError:
        folder = Path(os.path.realpath(path)).parent
        if not folder.is_dir():
            raise ValueError(f"cannot write {path}: the folder {folder} does not exist") from None
        if not os.access(folder, os.W_OK):
            raise ValueError(f"cannot write {path}: no right to write into {folder}") from None
        return
    except NotADirectoryError:
        raise ValueError(f"cannot write {path}: the folder {path.parent} does not exist") from None
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror}") from None
    except ValueError as error:  # a zero byte
        raise ValueError(f"cannot write {str(path)!r}: {error}") from None
    if stat.S_ISDIR(about.st_mode):
        raise ValueError(f"cannot write {path}: it is a folder")
    if not os.access(path, os.W_OK):
        raise ValueError(f"cannot write {path}: no right to write it")


def cache_folder() -> Path | None:
    """The user's folder for what is kept between runs, made if it is not there.

    The environment variable `CMJAX_CACHE` names another one, or is `off`.

    Returns: `None` where nothing is kept: it is off, cannot be made, or others may write there.
    """
    named = os.environ.get("CMJAX_CACHE", "")
    if named == "off":
        return None
    folder = Path(named) if named else Path(platformdirs.user_cache_dir("cmjax")) / "programs"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        about = folder.stat()
    except OSError:
        return None
    if hasattr(os, "getuid") and (
        about.st_uid != os.getuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    ):
        return None
    return folder
