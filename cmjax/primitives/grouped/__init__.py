"""Products of rows with the matrix of their group: dense layers, and experts that read only the
matrices that rows go to."""

from cmjax.primitives.grouped.msd import grouped_msd_dot
from cmjax.primitives.grouped.product import grouped_dot
from cmjax.primitives.grouped.stacked import stacked_dot

__all__ = ["grouped_dot", "grouped_msd_dot", "stacked_dot"]
