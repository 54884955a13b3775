"""Marks a model writes into its own code for the pricing reading; they change no number.

A mark is a `jax.named_scope` (or a named `jax.jit`), so it survives tracing, `vmap`, `grad` and
`shard_map`, and costs nothing when the program runs.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterator, Sequence

import jax

FUSED_PREFIX = "cm_fused_"
AHEAD = "issued-ahead"
_STREAM = re.compile(r"stream=(?P<name>[\w-]+),cube=(?P<cube>\d*),vector=(?P<vector>\d*)")


@contextlib.contextmanager
def stream(name: str, *, cube: int | None = None, vector: int | None = None) -> Iterator[None]:
    """Issue every operation traced inside on the stream `name`, with a share of a die's cores.

    Operations of one stream run in program order; streams overlap.

    Args:
      name: letters, digits, `_` or `-`.
      cube: cube cores (AIC) the stream owns; `None` means all of the die's.
      vector: vector cores (AIV) the stream owns; `None` means all of the die's.
    Raises:
      ValueError: a malformed name or a core count below one.
    """
    if not re.fullmatch(r"[\w-]+", name):
        raise ValueError(f"stream: name must be letters, digits, '_' or '-', got {name!r}")
    for argument, cores in (("cube", cube), ("vector", vector)):
        if cores is not None and cores < 1:
            raise ValueError(f"stream: {argument} must be at least 1 core, got {cores}")
    shares = f"cube={'' if cube is None else cube},vector={'' if vector is None else vector}"
    with jax.named_scope(f"stream={name},{shares}"):
        yield


def parse_stream(part: str) -> tuple[str, int | None, int | None] | None:
    """Read one element of a name stack as `(name, cube, vector)`; `None` if it is no stream."""
    found = _STREAM.fullmatch(part)
    if found is None:
        return None
    cube, vector = found["cube"], found["vector"]
    return found["name"], int(cube) if cube else None, int(vector) if vector else None


def ahead() -> contextlib.AbstractContextManager:
    """Let a loop issue what is traced inside an iteration ahead: once what it reads of the one
    before is there, and before its stream would wait for another (`cmjax.program.pipelining`)."""
    return jax.named_scope(AHEAD)


@contextlib.contextmanager
def trip_count(iterations: int) -> Iterator[None]:
    """Declare how often a `lax.while_loop` traced inside runs; a price needs the number."""
    if iterations < 1:
        raise ValueError(f"trip_count: iterations must be at least 1, got {iterations}")
    with jax.named_scope(f"trips={iterations}"):
        yield


def fused(name: str) -> Callable[[Callable], Callable]:
    """Declare a function to be one kernel: what it computes inside never goes to HBM.

    The kernel's cost is derived from the function's own body: cube and vector work is the sum of
    its operations, HBM traffic is its arguments and results, and it is launched once. When the
    program runs, the function is an ordinary jitted function; of its inside, the backward pass
    finds the matrix products, and computes the rest again.
    """

    def decorate(fn: Callable) -> Callable:
        body = jax.checkpoint(fn, policy=jax.checkpoint_policies.dots_saveable)

        @functools.wraps(fn)
        def kernel(*args, **kwargs):
            plain = jax.config.jax_disable_jit  # then values are wanted; checkpoint always traces
            return (fn if plain else body)(*args, **kwargs)

        kernel.__name__ = kernel.__qualname__ = FUSED_PREFIX + name
        return jax.jit(kernel)

    return decorate


def permuted(
    x: jax.Array, axis: str, pairs: Sequence[tuple[int, int]], *, fill: int | None = None
) -> jax.Array:
    """`lax.ppermute` between some ranks of an axis.

    Args:
      x: what every rank would send. axis: its mesh axis.
      pairs: (source, destination); who is no destination gets what nobody should read.
      fill: size of an axis of `jax.vmap`, which permutes all ranks or none: the pairs that are
        missing are added, under a mark by which a count of bytes leaves them out.
    """
    if fill is None:
        return jax.lax.ppermute(x, axis, pairs)
    sources, destinations = zip(*pairs, strict=True)
    idle = [rank for rank in range(fill) if rank not in sources]
    rest = [rank for rank in range(fill) if rank not in destinations]
    with jax.named_scope(f"receive={'-'.join(map(str, destinations))}"):
        return jax.lax.ppermute(x, axis, [*pairs, *zip(idle, rest, strict=True)])


def parse_receivers(name_stack: str) -> list[int] | None:
    """The destinations that `permuted` marked, of an equation's name stack; `None` without."""
    found = re.search(r"receive=([\d-]+)", name_stack)
    return None if found is None else [int(rank) for rank in found[1].split("-")]
