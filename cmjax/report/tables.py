"""Tables for a terminal, as rich renderables: nothing is printed here."""

import dataclasses
from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cmjax.cost.fit import Calibration
from cmjax.deploy.deployment import Deployment
from cmjax.deploy.validation import ValidationRow, summary
from cmjax.hardware import describe_key
from cmjax.placement import Score
from cmjax.report.blocks import BLOCKS, roll_up
from cmjax.report.units import number, percent, quantity

_HEADLINES = (
    ("tpot_ms", "time per output token (TPOT)"),
    ("ttft_ms", "time to first token (TTFT)"),
    ("tokens_per_s_per_npu", "throughput"),
    ("step_ms", "step"),
    ("per_layer_us", "one layer"),
)
_ENGINES = {"hbm": "HBM"}
_BAR = 24  # characters
_WEAKEST = 1e-3  # of the strongest elasticity: weaker ones are not listed
_GOOD, _FAIR = 0.10, 0.25


def prediction_table(result: Mapping) -> RenderableType:
    """A prediction at a glance: headline numbers, blocks of the step, engines, memory.

    Args:
      result: as `Predictor.predict` returns it.
    """
    return Group(_headlines(result), _blocks(result), _engines(result), _memory(result))


def price_table(program: str, result: Mapping) -> RenderableType:
    """A priced program: FLOP, HBM bytes and time by scope, and how long each engine is busy."""
    title = f"{program} on {result['machine']}"
    table = simple_table(title, "scope", "GFLOP", "HBM MB", "ms on its stream")
    for scope, ms in sorted(result["breakdown"].items(), key=lambda entry: -entry[1]):
        flops = result["breakdown_flops"].get(scope, 0.0)
        nbytes = result["breakdown_hbm_bytes"].get(scope, 0.0)
        table.add_row(scope, number(flops / 1e9), number(nbytes / 1e6), number(ms))
    total = Text(
        f"{number(result['flops'] / 1e9)} GFLOP, {number(result['hbm_bytes'] / 1e6)} MB of HBM "
        f"traffic, total {quantity('total_ms', result['total_ms'])}",
        style="bold",
    )
    return Group(table, total, _engines({**result, "step_ms": result["total_ms"]}))


def key_value_table(title: str, values: Mapping[str, object]) -> RenderableType:
    """Names and values; numbers with the unit that their names say."""
    table = simple_table(title, "")
    table.add_column("", overflow="fold")
    for key, value in values.items():
        table.add_row(key, quantity(key, value) if isinstance(value, float) else str(value))
    return table


def residual_table(fit: Calibration) -> RenderableType:
    """What calibration found and, row by row, what it could not explain."""
    rows = [
        ValidationRow(
            r.measurement.row,
            r.measurement.role,
            r.predicted,
            r.measurement.value,
            r.measurement.source,
            r.measurement.key,
        )
        for r in fit.residuals
    ]
    constants = simple_table("Fitted constants", "constant", "value", "spread", "before")
    spreads = zip(fit.values.items(), fit.uncertainty.spread, fit.before, strict=True)
    for (key, value), after, before in spreads:
        constants.add_row(key, _constant(key, value), percent(after), percent(before))
    return Group(constants, _comparison("Calibration rows", rows, model="fitted"), _summary(rows))


def _constant(key: str, value: float) -> str:
    dimension = describe_key(key)
    if dimension == "s":
        return f"{number(value * 1e6)} µs"
    if dimension == "fraction":
        return percent(value)
    scales = {"bytes/s": (1e9, " GB/s"), "flop/s": (1e12, " TFLOPS"), "bytes": (1e9, " GB")}
    scale, unit = scales.get(dimension, (1.0, ""))
    return f"{number(value / scale)}{unit}"


def validation_table(rows: Sequence[ValidationRow]) -> RenderableType:
    """Predicted against published, one table per role, and how far off each role is."""
    titles = {"predict": "Predictions (nothing fitted to these)", "calibrate": "Calibration rows"}
    roles = dict.fromkeys(row.role for row in rows)
    tables = [
        _comparison(titles.get(role, role), [row for row in rows if row.role == role])
        for role in sorted(roles, key=lambda role: role != "predict")
    ]
    return Group(*tables, _summary(rows))


def placement_table(results: Mapping[str, Score], objective: str = "mean") -> RenderableType:
    """Placement methods side by side; the fastest by the objective is marked.

    Args:
      results: by method. objective: of their windows, what they are ranked by.
    """
    worst = objective != "mean"
    title = f"Placement, judged by the {objective} of its windows" if worst else "Placement"
    heads = ("PAR of slowest", "slowest workload") if worst else ("mean PAR", "worst layer PAR")
    table = simple_table(title, "method", "time (ms)", "over bound", *heads, "balance")
    best = min(results, key=lambda name: results[name].cost_s, default=None)
    for name, found in results.items():
        table.add_row(
            f"{name} ◀ fastest" if name == best and len(results) > 1 else name,
            number(found.cost_s * 1e3),
            percent(found.cost_gap, sign=True),
            f"{found.slowest_par:.3f}" if worst else f"{found.mean_par:.3f}",
            found.slowest_name if worst else f"{found.worst_par:.3f}",
            percent(found.balancedness),
            style="bold" if name == best else "",
        )
    table.caption = (
        f"time: all layers, {objective} over windows; PAR: busiest rank over the mean; balance: "
        f"its inverse"
    )
    return table


def comparison_table(scores: Mapping[str, Score], objective: str = "mean") -> RenderableType:
    """Placement methods side by side, where they planned and, if so judged, where they did not.

    Fits in 80 columns for methods of up to 20 letters.

    Args:
      scores: by method, with an objective (`cmjax.placement.compare`).
      objective: its name.
    """
    some = list(scores.values())
    stepped = any(found.step_par is not None for found in some)
    reached = any(found.reach is not None for found in some)
    columns = ["method", "planned\nms", "over\nbound", "PAR\nmean", "\nworst"]
    worst = objective != "mean" and any(len(found.time_s) > 1 for found in some)
    if worst:
        columns[3:] = ["worst\nPAR", "slowest\nworkload"]
    columns += ["step\nPAR"] * stepped + ["nodes/\ntoken"] * reached + ["solved\nin"]
    planned = simple_table(f"Placement, judged by the {objective} of its windows", *columns)
    best = min(scores, key=lambda name: scores[name].cost_s, default=None)
    for name, found in scores.items():
        cells = [number(found.cost_s * 1e3), percent(found.cost_gap, sign=True)]
        if worst:
            cells += [f"{found.slowest_par:.2f}", found.slowest_name]
        else:
            cells += [f"{found.mean_par:.2f}", f"{found.worst_par:.2f}"]
        if found.step_par is not None:
            cells.append(f"{found.step_par.mean():.2f}")
        if found.reach is not None:
            cells.append(f"{found.reach.nodes.mean():.2f}")
        _add_method(planned, name, name == best, len(some), *cells, f"{found.solve_s or 0:.1f} s")
    planned.caption = (
        "◀ fastest; ms: all layers; over bound: what no plan can beat; PAR: busiest rank over the "
        + (
            "mean in the slowest workload, which is named"
            if worst
            else "mean, by windows and layers, and of the worst layer"
        )
        + "; step PAR: of sampled steps" * stepped
        + "; nodes/token: different nodes a token goes to" * reached
    )
    tested = {name: found.test for name, found in scores.items() if found.test is not None}
    if not tested:
        return planned
    table = simple_table(
        "On loads they were not planned for",
        "method", "mean\nms", "over\nbound", "PAR\nmean", "\nworst",
    )  # fmt: skip
    best = min(tested, key=lambda name: tested[name].mean_time_s)
    for name, found in tested.items():
        _add_method(
            table, name, name == best, len(some),
            number(found.mean_time_s * 1e3), percent(found.gap, sign=True),
            f"{found.mean_par:.2f}", f"{found.worst_par:.2f}",
        )  # fmt: skip
    table.caption = "over bound: what no plan made for these very loads can beat"
    return Group(planned, table)


def _add_method(table, name, is_best, methods, *cells):
    marked = is_best and methods > 1
    table.add_row(f"{name} ◀" if marked else name, *cells, style="bold" if is_best else "")


_USUAL = {f.name: f.default for f in dataclasses.fields(Deployment)}
_RARE = ("redundant", "attention", "drafts", "engine")
"""Options of a deployment with a column only where one of those shown has not the usual value."""


def search_table(result: Mapping, rows: int = 12) -> RenderableType:
    """The best deployment of a search, and the ones that nothing beats in both figures.

    Args:
      result: as `DeploymentSearch.to_dict` gives it. rows: of the front, at most, evenly spread.
    """
    front = result["pareto"]
    latency = "tpot_ms" if "tpot_ms" in front[0] else "ttft_ms"
    heads = ("EP", "TP", "NPUs", "batch", "microbatches", "quant", "KV cache")
    others = [name for name in _RARE if any(row[name] != _USUAL[name] for row in front)]
    table = simple_table(
        "Best in latency or throughput", *heads, *others, latency[:4].upper(), "tokens/s per NPU",
        "HBM, GB",
    )  # fmt: skip
    step = max(len(front) - 1, 1) / max(rows - 1, 1)
    shown = dict.fromkeys(min(round(i * step), len(front) - 1) for i in range(rows))
    for row in (front[i] for i in shown):
        table.add_row(
            f"{row['ep']}", f"{row['tp']}", f"{row['npus']}", f"{row['batch']:g}",
            f"{row['microbatches']}",
            row["quant"], row["kv_cache"],
            *("default" if row[name] is None else str(row[name]) for name in others),
            quantity(latency, row[latency]),
            number(row["tokens_per_s_per_npu"]), number(row["hbm_gb_per_die"]),
        )  # fmt: skip
    refused = len(result["refused"])
    table.caption = (
        f"{result['candidates']:,} candidates, {result['within_limit']:,} within the limit"
        + (f"; {refused} structures are not possible" if refused else "")
    )
    return Group(_headlines(result["best"]), table)


def sensitivity_table(elasticities: Mapping[str, float]) -> RenderableType:
    """What 1 % more of each machine constant does to the step, strongest first."""
    table = simple_table("Sensitivity of the step", "machine constant", "step, for +1 %")
    table.add_column("")
    ordered = sorted(elasticities.items(), key=lambda item: -abs(item[1]))
    largest = max((abs(e) for _, e in ordered), default=0.0) or 1.0
    shown = [(name, e) for name, e in ordered if abs(e) >= _WEAKEST * largest]
    for name, elasticity in shown:
        colour = "green" if elasticity < 0 else "red"
        bar = Text(_bar(abs(elasticity) / largest), style=colour)
        table.add_row(name, percent(elasticity / 100, sign=True, digits=3), bar)
    left_out = len(ordered) - len(shown)
    table.caption = "green: more of it makes the step shorter; red: longer" + (
        f"; weaker ones left out: {left_out}" if left_out else ""
    )
    return table


def _headlines(result: Mapping) -> Table:
    said, asked = result["deployment"], result["requests"]
    title = f"{said['model']} {said['phase']} on {said['npus']} NPUs of {result['machine']}"
    title += f", TP {said['tp']}" if said.get("tp", 1) > 1 else ""
    table = Table(title=title, box=None, show_header=False, title_justify="left")
    table.add_column(style="dim")
    table.add_column(justify="right", style="bold")
    table.add_column(style="dim")
    table.add_row("batch per NPU, prompt", f"{asked['batch']:g}, {asked['prompt']:,g}")
    for key, words in _HEADLINES:
        if result.get(key):
            low_high = result.get("interval", {}).get(key)
            table.add_row(words, quantity(key, result[key]), _range(key, low_high))
    if result.get("interval"):
        table.caption = f"width: {result['width_from']}"
    return table


def _range(key: str, low_high: Sequence[float] | None) -> str:
    """`90 % interval 43.0 ms - 50.6 ms`, or nothing."""
    if low_high is None:
        return ""
    low, high = (quantity(key, value) for value in low_high)
    return f"90 % interval {low} – {high}"


def _blocks(result: Mapping) -> Table:
    blocks, step_ms = roll_up(result["breakdown"]), result["step_ms"]
    table = simple_table("Where the time goes", "block", "ms", "of the step")
    table.add_column("")
    for block, ms in blocks.items():
        share = ms / step_ms
        table.add_row(BLOCKS[block], number(ms), percent(share), _bar(share))
    total = sum(blocks.values())
    if total > 1.001 * step_ms:
        table.caption = (
            f"streams overlap: {number(total)} ms of work in a step of {number(step_ms)} ms"
        )
    return table


def _engines(result: Mapping) -> Text:
    shares = (
        f"{_ENGINES.get(name, name)} {percent(ms / result['step_ms'], digits=0)}"
        for name, ms in result["engines_busy_ms"].items()
    )
    return Text.assemble(("engines busy: ", "dim"), ", ".join(shares))


def _memory(result: Mapping) -> Text:
    parts = result["hbm_gb_per_die"]
    shown = " + ".join(f"{name} {number(gb)}" for name, gb in parts.items())
    total = f"{number(sum(parts.values()))} GB per die ({shown})"
    if result["fits_hbm"]:
        return Text.assemble(("memory: ", "dim"), total, ": ", ("fits", "green"))
    return Text.assemble(
        ("DOES NOT FIT: ", "bold red"),
        f"{total} is more HBM than a die has; use more NPUs or a smaller batch",
    )


def _comparison(title: str, rows: Sequence[ValidationRow], model: str = "predicted") -> Table:
    sure = any(row.interval is not None for row in rows)
    columns = ["90 % interval"] * sure
    table = simple_table(title, "what", model, "published", "error", *columns)
    for row in rows:
        size = abs(row.error)
        style = "green" if size <= _GOOD else "yellow" if size <= _FAIR else "red"
        table.add_row(
            row.row,
            quantity(row.key, row.predicted),
            quantity(row.key, row.measured),
            Text(percent(row.error, sign=True), style=style),
            *([_ends(row)] * sure),
        )
    return table


def _ends(row: ValidationRow) -> Text:
    if row.interval is None:
        return Text("")
    low, high = (quantity(row.key, end) for end in row.interval)
    return Text(f"{low} – {high}", style="green" if row.inside else "red")


def _summary(rows: Sequence[ValidationRow]) -> Text:
    lines = (
        f"{role}: {found.rows} {'row' if found.rows == 1 else 'rows'}, "
        f"mean error {percent(found.mean_error)}, "
        f"worst {percent(found.worst_error)} ({found.worst_row})"
        + (
            f"; {percent(found.coverage)} inside the 90 % interval, median half-width "
            f"{percent(found.half_width)}"
            if found.coverage is not None and found.half_width is not None
            else ""
        )
        for role, found in summary(rows).items()
    )
    return Text("\n".join(lines))


def simple_table(title: str, first: str, *numbers: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", caption_justify="left")
    table.add_column(first, overflow="fold")
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _bar(share: float) -> str:
    """A bar of `_BAR` characters at 1, to an eighth of a character."""
    eighths = round(min(max(share, 0.0), 1.0) * _BAR * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
