"""Waiting for the slowest rank: ranks do not arrive at an exchange together.

A rank's arrival differs from the others' by what its work since the last exchange took more or
less. With independent causes, after work of t seconds of which u are attention,

    sigma^2 = jitter * t  +  (spread * u)^2      wait = z(R) * sigma,   z(R) = E max of R N(0,1)

The first term is jitter that accumulates like a random walk, the second requests whose contexts
differ between ranks. (The third cause, expert load, is in the work of the slowest rank itself.)
Nobody ends an exchange before the last rank has arrived, so exchanges reset the differences. On
one stream the wait stands before the exchange. Where another stream does the work, its wait is on
the dependency between the two, so that a stream which is busy with another microbatch hides it.
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
    """

    attention: Scalar = 0.0


NONE = Differences()
"""Ranks that differ by jitter alone."""


@functools.lru_cache(maxsize=256)
def expected_maximum(ranks: int) -> float:
    """The mean of the largest of `ranks` independent standard normal variables, by quadrature.

    >>> round(expected_maximum(1), 6), round(expected_maximum(2), 6)  # 0 and 1 / sqrt(pi)
    (0.0, 0.56419)
    """
    x = np.linspace(-12.0, 12.0, 24001)
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    below = np.clip(np.cumsum(density) * (x[1] - x[0]) - density * (x[1] - x[0]) / 2, 0.0, 1.0)
    return float(np.sum(x * ranks * below ** (ranks - 1) * density) * (x[1] - x[0]))


def wait_s(work_s, ranks: int, machine: Supernode, spread_s: Float[ArrayLike, "*operations"] = 0.0):
    """Mean wait for the last of `ranks` that come from `work_s` seconds of work.

    Args:
      spread_s: standard deviation of their arrivals besides jitter.
    """
    variance = machine.exchange.jitter_s * work_s + jnp.square(jnp.asarray(spread_s))
    positive = variance > 0
    sigma = jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1.0)), 0.0)
    return expected_maximum(ranks) * machine.factors.waiting * sigma


def waits_s(program: Program, total, machine: Supernode, differences: Differences):
    """The wait that every operation of a level adds, to itself or to who waits for it.

    Args:
      total: seconds per operation, [operations].
    Returns: (at, after), [operations]: at an exchange, for the work before it on its own stream;
      after a kernel, for another stream that needs its result.
    """
    static = _static(program)
    if static is None:
        return jnp.zeros_like(total), jnp.zeros_like(total)
    since = static.since @ jnp.stack([total, jnp.where(static.attention, total, 0.0)], -1)
    work, attention = since[:, 0], since[:, 1]
    wait = wait_s(work, static.ranks, machine, differences.attention * attention)
    return jnp.where(static.meets, wait, 0.0), jnp.where(static.meets, 0.0, wait)


@dataclasses.dataclass(frozen=True)
class _Static:
    """since: [operations, operations], 1 for the work before an exchange (or up to and with a
    kernel) since its stream last met the others; ranks: how many meet."""

    since: np.ndarray
    attention: np.ndarray
    meets: np.ndarray
    ranks: int


@functools.lru_cache(maxsize=256)
def _static(program: Program) -> _Static | None:
    operations = program.operations
    ranks = max((op.work.ranks for op in operations if op.loop is None), default=1)
    if ranks < 2:
        return None
    meets = np.array([op.loop is None and op.work.ranks > 1 for op in operations])
    since = np.zeros((len(operations), len(operations)))
    work: dict[str, list[int]] = {}
    seen: dict[str, set] = {}
    for i, op in enumerate(operations):
        known = seen.setdefault(op.stream.name, set())
        new = [s for s in op.sources if s not in known]
        known |= set(new)
        together = [s for s in new if (s.index >= 0 if s.op is None else meets[s.op])]
        if together or op.loop is not None:
            work[op.stream.name] = []
        mine = work.setdefault(op.stream.name, [])
        if op.loop is None and not meets[i]:
            mine.append(i)
        since[i, mine] = 1.0
        if meets[i]:
            work[op.stream.name] = []
    attention = np.array([op.work.kind == "attention" for op in operations])
    return _Static(since, attention, meets, ranks)
