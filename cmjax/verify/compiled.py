"""Bytes that a compiled program moves between XLA devices, read from its optimised HLO.

    compiled = jax.jit(step).lower(*args).compile()
    device_bytes(compiled.as_text(), devices=48)

On an emulated supernode a device is a node, so these are the bytes between nodes: the one tier
that XLA itself moves. It is what is left after XLA has dropped what nothing reads.
"""

import math
import re
from collections.abc import Iterator

_ITEM_BITS = {"pred": 8, "bf16": 16} | {
    f"{kind}{bits}": bits for kind in "suf" for bits in (4, 8, 16, 32, 64)
}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([\w\-]+)\((.*)$")
_ARRAY = re.compile(r"\b(pred|bf16|[suf]\d+)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:body|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_PAIR = re.compile(r"\{(\d+),(\d+)\}")
_UNREADABLE = ("all-reduce", "reduce-scatter", "ragged-all-to-all", "collective-broadcast")


def device_bytes(hlo: str, devices: int) -> int:
    """Bytes that all devices together receive from other devices in one run.

    Args:
      hlo: text of the optimised module (`compiled.as_text()`).
      devices: that it runs on.
    Raises:
      ValueError: no entry computation; a collective that adds values up (it has no sender of a
        byte), a loop of unknown length around an exchange, or an exchange in a branch.
    """
    bodies, entry = _computations(hlo)
    known: dict[str, int] = {}

    def total(name: str) -> int:
        if name not in known:
            known[name] = sum(_moved(line, devices, total) for line in bodies.get(name, ()))
        return known[name]

    return total(entry)


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    bodies: dict[str, list[str]] = {}
    entry, lines = None, []
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            lines = bodies.setdefault(head[1], [])
            entry = head[1] if line.startswith("ENTRY") else entry
        else:
            lines.append(line)
    if entry is None:
        raise ValueError("device_bytes: expected the text of an HLO module, found no ENTRY")
    return bodies, entry


def _moved(line: str, devices: int, total) -> int:
    found = _INSTRUCTION.match(line)
    if found is None:
        return 0
    result, operation, rest = found.groups()
    operation = operation.removesuffix("-start")
    inside = sum(map(total, _called(rest)))
    if operation == "while" and inside:
        trips = _TRIPS.search(rest)
        if trips is None:
            raise ValueError("device_bytes: a loop of unknown length holds an exchange")
        return int(trips[1]) * inside
    if operation == "conditional" and inside:
        raise ValueError("device_bytes: an exchange in a branch: whether it runs is not known")
    if operation in _UNREADABLE:
        raise ValueError(f"device_bytes: {operation} has no one sender of a byte")
    if operation in ("all-to-all", "all-gather"):
        group = _group_size(rest, devices)
        return devices * _nbytes(result) * (group - 1) // group
    if operation == "collective-permute":
        pairs = _PAIR.findall(rest.partition("source_target_pairs=")[2].partition("}}")[0] + "}")
        return _nbytes(result) * sum(source != target for source, target in pairs)
    return inside


def _called(rest: str) -> Iterator[str]:
    yield from _CALLED.findall(rest)
    for branches in _BRANCHES.findall(rest):
        yield from re.findall(r"[\w.\-]+", branches)


def _nbytes(types: str) -> int:
    """Of an array type, or of all in a tuple."""
    sizes = [
        _ITEM_BITS[kind] * math.prod(int(d) for d in shape.split(",") if d)
        for kind, shape in _ARRAY.findall(types)
    ]
    return sum(sizes) // 8


def _group_size(rest: str, devices: int) -> int:
    """Devices that exchange with one another: `{{0,1},{2,3}}`, `[2,2]<=[4]`, or axes of a mesh."""
    text = rest.partition("replica_groups=")[2]
    if named := re.match(r"mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'([^']+)'=(\d+)", named[1]))
        return math.prod(int(sizes[axis]) for axis in re.findall(r"'([^']+)'", named[2]))
    if iota := re.match(r"\[\d+,(\d+)\]<=", text):
        return int(iota[1])
    if listed := re.match(r"\{\{([\d,]+)\}", text):
        return len(listed[1].split(","))
    if text.startswith("{}") or not text:
        return devices
    raise ValueError(f"device_bytes: cannot read the groups in replica_groups={text[:60]}")
