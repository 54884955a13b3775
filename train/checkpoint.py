"""Checkpoints that are whole or not there: arrays by Orbax, and beside them what they belong to.

    FOLDER/00000012/arrays/    pytree of arrays (Orbax); 12 counts the checkpoints of the run
    FOLDER/00000012/run.json   configuration and progress

A checkpoint is written under another name and renamed when it is complete; only then are older ones
deleted. A kill or a full disk leaves the last good one.
"""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

_PARTIAL = ".partial"


class SaveFailed(OSError):
    """A checkpoint could not be written; the older one is untouched."""


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

    def arrays(self, like: Any) -> Any:
        """The arrays in a pytree of the structure, shapes and dtypes of `like`."""
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=_first_device()), like
        )
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore((self.path / "arrays").absolute(), abstract)
        # Not bound to the device they were read to: the run may spread them over several.
        return jax.tree.map(jnp.asarray, jax.device_get(arrays))

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
    keep: int = 1,
) -> Path:
    """Write a checkpoint and delete all but the last `keep`.

    Raises:
      SaveFailed: the disk is full or not writable; older checkpoints are left as they are.
    """
    earlier = _complete(folder)
    target = folder / f"{int(earlier[-1].name) + 1 if earlier else 0:08}"
    partial = target.with_suffix(_PARTIAL)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((partial / "arrays").absolute(), arrays)
        (partial / "run.json").write_text(json.dumps({"config": config, "progress": progress}))
        os.replace(partial, target)
    except (OSError, ValueError) as error:  # Orbax reports a full disk as either
        shutil.rmtree(partial, ignore_errors=True)
        good = f"the last good one is {earlier[-1]}" if earlier else "there is no earlier one"
        raise SaveFailed(f"checkpoint {target} could not be written ({error}); {good}") from error
    for old in _complete(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def latest(folder: Path) -> SavedRun | None:
    """The last complete checkpoint, or None; what a kill left half-written is not one."""
    complete = _complete(folder)
    if not complete:
        return None
    record = json.loads((complete[-1] / "run.json").read_text())
    return SavedRun(complete[-1], record["config"], record["progress"])


def _complete(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(
        path for path in folder.iterdir() if path.name.isdigit() and (path / "run.json").is_file()
    )


def _first_device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def _differences(theirs: Any, ours: Any, name: str = ""):
    if isinstance(theirs, dict) and isinstance(ours, dict):
        for key in sorted({*theirs, *ours}):
            inner = f"{name}.{key}" if name else key
            yield from _differences(theirs.get(key), ours.get(key), inner)
    elif theirs != ours:
        yield name, theirs, ours
