"""The built-in loads look like recorded ones."""

import numpy as np

from cmjax.placement import (
    Loads,
    Problem,
    example_family,
    greedy,
)


def test_the_example_family_is_spread_like_recorded_ones():
    counts = example_family(layers=8).counts
    hottest = (counts.max(-1) / counts.mean(-1)).mean(1)
    assert ((hottest > 5.6) & (hottest < 8.1)).all()
    busy = -np.sort(-counts, axis=-1)[..., :128]
    slope = np.polyfit(np.log(np.arange(1, 129)), np.log(busy).mean((0, 1)), 1)[0]
    assert -0.58 < slope < -0.42
    tokens = greedy(Problem(Loads(counts), 32, 32)).tokens_per_rank(counts)
    par = (tokens.max(-1) / tokens.mean(-1)).mean(1)
    assert 1.1 < par.mean() < 1.2 and 1.2 < par.max() < 1.35
