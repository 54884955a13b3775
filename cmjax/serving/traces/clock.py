"""Seconds from whatever a trace counts its times in.

A time since 1970 says its unit by its size: from 2001 to 2286 it has 10 digits in seconds, 13 in
milliseconds, 16 in microseconds and 19 in nanoseconds. Any other time is in the unit of its column.
"""

_EPOCH = ((1e9, 1.0), (1e12, 1e-3), (1e15, 1e-6), (1e18, 1e-9))


class Clock:
    """Times of one column in seconds.

    Args:
      unit_s: of the column. sure: whether its name says so; else a first time since 1970 decides.
      from_first: whether times count from the first one; those since 1970 do in any case.

    >>> clock = Clock(1e-3)
    >>> clock.seconds(1_700_000_000), clock.seconds(1_700_000_002)  # since 1970, in seconds
    (0.0, 2.0)
    >>> Clock(1e-3).seconds(3000)
    3.0
    """

    def __init__(self, unit_s: float, *, sure: bool = False, from_first: bool = False):
        self.unit_s, self.sure, self.from_first = unit_s, sure, from_first
        self.zero: float | None = None

    def seconds(self, given: float) -> float:
        """Of one time after another."""
        if self.zero is None:
            since_1970 = [] if self.sure else [u for low, u in _EPOCH if low <= given < 10 * low]
            self.unit_s = since_1970[0] if since_1970 else self.unit_s
            self.zero = given if since_1970 or self.from_first else 0
        return float(given - self.zero) * self.unit_s
