"""Machines from TOML: the built-in catalog by name, a user's own file by path.

Every quantity is a table `{ value = "1.6 TB/s", source = "..." }`; a count is
`{ value = 24, source = "..." }`. All keys of the schema are needed and no others are taken. Serving
engines are tables `[engines.NAME]`, the first of which is the machine's own; how sure the numbers
are is read by `cmjax.hardware.uncertainty`.
"""

import dataclasses
import difflib
from importlib import resources
from pathlib import Path
from typing import Any, SupportsFloat

import jax

from cmjax.hardware.machine import (
    Chip,
    Efficiency,
    Engine,
    Exchange,
    Fabric,
    Factors,
    Supernode,
    Tier,
)
from cmjax.hardware.units import parse_quantity
from cmjax.inputs import parse_toml, read_text, shown

_TIER = {"bandwidth_bytes_per_s": "bytes/s", "latency_s": "s"}
_SCHEMA: dict[str, Any] = {
    "chip": {
        "cube_flops_8bit": "flop/s",
        "cube_flops_16bit": "flop/s",
        "cube_flops_32bit": "flop/s",
        "vector_bytes_per_s": "bytes/s",
        "hbm_bytes_per_s": "bytes/s",
        "hbm_bytes": "bytes",
        "matrix_startup_s": "s",
        "attention_startup_s": "s",
        "vector_startup_s": "s",
        "collective_startup_s": "s",
        "inner_block_s": "s",
        "l2_bytes": "bytes",
        "cube_cores": "count",
        "vector_cores": "count",
        "separate_vector_cores": "flag",
    },
    "fabric": {
        "die": _TIER,
        "node": _TIER,
        "supernode": _TIER,
        "rdma": _TIER,
        "vpc": _TIER,
        "shared_ports": "flag",
    },
    "exchange": {
        "bandwidth": "fraction",
        "bandwidth_from_hbm": "fraction",
        "dispatch_startup_s": "s",
        "combine_startup_s": "s",
        "flag_s": "s",
        "bulk_source_s": "s",
        "saturation_cores": "number",
        "interference": "fraction",
        "jitter_s": "s",
        "copies_in_flight": "flag",
        "bulk_kernels": "flag",
    },
    "efficiency": {
        "gemm": "fraction",
        "grouped": "fraction",
        "attention": "fraction",
        "hbm": "fraction",
        "exposed": "fraction",
        "attention_exposed": "fraction",
    },
    "nodes": "count",
    "npus_per_node": "count",
    "dies_per_npu": "count",
}
_ENGINE = {
    **dict.fromkeys(("step_s", "draft_s", "copy_s"), "s"),
    "unfused": "names",
    "prefill_by_heads": "flag",
}
_ENGINE_NOT_GIVEN = {
    "unfused": {"value": [], "source": "none is missing"},
    "prefill_by_heads": {"value": False, "source": "every request is one rank's"},
}
_MAY_BE_ZERO = {
    *("interference", "flag_s", "copy_s", "bulk_source_s", "jitter_s", "step_s", "draft_s"),
    *("matrix_startup_s", "attention_startup_s", "vector_startup_s", "collective_startup_s"),
    *("inner_block_s", "exposed", "attention_exposed"),
}
_AS = (("chip", "attention_startup_s", "matrix_startup_s"), ("efficiency", "grouped", "gemm"))
"""What is taken from another constant where a file does not say."""
_NOT_GIVEN = (
    ("chip", "inner_block_s", "0 us"),
    ("efficiency", "exposed", "0 %"),
    ("efficiency", "attention_exposed", "0 %"),
)
"""Where a file does not say, the longer of cube and memory bounds a kernel."""
_MOST_BYTES = 1_000_000
_MOST_RANKS = 2**20
_MOST_QUANTITY = 1e30


def catalog() -> list[str]:
    """Names of the built-in machines."""
    files = resources.files("cmjax.hardware") / "catalog"
    return sorted(f.name.removesuffix(".toml") for f in files.iterdir() if f.name.endswith(".toml"))


def as_machine(machine: Supernode | str | Path) -> Supernode:
    """A machine as it is, or loaded by its name or path; see `load_machine`."""
    return machine if isinstance(machine, Supernode) else load_machine(machine)


def load_machine(name_or_path: str | Path) -> Supernode:
    """Load a machine.

    Args:
      name_or_path: a name in `catalog()`, or the path of a TOML file (it ends in `.toml`).
    Raises:
      ValueError: unknown name (with the closest ones), unreadable file, unknown or missing key,
        negative or unit-less value; the message names file, key and what was expected.
    """
    tree, origin = read_tree(name_or_path)
    name = tree.pop("name", None)
    if not isinstance(name, str) or not name:
        raise ValueError(f'{origin}: key "name" is missing; expected name = "my-machine"')
    tree.pop("fit", None)
    factors = {
        name: _parse_entry(entry, "fraction", origin, f"factors.{name}")
        for name, entry in _known_factors(tree.pop("factors", {}), origin).items()
    }
    tables = tree.pop("engines", None)
    values = _parse(tree, _SCHEMA, origin, prefix="")
    engines = _engines(tables, origin)
    ranks = values["nodes"] * values["npus_per_node"] * values["dies_per_npu"]
    if ranks > _MOST_RANKS:
        raise ValueError(
            f"{origin}: {shown(ranks)} ranks (dies); at most {_MOST_RANKS:,} are priced"
        )
    fabric = dict(values["fabric"])
    for tier in ("die", "node", "supernode", "rdma", "vpc"):
        fabric[tier] = Tier(**fabric[tier])
    return Supernode(
        name=name,
        origin=str(name_or_path),
        chip=Chip(**values["chip"]),
        fabric=Fabric(**fabric),
        exchange=Exchange(**values["exchange"]),
        efficiency=Efficiency(**values["efficiency"]),
        engines=engines,
        factors=Factors(**factors),
        engine=engines[0].name,
        nodes=values["nodes"],
        npus_per_node=values["npus_per_node"],
        dies_per_npu=values["dies_per_npu"],
    )


def sources(name_or_path: str | Path) -> dict[str, str]:
    """Where each number of a machine comes from: dotted key -> source."""

    def walk(tree, prefix):
        for key, value in tree.items():
            if isinstance(value, dict) and "value" in value:
                yield f"{prefix}{key}", value.get("source", "")
            elif isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")

    return dict(walk(read_tree(name_or_path)[0], ""))


def describe_key(dotted: str) -> str:
    """The dimension of a machine's number, as `cmjax.hardware.units` names it, or `number`."""
    if dotted.startswith("factors."):
        return "fraction"
    if dotted.startswith("engines."):
        return _ENGINE[dotted.rpartition(".")[2]]
    found: Any = _SCHEMA
    for name in dotted.split("."):
        found = found[name]
    return found


def leaf_names(machine: Supernode) -> list[str]:
    """Dotted keys of a machine's leaves, in the order of `jax.tree.leaves`."""

    def name(key) -> str:
        return machine.engines[key.idx].name if hasattr(key, "idx") else key.name

    paths = jax.tree_util.tree_leaves_with_path(machine)
    return [".".join(name(key) for key in path) for path, _ in paths]


def relative_slopes(
    machine: Supernode, value: SupportsFloat, gradient: Supernode
) -> dict[str, float]:
    """By how many per cent a value changes per per cent of every constant, strongest first; those
    that it does not feel are left out.

    Args: the machine, a positive function's value there, and its gradient.
    """
    leaves = zip(
        leaf_names(machine), jax.tree.leaves(machine), jax.tree.leaves(gradient), strict=True
    )
    found = {name: float(leaf) * float(g) / float(value) for name, leaf, g in leaves}
    return dict(sorted(((n, e) for n, e in found.items() if e), key=lambda ne: -abs(ne[1])))


def replace_leaf(machine: Supernode, dotted: str, value) -> Supernode:
    """`replace_leaf(machine, "chip.hbm_bytes_per_s", 2e12)`: a machine with one value changed."""
    head, _, rest = dotted.partition(".")
    if head == "engines" and rest:
        name, _, field = rest.partition(".")
        new = dataclasses.replace(machine.running(name), **{field: value})
        engines = tuple(new if old.name == name else old for old in machine.engines)
        return dataclasses.replace(machine, engines=engines)
    names = [f.name for f in dataclasses.fields(machine)]
    if head not in names:
        raise ValueError(f"{type(machine).__name__} has no {head!r}; it has {', '.join(names)}")
    new = replace_leaf(getattr(machine, head), rest, value) if rest else value
    return dataclasses.replace(machine, **{head: new})


def read_tree(name_or_path: str | Path) -> tuple[dict[str, Any], str]:
    """A machine's TOML as it is written, and where it is from, for messages. What
    it may leave out is filled in (`_AS`, `_NOT_GIVEN`).

    Raises: ValueError: unknown name, unreadable file, or no TOML.
    """
    text, origin = _read(str(name_or_path))
    tree = parse_toml(text, origin)
    for section, key, other in _AS:
        found = tree.get(section)
        if isinstance(found, dict) and isinstance(like := found.get(other), dict):
            found.setdefault(key, {"source": f"assumed: as {other}", "value": like.get("value")})
    for section, key, zero in _NOT_GIVEN:
        if isinstance(found := tree.get(section), dict):
            found.setdefault(key, {"source": "not given", "value": zero})
    return tree, origin


def _known_factors(table: Any, origin: str) -> dict[str, Any]:
    known = [field.name for field in dataclasses.fields(Factors)]
    if not isinstance(table, dict) or (unknown := [name for name in table if name not in known]):
        name = unknown[0] if isinstance(table, dict) else table
        raise ValueError(f"{origin}: [factors] has no {name!r}; known: {', '.join(known)}")
    return table


def _engines(tables: Any, origin: str) -> tuple[Engine, ...]:
    if not isinstance(tables, dict) or not tables:
        raise ValueError(f"{origin}: no engine; expected a table such as [engines.my-engine]")
    return tuple(_engine(name, table, origin) for name, table in tables.items())


def _engine(name: str, table: Any, origin: str) -> Engine:
    if isinstance(table, dict):
        table = {**_ENGINE_NOT_GIVEN, **table}
    return Engine(name=name, **_parse_entry(table, _ENGINE, origin, f"engines.{name}"))


def _read(name_or_path: str) -> tuple[str, str]:
    if name_or_path.endswith(".toml"):
        source = str(Path(name_or_path))
        text = read_text(source, most_bytes=_MOST_BYTES, source=f"machine file {source}")
        return text, source
    known = catalog()
    if name_or_path not in known:
        close = difflib.get_close_matches(name_or_path, known, n=2) or known
        raise ValueError(
            f"unknown machine {name_or_path!r}; closest: {', '.join(close)} "
            f"(or give the path of a .toml file)"
        )
    file = resources.files("cmjax.hardware") / "catalog" / f"{name_or_path}.toml"
    return file.read_text(encoding="utf-8"), f"{name_or_path}.toml"


def _parse(tree: dict, schema: dict, origin: str, prefix: str) -> dict:
    if unknown := [key for key in tree if key not in schema]:
        close = difflib.get_close_matches(unknown[0], schema, n=1)
        hint = f'; did you mean "{prefix}{close[0]}"?' if close else f"; known: {', '.join(schema)}"
        raise ValueError(f'{origin}: unknown key "{prefix}{unknown[0]}"{hint}')
    return {
        key: _parse_entry(tree.get(key), expected, origin, f"{prefix}{key}")
        for key, expected in schema.items()
    }


def _parse_entry(entry: Any, expected: Any, origin: str, key: str) -> Any:
    if isinstance(expected, dict):
        if not isinstance(entry, dict):
            raise ValueError(f'{origin}: key "{key}" is missing; expected a table [{key}]')
        return _parse(entry, expected, origin, f"{key}.")
    if entry is None:
        raise ValueError(f'{origin}: key "{key}" is missing; expected {_describe(expected)}')
    if not isinstance(entry, dict) or "value" not in entry:
        raise ValueError(
            f'{origin}: key "{key}" must be a table with value and source, got {shown(entry)}'
        )
    if not isinstance(entry.get("source"), str) or not entry["source"]:
        raise ValueError(f'{origin}: key "{key}" has no source; say where the number is from')
    value = entry["value"]
    if expected == "flag":
        if not isinstance(value, bool):
            raise ValueError(f'{origin}: key "{key}" must be true or false, got {value!r}')
        return value
    if expected == "names":
        if not isinstance(value, list) or not all(isinstance(n, str) and n for n in value):
            raise ValueError(f'{origin}: key "{key}" must be a list of names, got {shown(value)}')
        return tuple(value)
    if expected in ("count", "number"):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_RANKS:
            raise ValueError(
                f'{origin}: key "{key}" must be a whole number >= 1, got {shown(value)}'
            )
        return value if expected == "count" else float(value)
    try:
        number = parse_quantity(value, expected)
    except ValueError as error:
        raise ValueError(f'{origin}: key "{key}": {error}') from None
    if number and not 1 / _MOST_QUANTITY < number < _MOST_QUANTITY:
        raise ValueError(f'{origin}: key "{key}": {value!r} is more or less than anything has')
    if number == 0 and key.rpartition(".")[2] not in _MAY_BE_ZERO:
        raise ValueError(f'{origin}: key "{key}" must be positive, got {value!r}')
    return number


def _describe(expected: str) -> str:
    known = {
        "count": "a whole number",
        "number": "a whole number",
        "flag": "true or false",
        "names": "a list of names",
    }
    return known.get(expected, f"a quantity in {expected}")
