"""What people look at: tables for a terminal, figures, and pages to pass on."""

from cmjax.report.blocks import BLOCKS, block_of, roll_up
from cmjax.report.html import Section, write_page
from cmjax.report.placement_page import PlacementPage
from cmjax.report.plots import (
    ThroughputPoint,
    plot_load_curve,
    plot_node_bytes,
    plot_placement,
    plot_rank_curve,
    plot_step,
    plot_steps_compare,
    plot_throughput,
    plot_timeline,
)
from cmjax.report.tables import (
    comparison_table,
    key_value_table,
    placement_table,
    prediction_table,
    price_table,
    residual_table,
    sensitivity_table,
    validation_table,
)

__all__ = [
    "BLOCKS",
    "PlacementPage",
    "Section",
    "ThroughputPoint",
    "block_of",
    "comparison_table",
    "key_value_table",
    "placement_table",
    "plot_load_curve",
    "plot_node_bytes",
    "plot_placement",
    "plot_rank_curve",
    "plot_step",
    "plot_steps_compare",
    "plot_throughput",
    "plot_timeline",
    "prediction_table",
    "price_table",
    "residual_table",
    "roll_up",
    "sensitivity_table",
    "validation_table",
    "write_page",
]
