"""One door to every placement method, by name."""

import difflib
import time
from collections.abc import Callable
from typing import Protocol

from cmjax.placement.methods.contiguous import contiguous
from cmjax.placement.methods.gradient import gradient
from cmjax.placement.methods.greedy import greedy, greedy_global, greedy_hierarchical
from cmjax.placement.methods.one_spare import one_spare
from cmjax.placement.methods.search import OnStep, search
from cmjax.placement.methods.shuffled import shuffled
from cmjax.placement.pricing import LayerTime
from cmjax.placement.problem import Plan, Problem


class Method(Protocol):
    """A placement method: a problem and its price in, a plan out. All slots are usable."""

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
      problem: loads, ranks, slots and objective. Dead ranks and layers with fewer slots are taken
        out of it first, so that no method has to know of them.
      method: a name in `METHODS`: search, gradient, greedy, hierarchical, one-spare, contiguous,
        random, or one registered by the caller.
      layer_time_s: priced time of the layer, `[..., ranks]` tokens to `[...]` seconds.
      seed: for methods that draw at random.
      seconds: wall-clock limit for methods that search.
      on_step: progress, called as `on_step(done, total, best_s)`.
    Raises: ValueError for an unknown method, with the names closest to it.
    """
    check_method(method)
    begin, parts = time.monotonic(), problem.dense()
    plans, before = [], 0.0
    for index, (_, part) in enumerate(parts):
        left = None
        if seconds is not None:
            left = (seconds - (time.monotonic() - begin)) / (len(parts) - index)
        best = 0.0

        def report(done, total, found, *, index=index, before=before):
            nonlocal best
            best = found
            if on_step is not None:
                on_step(index * total + done, len(parts) * total, before + found)

        plans.append(METHODS[method](part, layer_time_s, seed=seed, seconds=left, on_step=report))
        before += best
    return problem.assemble(plans)


def check_method(method: str) -> None:
    """Raise ValueError, with the closest names, unless `method` is registered."""
    if method not in METHODS:
        close = difflib.get_close_matches(method, METHODS, n=2)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(
            f"place: unknown method {method!r}; {hint}known methods: {', '.join(sorted(METHODS))}"
        )


register_method("search")(search)
register_method("gradient")(gradient)


@register_method("random")
def _random(problem, layer_time_s, /, *, seed, seconds, on_step):
    return shuffled(problem, seed=seed)


def _register_rule(name, rule):
    @register_method(name)
    def method(problem, layer_time_s, /, *, seed, seconds, on_step):
        return rule(problem)


for _name, _rule in {
    "contiguous": contiguous,
    "greedy": greedy,
    "greedy-global": greedy_global,
    "hierarchical": greedy_hierarchical,
    "one-spare": one_spare,
}.items():
    _register_rule(_name, _rule)
