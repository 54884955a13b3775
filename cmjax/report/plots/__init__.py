"""Figures: each is drawn from data, says its finding in its title, and is written to one file."""

from cmjax.report.plots.placement import (
    load_curve_title,
    node_bytes_title,
    placement_title,
    plot_load_curve,
    plot_node_bytes,
    plot_placement,
    plot_rank_curve,
    rank_curve_title,
)
from cmjax.report.plots.plans import plans_title, plot_plans
from cmjax.report.plots.search import plot_search, search_title
from cmjax.report.plots.serving import (
    latency_title,
    pareto_title,
    plot_latency,
    plot_pareto,
    plot_queues,
    queues_title,
)
from cmjax.report.plots.step import plot_step, step_lanes, step_title
from cmjax.report.plots.throughput import ThroughputPoint, plot_throughput, throughput_title
from cmjax.report.plots.timeline import layer_period, plot_timeline, timeline_title
from cmjax.report.plots.validation import plot_steps_compare, steps_compare_title

__all__ = [
    "ThroughputPoint",
    "latency_title",
    "layer_period",
    "load_curve_title",
    "node_bytes_title",
    "pareto_title",
    "placement_title",
    "plans_title",
    "plot_latency",
    "plot_load_curve",
    "plot_node_bytes",
    "plot_pareto",
    "plot_placement",
    "plot_plans",
    "plot_queues",
    "plot_rank_curve",
    "plot_search",
    "plot_step",
    "plot_steps_compare",
    "plot_throughput",
    "plot_timeline",
    "queues_title",
    "rank_curve_title",
    "search_title",
    "step_lanes",
    "step_title",
    "steps_compare_title",
    "throughput_title",
    "timeline_title",
]
