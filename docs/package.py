"""A hook of mkdocs: lays out the sources as an installation does, where models/ is cmjax.models.

mkdocstrings reads sources without importing them, and so looks for a package's folders on disk.
"""

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "out/package/cmjax"


def on_startup(command: str, dirty: bool) -> None:
    """Link every part of the library into one folder."""
    shutil.rmtree(PACKAGE.parent, ignore_errors=True)
    PACKAGE.mkdir(parents=True)
    for part in (*(ROOT / "cmjax").iterdir(), ROOT / "models"):
        (PACKAGE / part.name).symlink_to(part)
