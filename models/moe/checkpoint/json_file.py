"""JSON objects from files, checked against a schema: every complaint is one line that names the
file, the key, what was wanted and what was found.

A schema is a `msgspec.Struct`: a field without a default must be in the file, one with a default
need not be, and bounds are written in its type.
"""

import re
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from cmjax.inputs import read_json

_BOUNDS = {">=": "at least", "<=": "at most", ">": "more than", "<": "less than"}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "array": "a list",
    "object": "an object",
    "null": "null",
}


def read_object(path: Path) -> dict[str, Any]:
    """The keys of a JSON object.

    Raises: ValueError: as `cmjax.inputs.read_json`, or the file holds no object.
    """
    raw = read_json(path)
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(raw).__name__}")
    return raw


def convert[T](raw: Any, schema: type[T], path: Path | None, within: str = "") -> T:
    """What JSON held, as a `schema`; keys the schema does not have are left out.

    Args:
      path: the file, for messages.
      within: which part of the file, for messages.
    Raises: ValueError: a key is missing, of the wrong type or out of bounds.
    """
    where = f"{path}: {within}: " if within else f"{path}: "
    try:
        return msgspec.convert(raw, schema)
    except msgspec.ValidationError as error:
        raise ValueError(where + _explained(str(error), raw, schema)) from None


def _explained(message: str, raw: Any, schema: Any) -> str:
    """A complaint of msgspec in the words of this project."""
    text, _, place = message.partition(" - at `")
    if missing := re.fullmatch(r"Object missing required field `(.+)`", text):
        parent = _steps(place)
        inside = f" in {_named(parent)}" if parent else ""
        return f"key {missing[1]!r} is missing{inside}"
    steps = _steps(place)
    value, hint = raw, schema
    for step in steps:
        hint = _hint(hint, step)
        value = _entry(value, step)
    got = _shown(value)
    wanted = _wanted(text, value, hint)
    # what the whole key must hold says more than what one of its entries must be
    if steps and (description := _description(_hint(schema, steps[0]))):
        value = raw[steps[0]] if isinstance(raw, dict) else raw
        wanted, got, steps = f"hold {description}", _shown(value), steps[:1]
    return f"key {_named(steps)} must {wanted}, got {got}" if steps else f"must {wanted}, got {got}"


def _entry(value: Any, step: Any) -> Any:
    """What a step leads to, or `value` where msgspec does not say which entry it means (`...`)."""
    try:
        return value[step]
    except (KeyError, IndexError, TypeError):
        return value


def _wanted(text: str, value: Any, hint: Any) -> str:
    if text.startswith("Invalid enum value"):
        allowed = [repr(item) for item in _literals(hint)]
        return f"be {' or '.join(allowed)} here"
    if "out of range" in text:
        return "be a smaller number"
    if match := re.match(r"Expected `(\w+)` (>=|<=|>|<) (\S+)", text):
        return f"be {_BOUNDS[match[2]]} {float(match[3]):.15g}"
    if match := re.match(r"Expected `array` of length (\S+)", text):
        return f"have {match[1]} entries"
    if match := re.match(r"Expected `([^`]+)`", text):
        names = [name for name in match[1].split(" | ") if name != "null"]
        if names[0] == "int" and not isinstance(value, float):
            names[0] = "float"
        return f"be {' or '.join(_KINDS.get(name, name) for name in names)}"
    return f"be otherwise ({text})"


def _steps(place: str) -> list[Any]:
    """The keys and indices of a path such as `$.a[3].b`."""
    found = re.findall(r"\.([^.\[\]`]+)|\[(\d+|\.\.\.)\]", place)
    return [name or (int(index) if index.isdigit() else index) for name, index in found]


def _named(steps: Sequence[Any]) -> str:
    indexed = (f"[{s}]" if isinstance(s, int) or s == "..." else f".{s}" for s in steps)
    return repr("".join(indexed).removeprefix("."))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _hint(hint: Any, step: Any) -> Any:
    """The type of a field, looked for through unions and annotations."""
    for member in _members(hint):
        if (
            isinstance(step, str)
            and isinstance(member, type)
            and issubclass(member, msgspec.Struct)
        ):
            return typing.get_type_hints(member, include_extras=True).get(step)
    return None


def _members(hint: Any) -> list[Any]:
    if isinstance(hint, typing.TypeAliasType):
        return _members(hint.__value__)
    if typing.get_origin(hint) is typing.Annotated:
        return _members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [m for arg in typing.get_args(hint) for m in _members(arg)]
    return [hint]


def _literals(hint: Any) -> list[Any]:
    return [
        value
        for member in _members(hint)
        if typing.get_origin(member) is typing.Literal
        for value in typing.get_args(member)
    ]


def _description(hint: Any) -> str | None:
    if typing.get_origin(hint) is not typing.Annotated:
        return None
    metas = (m for m in typing.get_args(hint)[1:] if isinstance(m, msgspec.Meta))
    return next((meta.description for meta in metas if meta.description), None)
