"""Checkpoints that are whole or not there: arrays by Orbax, and beside them what they belong to.

    FOLDER/00000012/arrays/       pytree of arrays (Orbax); 12 counts the checkpoints of the run
    FOLDER/00000012/run.json      configuration and progress
    FOLDER/00000012/SHA256SUMS    of every file, as `sha256sum -c` reads them

A checkpoint is written under another name, brought to the disk, and renamed when it is complete;
only then are older ones deleted, but for the one before. A kill or a full disk leaves the last good
one. A checkpoint that was damaged later is passed over for the one before, and a line says so.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from cmjax.inputs import parse_json
from cmjax.interrupt import finished_first
from cmjax.processes import is_first, meet

_PARTIAL = ".partial"
_SUMS = "SHA256SUMS"
KEPT = 2
"""Checkpoints that a run keeps: one to fall back to."""


class SaveFailed(OSError):
    """A checkpoint could not be written; the older one is untouched."""


class Damaged(ValueError):
    """No checkpoint of a run can be read; the message says what is wrong with which file."""


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """A run as a checkpoint on disk has it.

    Attributes:
      path: its folder.
      config: configuration of the run that wrote it.
      progress: where the run was; what the writer gave.
    """

    path: Path
    config: dict[str, Any]
    progress: dict[str, Any]

    def arrays(self, like: Any, *, placed: bool = False) -> Any:
        """The arrays in a pytree of the structure, shapes and dtypes of `like`; `placed`, on the
        devices, of any number of processes, that `like` is on.

        Raises: Damaged: they cannot be read, or are others.
        """
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=x.sharding if placed else _first_device()
            ),
            like,
        )
        try:
            with finished_first(), ocp.StandardCheckpointer() as checkpointer:
                arrays = checkpointer.restore((self.path / "arrays").absolute(), abstract)
        except Exception as error:  # Orbax and TensorStore have dozens of their own
            said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise Damaged(f"{self.path / 'arrays'} cannot be read: {said}") from error
        if placed:
            return arrays
        # Not bound to the device they were read to: the run may spread them over several.
        return jax.tree.map(jnp.asarray, jax.device_get(arrays))

    def count(self, name: str, most: int) -> int:
        """A number of the progress, from 0 to `most`.

        Raises: Damaged: it is none.
        """
        value = self.progress.get(name)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise Damaged(f"{self.path / 'run.json'}: {name} must be 0 to {most}, got {value!r}")
        return value

    def check_config(self, config: dict[str, Any], *, ignore: tuple[str, ...] = ()) -> None:
        """Refuse another configuration.

        Raises:
          ValueError: names every field that differs, with both values.
        """
        different = [
            f"{name}: {theirs!r} there, {ours!r} here"
            for name, theirs, ours in _differences(self.config, config)
            if name.split(".")[0] not in ignore
        ]
        if different:
            raise ValueError(
                f"the checkpoint {self.path} is of another configuration ({'; '.join(different)}); "
                "use that configuration, or another folder"
            )


def save(
    folder: Path,
    arrays: Any,
    *,
    config: dict[str, Any],
    progress: dict[str, Any],
    keep: int = KEPT,
) -> Path:
    """Write a checkpoint and delete all but the last `keep`; Ctrl-C and SIGTERM wait for it. Of
    several processes each writes its part of the arrays, into a folder that all of them see.

    Raises:
      SaveFailed: the disk is full or not writable; older checkpoints are left as they are.
    """
    with finished_first():
        earlier = _numbered(folder)
        target = folder / f"{int(earlier[-1].name) + 1 if earlier else 0:08}"
        partial = target.with_suffix(_PARTIAL)
        try:
            meet("checkpoint: numbered")
            if is_first():
                folder.mkdir(parents=True, exist_ok=True)
                shutil.rmtree(partial, ignore_errors=True)
                partial.mkdir()
            meet("checkpoint: begun")
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save((partial / "arrays").absolute(), jax.tree.map(_shared, arrays))
            if is_first():
                record = json.dumps({"config": config, "progress": progress})
                (partial / "run.json").write_text(record)
                _seal(partial)
                os.replace(partial, target)
                _to_disk(folder)
            meet("checkpoint: written")
        except (OSError, ValueError) as error:  # Orbax reports a full disk as either
            shutil.rmtree(partial, ignore_errors=True)
            good = f"the last good one is {earlier[-1]}" if earlier else "there is no earlier one"
            raise SaveFailed(
                f"checkpoint {target} could not be written ({error}); {good}"
            ) from error
        if not is_first():
            return target
        whole = [path for path in earlier if _problem(path, contents=False) is None]
        for old in set(earlier) - set(whole[len(whole) - keep + 1 :] if keep > 1 else ()):
            shutil.rmtree(old)
    return target


def latest(folder: Path, say: Callable[[str], None] | None = None) -> SavedRun | None:
    """The last whole checkpoint, or None; what a kill left half-written is not one.

    Args:
      folder: of the checkpoints.
      say: is told of a damaged one that is passed over; by default, on standard error.
    Raises:
      Damaged: there are checkpoints, and none is whole.
    """
    problems = []
    for path in reversed(_numbered(folder)):
        problem = _problem(path)
        if problem is None:
            if problems:
                (say or _on_stderr)(f"{'; '.join(problems)}: going back to {path}")
            record = parse_json((path / "run.json").read_text(encoding="utf-8"), "")
            return SavedRun(path, record["config"], record["progress"])
        problems.append(problem)
    if problems:
        raise Damaged(f"no whole checkpoint: {'; '.join(problems)}; delete {folder} to begin anew")
    return None


def _problem(path: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, in a line, or None."""
    run = path / "run.json"
    try:
        record = parse_json(run.read_text(encoding="utf-8"), "")
        if not all(isinstance(record[name], dict) for name in ("config", "progress")):
            return f"{run} has no configuration and progress"
        if (path / _SUMS).is_file():
            return _difference(path, contents)
    except OSError as error:
        return f"{error.filename} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, RecursionError):
        return f"{run} is empty" if not run.stat().st_size else f"{run} is damaged: no JSON"
    # Of a version that wrote no checksums.
    return None if (path / "arrays").is_dir() else f"{path / 'arrays'} is missing"


def _difference(path: Path, contents: bool) -> str | None:
    """The first file that is not as the checkpoint's checksums have it; sizes alone, if asked."""
    listed, text = {_SUMS}, (path / _SUMS).read_text(encoding="utf-8", errors="replace")
    if text and not text.endswith("\n"):
        return f"{path / _SUMS} is truncated"
    for line in text.splitlines():
        digest, _, name = line.partition("  ")
        if digest == "# bytes":
            size, _, name = name.partition("  ")
            there = (path / name).stat().st_size
            if str(there) != size:
                return f"{path / name} has {there} of {size} bytes"
        else:
            listed.add(name)
            if contents and _digest(path / name) != digest:
                return f"{path / name} is not what was written: its checksum differs"
    there = {p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file()}
    if there != listed:
        return f"{path / _SUMS} does not list {', '.join(sorted(there - listed)[:3])}"
    return None


def _seal(folder: Path) -> None:
    """Write checksums of all files, and bring everything to the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path: path.relative_to(folder).as_posix() for path in files}
    text = "".join(f"# bytes  {path.stat().st_size}  {name}\n" for path, name in names.items())
    text += "".join(f"{_digest(path)}  {name}\n" for path, name in names.items())
    (folder / _SUMS).write_text(text)
    for path in (*files, folder / _SUMS):
        _to_disk(path)
    for path in (*(p for p in folder.rglob("*") if p.is_dir()), folder):
        _to_disk(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _to_disk(path: Path) -> None:
    """fsync a file or a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _numbered(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    numbered = (p for p in folder.iterdir() if p.name.isascii() and p.name.isdigit())
    return sorted((path for path in numbered if path.is_dir()), key=lambda path: int(path.name))


def _on_stderr(text: str) -> None:
    print(text, file=sys.stderr)


def _shared(x: Any) -> Any:
    """An array as several processes save it: what each has for itself, the first one writes."""
    own = isinstance(x, jax.Array) and x.is_fully_addressable and jax.process_count() > 1
    return np.asarray(x) if own else x


def _first_device():
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _differences(theirs: Any, ours: Any, name: str = ""):
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            inner = f"{name}.{key}" if name else key
            yield from _differences(theirs.get(key), ours.get(key), inner)
    elif theirs != ours:
        yield name, theirs, ours
