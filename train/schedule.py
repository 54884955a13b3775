"""Learning rates over a run."""

import optax


def warmed_up(peak: float, steps: int) -> optax.Schedule:
    """A rate that warms up to `peak` over a tenth of the steps and falls as a cosine to a tenth.

    >>> rate = warmed_up(1.0, 100)
    >>> [round(float(rate(step)), 2) for step in (0, 10, 100)]
    [0.1, 1.0, 0.1]
    """
    warm = max(1, steps // 10)
    return optax.warmup_cosine_decay_schedule(
        peak / warm, peak, warm, max(steps, warm + 1), peak / 10
    )
