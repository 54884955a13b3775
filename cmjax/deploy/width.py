"""What the width of an interval comes from, and which measurement would narrow it most."""

import numpy as np

from cmjax.cost.interval import Interval

_MEASURE = {
    "exchange.dispatch_startup_s": "dispatch of 8 tokens a rank",
    "exchange.combine_startup_s": "combine of 8 tokens a rank",
    "exchange.jitter_s": "the mean wait for the last rank at a dispatch in service",
    "exchange.saturation_cores": "the bandwidth of a dispatch on 1, 8 and 48 vector cores",
    "exchange.bulk_source_s": "a dispatch of 4,096 tokens at two numbers of ranks",
    "exchange.bandwidth": "a combine of 512 tokens a rank",
    "exchange.bandwidth_from_hbm": "a combine of 4,096 tokens a rank",
    "exchange.interference": "a matrix product beside an exchange",
    "efficiency.gemm": "a matrix product of 4,096 rows",
    "efficiency.attention": "decode attention of 64 requests with a draft",
    "efficiency.hbm": "decode attention of 128 requests with 16 heads",
    "chip.matrix_startup_s": "a matrix product of 16 rows",
    "chip.attention_startup_s": "decode attention of one short request",
    "chip.vector_startup_s": "a norm of 16 rows",
    "chip.collective_startup_s": "an all-gather of 1 KB",
    "factors.exchange": "dispatch and combine at these tokens and ranks",
    "factors.waiting": "the mean wait for the last rank at a dispatch in service",
    "factors.matrix": "the matrix products of a layer at these rows",
    "factors.attention": "attention at these lengths",
    "factors.vector": "the kernels between the matrix products",
    "factors.collective": "the collectives of attention",
}


def explain(found: Interval) -> str:
    """One sentence: the measurement that would narrow an interval most, and by how much.

    Constants that one measurement would settle are taken together, and the rest of the variance
    stays.
    """
    groups: dict[str, float] = {}
    for key, share in found.shares.items():
        what = _MEASURE.get(key)
        if what is None:
            engine, _, name = key.rpartition(".")
            what = f"{name} of {engine.removeprefix('engines.')}" if "engines" in key else key
        groups[what] = groups.get(what, 0.0) + share
    if not groups:
        return ""
    what, share = max(groups.items(), key=lambda entry: entry[1])
    narrower = 1 - np.sqrt(max(1 - share, 0.0))
    return f"measure {what}, and the interval narrows by {narrower:.0%}"
