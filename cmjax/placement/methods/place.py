"""One door to every placement method, by name."""

import difflib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from cmjax.console import Progress
from cmjax.placement.methods.contiguous import contiguous
from cmjax.placement.methods.gradient import gradient
from cmjax.placement.methods.greedy import greedy, greedy_global, greedy_hierarchical
from cmjax.placement.methods.once_per_rank import take_apart
from cmjax.placement.methods.one_spare import one_spare
from cmjax.placement.methods.robust import robust
from cmjax.placement.methods.search import search
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
        progress: Progress | None,
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
    progress: Progress | None = None,
) -> Plan:
    """Solve a placement problem by the named method.

    Args:
      problem: loads, ranks, slots and objective. Dead ranks and layers with fewer slots are taken
        out of it first, so that no method has to know of them.
      method: a name in `METHODS`: search, gradient, robust, greedy, hierarchical, one-spare,
        contiguous, random, or one registered by the caller. Copies of an expert that it puts on
        one rank are taken apart.
      layer_time_s: priced time of the layer, `[..., ranks]` tokens to `[...]` seconds.
      seed: for methods that draw at random.
      seconds: wall-clock limit for methods that search.
      progress: told how far the search is, and the best time so far (`cmjax.console.Progress`).
    Raises: ValueError for an unknown method, with the names closest to it.

    >>> from cmjax.placement import Loads
    >>> problem = Problem(Loads([[60, 10, 20, 30]]), ranks=2, redundant=2)
    >>> plan = place(problem, "greedy", lambda tokens: 1e-6 * tokens.max(-1))
    >>> plan.tokens_per_rank(problem.loads.counts).tolist()
    [[[55.0, 65.0]]]
    """
    check_method(method)
    begin, parts = time.monotonic(), problem.dense()
    plans = []
    for index, (_, part) in enumerate(parts):
        left = None
        if seconds is not None:
            left = (seconds - (time.monotonic() - begin)) / (len(parts) - index)
        plan = METHODS[method](
            part, layer_time_s,
            seed=seed, seconds=left, progress=_of_part(progress, index, len(parts)),
        )  # fmt: skip
        if plan.doubles and plan.split is None:
            mean = part.loads.counts.mean(0)
            plan = replace(plan, expert_of_slot=take_apart(plan.expert_of_slot, mean, part.ranks))
        plans.append(plan)
    return problem.assemble(plans)


def _of_part(progress: Progress | None, index: int, parts: int) -> Progress | None:
    """The progress of one of several problems, as progress of all of them."""
    if progress is None or parts == 1:
        return progress

    def report(done: int, total: int, note: str) -> None:
        progress(index * total + done, parts * total, f"part {index + 1} of {parts}: {note}")

    return report


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
register_method("robust")(robust)


@register_method("random")
def _random(problem, layer_time_s, /, *, seed, seconds, progress):
    return shuffled(problem, seed=seed)


def _register_rule(name, rule):
    @register_method(name)
    def method(problem, layer_time_s, /, *, seed, seconds, progress):
        return rule(problem)


for _name, _rule in {
    "contiguous": contiguous,
    "greedy": greedy,
    "greedy-global": greedy_global,
    "hierarchical": greedy_hierarchical,
    "one-spare": one_spare,
}.items():
    _register_rule(_name, _rule)
