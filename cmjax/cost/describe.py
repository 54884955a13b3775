"""A timeline for people: one line of text, and a table for a notebook."""

import html as escape
from collections.abc import Mapping

_PREFIXES = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_NAMES: dict[str, str] = {"hbm": "HBM"}
_CELL = "padding: 2px 10px; text-align: right"


def one_line(summary: Mapping) -> str:
    """`1.23 ms, 45.6 GFLOP, 1.2 GB of HBM traffic, HBM busy 93 %` of `Timeline.to_dict()`."""
    total = summary["total_s"]
    parts = [
        seconds(total),
        f"{amount(summary['flops'])}FLOP",
        f"{amount(summary['hbm_bytes'])}B of HBM traffic",
    ]
    if sent := sum(summary["link_bytes"].values()):
        parts.append(f"{amount(sent)}B sent")
    name, busy = max(summary["engines_s"].items(), key=lambda entry: entry[1])
    if total and busy:
        parts.append(f"{_NAMES.get(name, name)} busy {busy / total:.0%}".replace("%", " %"))
    return ", ".join(parts)


def html(summary: Mapping) -> str:
    """Totals, and FLOP, HBM bytes and time by scope and by engine."""
    total = summary["total_s"]
    scopes = sorted(summary["scopes"].items(), key=lambda entry: -entry[1]["seconds"])
    by_scope = _table(
        ("scope", "FLOP", "HBM bytes", "time", "of the total"),
        [
            (
                scope or "(no scope)",
                f"{amount(found['flops'])}FLOP",
                f"{amount(found['hbm_bytes'])}B",
                seconds(found["seconds"]),
                _share(found["seconds"], total),
            )
            for scope, found in scopes
        ],
    )
    by_engine = _table(
        ("engine", "busy", "of the total"),
        [
            (_NAMES.get(name, str(name)), seconds(busy), _share(busy, total))
            for name, busy in summary["engines_s"].items()
        ],
    )
    return f"<div><p><b>{escape.escape(one_line(summary))}</b></p>{by_scope}{by_engine}</div>"


def amount(value: float) -> str:
    """`1.23 G` of 1.23e9: three digits and a decimal prefix."""
    size, prefix = next(((s, p) for s, p in _PREFIXES if abs(value) >= s), (1.0, ""))
    return f"{value / size:.3g} {prefix}"


def seconds(value: float) -> str:
    """A time in the unit that suits it: `1.23 ms`."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _share(part: float, total: float) -> str:
    return f"{part / total:.1%}".replace("%", " %") if total else ""


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    def row(tag: str, cells: tuple[str, ...]) -> str:
        first, *rest = (escape.escape(cell) for cell in cells)
        numbers = "".join(f'<{tag} style="{_CELL}">{cell}</{tag}>' for cell in rest)
        return f'<tr><{tag} style="text-align: left">{first}</{tag}>{numbers}</tr>'

    body = "".join(row("td", cells) for cells in rows)
    return f"<table><thead>{row('th', head)}</thead><tbody>{body}</tbody></table>"
