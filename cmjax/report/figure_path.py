"""Where a figure can be written, known before anything that draws is loaded."""

from pathlib import Path

from cmjax.files import check_writable

SUFFIXES = (".png", ".svg")


def checked_path(path: str | Path) -> Path:
    """`path`, if a figure can be written there.

    Raises: ValueError for a suffix other than .png or .svg, or a folder that does not exist.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        found = repr(path.suffix) if path.suffix else "no suffix"
        raise ValueError(f"{path}: figures are written as {' or '.join(SUFFIXES)}, got {found}")
    check_writable(path)
    return path
