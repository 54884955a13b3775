"""Waiting for the slowest rank: ranks do not arrive at an exchange together.

A rank's arrival differs from the others' by what its work since the last exchange took more or
less. With independent causes, after work of t seconds of which u are attention,

    sigma^2 = jitter * t  +  (spread * u)^2      wait = z(R) * sigma,   z(R) = E max of R N(0,1)

The first term is jitter that accumulates like a random walk, the second requests whose contexts
differ between ranks. The third cause, expert load, is in the work itself, which is that of the rank
with most rows: L seconds longer than a mean rank's. The last rank need not be that one, so that it
is waited for sqrt(wait^2 + L^2) - L longer, as maxima of independent normal causes add up.

Nobody ends an exchange before the last rank has arrived, so exchanges reset the differences. On one
stream the wait stands before the exchange. Where another stream does the work, its wait is on the
dependency between the two, so that a stream which is busy with another microbatch hides it.

The ranks of a tensor-parallel group meet among themselves more often than all ranks do. After each
of those meetings the group goes on as late as its last member, so that groups differ by maxima of n
ranks, whose variance is v(n) sigma^2; they add up until all R ranks meet, first those of a group
and then the groups,

    wait = z(n) sigma + z(R / n) sqrt(w sigma^2 + sum over the group's meetings of v(n) sigma_j^2)

with w such that it is z(R) sigma where groups have not met.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float

from cmjax.hardware import Supernode
from cmjax.program import Program

Scalar = float | Float[Array, ""]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Differences:
    """How the work of ranks differs beyond jitter.

    Fields:
      attention: standard deviation over ranks of the time in attention, over its mean.
      load: rows of experts on the rank that has most, over their mean.
    """

    attention: Scalar = 0.0
    load: Scalar = 1.0


NONE = Differences()
"""Ranks that differ by jitter alone."""


@functools.lru_cache(maxsize=256)
def expected_maximum(ranks: int) -> float:
    """The mean of the largest of `ranks` independent standard normal variables, by quadrature.

    >>> round(expected_maximum(1), 6), round(expected_maximum(2), 6)  # 0 and 1 / sqrt(pi)
    (0.0, 0.56419)
    """
    return _maximum_moment(ranks, 1)


@functools.lru_cache(maxsize=256)
def variance_of_maximum(ranks: int) -> float:
    """The variance of the largest of `ranks` independent standard normal variables.

    >>> round(variance_of_maximum(1), 6), round(variance_of_maximum(2), 6)  # 1 and 1 - 1 / pi
    (1.0, 0.68169)
    """
    return _maximum_moment(ranks, 2) - expected_maximum(ranks) ** 2


def _maximum_moment(ranks: int, power: int) -> float:
    x = np.linspace(-12.0, 12.0, 24001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    below = np.clip(np.cumsum(density) * (x[1] - x[0]) - density * (x[1] - x[0]) / 2, 0.0, 1.0)
    return float(np.sum(x**power * ranks * below ** (ranks - 1) * density) * (x[1] - x[0]))


def wait_s(work_s, ranks: int, machine: Supernode, spread_s: Float[ArrayLike, "*operations"] = 0.0):
    """Mean wait for the last of `ranks` that come from `work_s` seconds of work.

    Args:
      spread_s: standard deviation of their arrivals besides jitter.
    """
    variance = machine.exchange.jitter_s * work_s + jnp.square(jnp.asarray(spread_s))
    return machine.factors.waiting * expected_maximum(ranks) * _root(variance)


def _root(x):
    """Square root with a finite derivative at zero."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1.0)), 0.0)


def waits_s(program: Program, total, excess, machine: Supernode, differences: Differences):
    """The wait that every operation of a level adds, to itself or to who waits for it.

    Args:
      total: seconds per operation, [operations]. excess: of them, those that a rank with the mean
        load of experts would not need, if the operation is of experts.
    Returns: (at, after), [operations]: at an exchange, for the work before it on its own stream;
      after a kernel, for another stream that needs its result.
    """
    static = _static(program)
    if static is None:
        return jnp.zeros_like(total), jnp.zeros_like(total)
    parts = total, static.attention * total, static.of_experts * excess
    work, attention, longer = (static.since @ jnp.stack(parts, -1)).T
    variance = machine.exchange.jitter_s * work + jnp.square(differences.attention * attention)
    groups = static.groups @ variance
    among_groups = static.last_group * _root(groups + static.share * variance)
    wait = machine.factors.waiting * (static.last * _root(variance) + among_groups)
    wait = _root(jnp.square(wait) + jnp.square(longer)) - longer
    return jnp.where(static.meets, wait, 0.0), jnp.where(static.meets, 0.0, wait)


@dataclasses.dataclass(frozen=True)
class _Static:
    """What does not change with sizes or constants of the machine.

    Fields:
      since: [operations, operations], 1 for the work before an exchange (or up to and with a
        kernel) since ranks of its stream last met others.
      groups: likewise, the variance that a meeting of a group since all ranks met left.
      last: per operation, z of the ranks that meet first; last_group: z of the groups that meet
        then; share: of the first ones' variance, what groups differ by.
      attention, of_experts, meets: which operations are such; rows of experts are what was
        dispatched and not yet combined.
    """

    since: np.ndarray
    groups: np.ndarray
    last: np.ndarray
    last_group: np.ndarray
    share: np.ndarray
    attention: np.ndarray
    of_experts: np.ndarray
    meets: np.ndarray


@functools.lru_cache(maxsize=256)
def _static(program: Program) -> _Static | None:
    operations = program.operations
    ranks = max((op.work.ranks for op in operations if op.loop is None), default=1)
    if ranks < 2:
        return None
    meets = np.array([op.loop is None and op.work.ranks > 1 for op in operations])
    of_all = np.array([op.loop is None and op.work.ranks == ranks for op in operations])
    since = np.zeros((len(operations), len(operations)))
    groups = np.zeros_like(since)
    work: dict[str, list[int]] = {}
    met: dict[str, list[int]] = {}  # meetings of groups since all ranks met
    seen: dict[str, set] = {}
    for i, op in enumerate(operations):
        name = op.stream.name
        known = seen.setdefault(name, set())
        new = [s for s in op.sources if s not in known]
        known |= set(new)
        if any(s.index >= 0 if s.op is None else meets[s.op] for s in new) or op.loop is not None:
            work[name] = []
        if any(s.index >= 0 if s.op is None else of_all[s.op] for s in new) or op.loop is not None:
            met[name] = []
        mine, groups_met = work.setdefault(name, []), met.setdefault(name, [])
        if op.loop is None and not meets[i]:
            mine.append(i)
        since[i, mine] = 1.0
        if of_all[i] or not meets[i]:
            for j in groups_met:
                groups[i, j] = variance_of_maximum(operations[j].work.ranks)
        if meets[i]:
            work[name] = []
            met[name] = [] if of_all[i] else [*groups_met, i]
    attention = np.array([op.work.kind == "attention" for op in operations])
    of_experts = np.zeros(len(operations), bool)
    for i, op in enumerate(operations):
        before = [s.op for s in op.sources if s.op is not None]
        sent = any(of_experts[j] or operations[j].work.kind == "dispatch" for j in before)
        of_experts[i] = sent and not meets[i] and op.loop is None
    smallest = min(op.work.ranks for op, m in zip(operations, meets, strict=True) if m)
    # a kernel's result may be waited for by all ranks, on another stream
    first = np.array(
        [op.work.ranks if m else ranks for op, m in zip(operations, meets, strict=True)]
    )
    first = np.where(first == ranks, smallest, first)
    then = np.where(of_all | ~meets, ranks // smallest, 1)
    last, last_group, whole = (
        np.array([expected_maximum(int(n)) for n in each])
        for each in (first, then, np.where(of_all | ~meets, ranks, first))
    )
    share = np.square((whole - last) / np.where(last_group > 0, last_group, 1.0))
    return _Static(
        since=since,
        groups=groups,
        last=last,
        last_group=last_group,
        share=share,
        attention=attention,
        of_experts=of_experts,
        meets=meets,
    )
