"""One door to every placement method, by name."""

import difflib
from collections.abc import Callable
from typing import Protocol

from cmjax.placement.contiguous import contiguous
from cmjax.placement.gradient import gradient
from cmjax.placement.greedy import greedy
from cmjax.placement.pricing import LayerTime
from cmjax.placement.problem import Plan, Problem

OnStep = Callable[[int, int, float], None]


class Method(Protocol):
    """A placement method: a problem and its price in, a plan out."""

    def __call__(
        self,
        problem: Problem,
        layer_time_s: LayerTime,
        /,
        *,
        seed: int,
        seconds: float | None,
        on_step: OnStep | None,
    ) -> Plan: ...


METHODS: dict[str, Method] = {}


def register_method(name: str) -> Callable[[Method], Method]:
    """Make a method available to `place` and to whatever lists `METHODS`.

    Raises: ValueError if the name is taken.
    """

    def decorate(method: Method) -> Method:
        if name in METHODS:
            raise ValueError(f"register_method: {name!r} is already a placement method")
        METHODS[name] = method
        return method

    return decorate


def place(
    problem: Problem,
    method: str,
    layer_time_s: LayerTime,
    *,
    seed: int = 0,
    seconds: float | None = None,
    on_step: OnStep | None = None,
) -> Plan:
    """Solve a placement problem by the named method.

    Args:
      problem: loads, ranks and slots.
      method: a name in `METHODS`: gradient, greedy, contiguous, or one registered by the caller.
      layer_time_s: priced time of the layer, `[..., ranks]` tokens to `[...]` seconds.
      seed: for methods that draw at random.
      seconds: wall-clock limit for methods that search.
      on_step: progress, called as `on_step(done, total, best_time_s)`.
    Raises: ValueError for an unknown method, with the names closest to it.
    """
    check_method(method)
    return METHODS[method](problem, layer_time_s, seed=seed, seconds=seconds, on_step=on_step)


def check_method(method: str) -> None:
    """Raise ValueError, with the closest names, unless `method` is registered."""
    if method not in METHODS:
        close = difflib.get_close_matches(method, METHODS, n=2)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"place: unknown method {method!r}; {hint}known methods: {', '.join(sorted(METHODS))}"
        )


register_method("gradient")(gradient)


@register_method("greedy")
def _greedy(problem, layer_time_s, /, *, seed, seconds, on_step):
    return greedy(problem)


@register_method("contiguous")
def _contiguous(problem, layer_time_s, /, *, seed, seconds, on_step):
    return contiguous(problem)
