"""Tables of a replayed trace and of a capacity plan."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from cmjax.report.tables import simple_table
from cmjax.report.units import number, percent
from cmjax.serving.calibrate import Measured

_LATENCIES = (
    ("ttft_ms", "TTFT: to the first token"),
    ("tpot_ms", "TPOT: per later token, by request"),
    ("itl_ms", "ITL: between tokens, every gap"),
    ("e2e_ms", "end to end"),
    ("wait_ms", "of it waiting"),
)
_COLOURS = {"stable": "green", "backlogged": "yellow", "overloaded": "bold red"}
_GOOD, _FAIR = 0.01, 0.05


def serving_table(result: Mapping[str, Any]) -> RenderableType:
    """A replayed trace at a glance: the verdict, latencies, rates, cache, pools.

    Args:
      result: as `ServingResult.to_dict` gives it.
    """
    latencies = simple_table("Latency, ms", "", "mean", "p50", "p90", "p99", "most")
    for key, words in _LATENCIES:
        found = result[key]
        if found is not None:
            latencies.add_row(
                words, *(number(found[p]) for p in ("mean", "p50", "p90", "p99", "max"))
            )
    return Group(_headlines(result), latencies, _pools(result), *_notes(result))


def measured_table(rows: Sequence[Measured]) -> RenderableType:
    """A measured run beside its simulation."""
    table = simple_table("Beside the measured run, ms", "", "measured", "simulated", "error")
    for row in rows:
        size = abs(row.error)
        style = "green" if size <= _GOOD else "yellow" if size <= _FAIR else "red"
        table.add_row(
            row.key.removesuffix("_ms").replace("_", " "), number(row.measured),
            number(row.simulated), Text(percent(row.error, sign=True), style=style),
        )  # fmt: skip
    return table


def plan_table(result: Mapping[str, Any]) -> RenderableType:
    """A capacity plan: the best split, what limits it, what more would be worth, what was tried.

    Args:
      result: as `CapacityPlan.to_dict` gives it.
    """
    best = Table(box=None, show_header=False, title_justify="left")
    best.add_column(style="dim")
    best.add_column()
    best.add_row("prefill", f"{result['prefill_instances']} x {result['prefill_npus']} NPUs")
    best.add_row(
        "decode",
        f"{result['decode_instances']} x {result['decode_npus']} NPUs, "
        f"EP of all dies, up to {result['batch_per_npu']} requests per NPU",
    )
    best.add_row(
        "goodput",
        f"{number(result['goodput_requests_per_s'])} requests/s "
        f"({number(result['rate_scale'])} x the trace), "
        f"{number(result['goodput_per_npu'])} per NPU of {result['npus']}; the fluid model: "
        f"{number(result['fluid_requests_per_s'])}",
    )
    best.add_row("limited by", result["bound_by"])
    worth = result["one_more_npu"]
    for name in ("prefill", "decode"):
        best.add_row(
            f"one more NPU of {name}",
            f"{number(worth[name])} requests/s by the fluid model, "
            f"{number(worth[f'{name}_simulated'])} simulated (one more instance)",
        )
    best.add_row("twice the cache", f"{number(result['twice_the_cache'])} requests/s")
    enough = result["cache_enough"]
    if enough is not None:
        best.add_row(
            "cache that is enough",
            f"{enough['blocks']:,} blocks, {number(enough['gb_per_node'])} GB a node: "
            f"{number(enough['goodput_requests_per_s'])} requests/s",
        )
    tried = simple_table(
        "Simulated", "prefill + decode", "batch", "requests/s", "within", "TTFT p99", "TPOT p50",
        "tokens/s",
    )  # fmt: skip
    for row in result["tried"]:
        split = (
            f"{row['prefill_instances']} x {row['prefill_npus']} + "
            f"{row['decode_instances']} x {row['decode_npus']}"
        )
        cells = [str(row["batch_per_npu"]), number(row["goodput_requests_per_s"])]
        if row["rate_scale"]:
            cells += [
                percent(row["slo_attainment"]), number(row["ttft_p99_ms"]),
                "" if row["tpot_p50_ms"] is None else number(row["tpot_p50_ms"]),
                number(row["output_tokens_per_s"]),
            ]  # fmt: skip
        tried.add_row(split, *cells)
    tried.caption = "each at the largest rate that keeps the SLO; latencies in ms"
    return Group(best, tried)


def _headlines(result: Mapping[str, Any]) -> Table:
    table = Table(box=None, show_header=False, title_justify="left")
    table.add_column(style="dim")
    table.add_column()
    word = result["verdict"]
    table.add_row("verdict", Text(word, style=_COLOURS[word]))
    rejected = f", {result['rejected']:,} rejected" if result["rejected"] else ""
    table.add_row(
        "requests", f"{result['completed']:,} of {result['requests']:,} completed{rejected}"
    )
    offered = result["offered_requests_per_s"]
    table.add_row(
        "requests/s",
        f"{number(result['completed_requests_per_s'])} completed"
        + ("" if offered is None else f", {number(offered)} offered"),
    )
    table.add_row(
        "output",
        f"{number(result['output_tokens_per_s'])} tokens/s, "
        f"{number(result['tokens_per_s_per_npu'])} per NPU of {result['npus']}",
    )
    slos = [
        f"{name} {result[key]:g} ms"
        for name, key in
        # Fmt: skip.
        (("TTFT", "slo_ttft_ms"), ("TPOT", "slo_tpot_ms"))
        if result[key] is not None
    ]
    if slos:
        table.add_row(
            "within " + " and ".join(slos),
            f"{percent(result['slo_attainment'])} of the requests offered, "
            f"{number(result['goodput_requests_per_s'])} requests/s",
        )
    table.add_row(
        "found in the cache",
        f"{percent(result['cache_hit_blocks'])} of blocks, "
        f"{percent(result['cache_hit_tokens'])} of prompt tokens",
    )
    return table


def _pools(result: Mapping[str, Any]) -> Table:
    table = simple_table("Pools", "", "instances", "NPUs each", "busy")
    for name, busy in result["utilization"].items():
        pool = result["deployment"][name]
        table.add_row(name, str(pool["instances"]), str(pool["npus"]), percent(busy))
    return table


def _notes(result: Mapping[str, Any]) -> list[Text]:
    notes = []
    if "constants" in result:
        found = result["constants"]
        notes.append(
            f"fitted: host {found['host_s'] * 1e6:.3g} µs a step, "
            f"{found['sequence_s'] * 1e6:.3g} µs a sequence, {found['token_s'] * 1e6:.3g} µs a "
            f"token, kernels x {found['kernel_scale']:.3f}"
        )
    if "interval" in result:
        for key, words in (("ttft_ms", "TTFT"), ("tpot_ms", "TPOT")):
            low, high = result["interval"].get(key, {}).get("p99", (None, None))
            if low is not None:
                notes.append(f"{words} p99 between {number(low)} and {number(high)} ms")
    error = result["interpolation_error"]
    if error["worst"]:
        notes.append(
            f"step times {result['step_times']}; interpolation off by {percent(error['mean'])} on "
            f"average, {percent(error['worst'])} at worst"
        )
    notes.append(f"{result['events']:,} events in {result['wall_s']:.2f} s ({result['engine']})")
    return [Text(note, style="dim") for note in notes]
