"""Text files: within a budget of bytes, UTF-8 whatever the locale."""

from pathlib import Path

MOST_BYTES = 200_000_000
"""Larger than any text that is read whole: the index of 100,000 tensors takes 10 MB."""
_MOST_SAID = 300


def read_bytes(
    path: str | Path, *, most_bytes: int = MOST_BYTES, source: str | None = None
) -> bytes:
    """What a file holds.

    Args:
      path: of a file, a pipe or a device.
      most_bytes: no more are read.
      source: what messages call it (default: `path`).
    Raises: ValueError: it cannot be read, or holds more.
    """
    source = str(path) if source is None else source
    try:
        with Path(path).open("rb") as file:
            data = file.read(most_bytes + 1)
    except OSError as error:
        raise ValueError(f"{source}: cannot be read: {error.strerror}") from None
    except ValueError as error:  # a zero byte in its name
        raise ValueError(f"{source!r}: cannot be read: {error}") from None
    if len(data) > most_bytes:
        raise ValueError(f"{source}: has more than the {most_bytes:,} bytes that are read")
    return data


def read_text(path: str | Path, *, most_bytes: int = MOST_BYTES, source: str | None = None) -> str:
    """The text of a file without its byte-order mark; line ends are as they are there.

    Args: as of `read_bytes`.
    Raises: ValueError: as `read_bytes` does; bytes that are no UTF-8, with their line.

    >>> import tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".txt") as file:
    ...     _ = file.write(b"\\xef\\xbb\\xbf\\xc2\\xb5s") and file.flush()
    ...     read_text(file.name)
    'µs'
    """
    data = read_bytes(path, most_bytes=most_bytes, source=source)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        source = str(path) if source is None else source
        raise ValueError(
            f"{source}: cannot be read: line {line} is not UTF-8 (byte 0x{data[error.start]:02x})"
        ) from None


def in_one_line(error: BaseException) -> str:
    """What an exception says, as a line of bounded length; its kind where it says nothing."""
    said = " ".join(str(error).split()) or type(error).__name__
    return said if len(said) <= _MOST_SAID else f"{said[: _MOST_SAID - 3]}..."
