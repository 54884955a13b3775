"""Which tensors lie in a checkpoint folder, and in which of its files."""

from pathlib import Path, PurePosixPath, PureWindowsPath

import msgspec

from cmjax.inputs import listed as shortened
from cmjax.models.moe.checkpoint.json_file import convert, read_object
from cmjax.models.moe.checkpoint.safetensor_file import StoredTensor, list_tensors

INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def list_folder(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder: of the shards its index names; without an index, of
    model.safetensors; without that, of all its safetensors files.

    Raises:
      ValueError: no file, a file that is missing, damaged or outside the folder, a tensor that its
        file does not have, or one that two files have (stale shards beside new ones).
    """
    index, whole = folder / INDEX, folder / WHOLE
    if index.exists():
        return _indexed(folder, index)
    files = [whole] if whole.exists() else sorted(folder.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{folder}: no .safetensors file in this folder")
    found: dict[str, StoredTensor] = {}
    for file in files:
        add_distinct(found, list_tensors(file))
    return found


def add_distinct(found: dict[str, StoredTensor], more: dict[str, StoredTensor]) -> None:
    """Take in more tensors.

    Raises: ValueError: one is there already; names it and both files.
    """
    twice = [name for name in more if name in found]
    if twice:
        one, other = found[twice[0]].path, more[twice[0]].path
        files = f"{one.name} and in {other.name}" if one != other else f"{one.name}, in two forms"
        raise ValueError(
            f"{one.parent}: {len(twice):,} tensors are in {files}: {shortened(twice)}; remove the "
            "file that does not belong to this checkpoint"
        )
    found |= more


def _indexed(folder: Path, index: Path) -> dict[str, StoredTensor]:
    try:
        raw = read_object(index)
    except ValueError as error:
        raise ValueError(f"{error}; no 'weight_map' from tensors to files in it") from None
    if not isinstance(raw.get("weight_map"), dict) or not raw["weight_map"]:
        raise ValueError(f"{index}: no 'weight_map' from tensors to files in it")
    places = convert(raw, _Index, index).weight_map
    files = sorted(set(places.values()))
    outside = [file for file in files if not _inside(file)]
    if outside:
        raise ValueError(
            f"{index}: {shortened([repr(file) for file in outside])} is no file within this folder"
        )
    if (folder / WHOLE).exists() and WHOLE not in files:
        raise ValueError(
            f"{folder}: holds a {WHOLE} and a {INDEX} of other files; remove those that do not "
            "belong to this checkpoint"
        )
    absent = [file for file in files if not _is_file(folder / file)]
    if absent:
        raise ValueError(
            f"{folder}: {len(absent)} of {len(files)} shards that {INDEX} lists are missing: "
            f"{shortened(absent)}"
        )
    headers = {file: list_tensors(folder / file) for file in files}
    found: dict[str, StoredTensor] = {}
    for tensors in headers.values():
        add_distinct(found, tensors)
    astray = [name for name, file in places.items() if name not in headers[file]]
    if astray:
        raise ValueError(
            f"{folder}: {len(astray)} tensors are not in the shards that {INDEX} names: "
            f"{shortened(astray)}"
        )
    return {name: headers[file][name] for name, file in places.items()}


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name too long, or links in a circle
        return False


def _inside(file: str) -> bool:
    """Whether a name is of a file in the folder, or below it. A link may lead elsewhere: Hugging
    Face's cache holds its files so."""
    path, windows = PurePosixPath(file), PureWindowsPath(file)
    odd = path.is_absolute() or bool(windows.drive) or windows.is_absolute()
    parts = {*path.parts, *windows.parts}
    return bool(path.parts) and not odd and ".." not in parts and "\0" not in file
