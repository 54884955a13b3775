"""A service in a TOML file: the fields of `Service`, a table per pool."""

import dataclasses
import difflib
import types
import typing
from pathlib import Path
from typing import Any

from cmjax.inputs import read_toml
from cmjax.serving.service import (
    ColocatedPool,
    ContextCache,
    DecodePool,
    Loss,
    PrefillPool,
    Service,
    paper_service,
)

_TABLES = {
    "prefill": PrefillPool, "decode": DecodePool, "colocated": ColocatedPool, "cache": ContextCache,
}  # fmt: skip
_NAMES = ("cloudmatrix384",)


def read_service(source: str | Path, npus: int = 384) -> Service:
    """A service by the name of a known one, or from a `.toml` file.

    Args:
      source: `cloudmatrix384` (the paper's instances), or a file. npus: what a known one fills.
    Raises: ValueError: no such file, a key that is none, or a value of another type, named.
    """
    if str(source) in _NAMES:
        return paper_service(npus)
    path = Path(source)
    if not path.is_file():
        raise ValueError(
            f"{source}: no such deployment; give {' or '.join(_NAMES)}, or a .toml file"
        )
    given = read_toml(path)
    fields: dict[str, Any] = {"name": path.stem}
    losses = given.pop("losses", [])
    if not isinstance(losses, list):
        raise ValueError(f"{path}: losses is a list of tables, [[losses]]")
    fields["losses"] = tuple(_make(Loss, table, f"{path} losses") for table in losses)
    for name, kind in _TABLES.items():
        if name in given:
            fields[name] = _make(kind, given.pop(name), f"{path} [{name}]")
    return _make(Service, given, str(path), fields)


def _make(kind: type, given: Any, where: str, fields: dict[str, Any] | None = None) -> Any:
    """A dataclass of a table, its keys and types checked."""
    if not isinstance(given, dict):
        raise ValueError(f"{where}: a table is needed, got {given!r}")
    types_of = typing.get_type_hints(kind)
    known = [f.name for f in dataclasses.fields(kind) if f.name not in (fields or ())]
    for name, value in given.items():
        if name not in types_of:
            close = difflib.get_close_matches(name, known, n=1) or known
            raise ValueError(f"{where}: unknown key {name!r}; it takes {', '.join(close)}")
        if isinstance(value, list):
            given = given | {name: tuple(value)}
        if not _is_a(given[name], types_of[name]):
            raise ValueError(f"{where}: {name} must be {_said(types_of[name])}, got {value!r}")
    missing = [
        f.name for f in dataclasses.fields(kind)
        if f.default is dataclasses.MISSING and f.name not in given
        and f.default_factory is dataclasses.MISSING
    ]  # fmt: skip
    if missing:
        raise ValueError(f"{where}: {missing[0]} is needed")
    return kind(**((fields or {}) | given))


def _is_a(value: Any, annotation: Any) -> bool:
    if typing.get_origin(annotation) is typing.Literal:
        return value in typing.get_args(annotation)
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        return any(_is_a(value, part) for part in typing.get_args(annotation))
    if typing.get_origin(annotation) is tuple:
        each = typing.get_args(annotation)[0]
        return isinstance(value, tuple) and all(_is_a(part, each) for part in value)
    if annotation is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(annotation, type) and isinstance(value, annotation)


def _said(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return " or ".join(map(repr, typing.get_args(annotation)))
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        parts = [part for part in typing.get_args(annotation) if part is not type(None)]
        return " or ".join(map(_said, parts))
    if typing.get_origin(annotation) is tuple:
        return f"a list, each {_said(typing.get_args(annotation)[0])}"
    named = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
    return named.get(annotation, str(annotation))
