"""Time of PASA on this CPU beside `jax.nn.dot_product_attention` in float32, and of emulating fp16.

    taskset -c 0 python -m benchmarks.pasa [--repeats 15]

One thread; candidates take turns in one process; the smallest process CPU time of each counts.
Ratios are to `jax.nn.dot_product_attention` at the same shape. In "fp32" nothing is emulated: that
is the cost of the algorithm. The half precisions are emulated, so their ratios say what a study of
accuracy costs here, nothing about an NPU.
"""

import dataclasses
import functools
import os
from collections.abc import Callable

from cmjax.interrupt import leave

# Before JAX starts: two threads of one process would share what is being measured.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"


import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from benchmarks.timing import least_times
from cmjax.console import terminal
from cmjax.options import run_program
from cmjax.primitives import flash_attention, pasa_attention


@dataclasses.dataclass(frozen=True)
class Shape:
    """One comparison: q [batch, queries, heads, d] against kv_heads heads of `keys` keys."""

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    d: int
    causal: bool = False

    def operands(self) -> list[jax.Array]:
        rng = np.random.default_rng(0)
        key = (self.batch, self.keys, self.kv_heads, self.d)
        shapes = ((self.batch, self.queries, self.heads, self.d), key, key)
        return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


SHAPES = (
    Shape("prefill, 1,024 tokens", 1, 1024, 1024, 8, 8, 128),
    Shape("prefill, causal", 1, 1024, 1024, 8, 8, 128, causal=True),
    Shape("prefill, 2,048 tokens, GQA 8:2", 1, 2048, 2048, 8, 2, 64),
    Shape("prefill, 1,407 tokens, GQA 28:4", 1, 1407, 1407, 28, 4, 128),
    Shape("batch of 4 × 256 tokens", 4, 256, 256, 8, 8, 64),
    Shape("decode, 8 × 2,048 keys, GQA 32:8", 8, 1, 2048, 32, 8, 128),
    Shape("decode, 8 × 2,048 keys, MQA 32:1", 8, 1, 2048, 32, 1, 128),
)
GRADIENT = (Shape("gradient, 1,024 tokens", 1, 1024, 1024, 4, 4, 64, causal=True),)


def candidates(causal: bool) -> dict[str, Callable]:
    """The baseline first."""

    def pasa(precision, **options):
        return functools.partial(pasa_attention, precision=precision, causal=causal, **options)

    return {
        "jax.nn": functools.partial(jax.nn.dot_product_attention, is_causal=causal),
        "flash fp32": functools.partial(flash_attention, precision="fp32", causal=causal),
        "PASA fp32": pasa("fp32"),
        "PASA fp16": pasa("fp16"),
        "PASA fp16 published": pasa("fp16", statistics="storage"),
        "PASA bf16": pasa("bf16"),
    }


def run_of(f: Callable, operands) -> Callable[[], object]:
    """A call of `f`, compiled."""
    compiled = jax.jit(f).lower(*operands).compile()
    return lambda: jax.block_until_ready(compiled(*operands))


def gradient_of(f: Callable) -> Callable:
    return jax.grad(lambda q, k, v: jnp.sum(f(q, k, v) ** 2), (0, 1, 2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of this benchmark."""

    repeats: int = 15
    """Rounds over which the smallest time is taken."""


def main(options: Options) -> None:
    names = list(candidates(False))
    table = Table("ratio to jax.nn in float32, one thread", f"{names[0]} ms", *names[1:])
    for shape in SHAPES + GRADIENT:
        functions = candidates(shape.causal)
        if shape in GRADIENT:
            functions = {name: gradient_of(f) for name, f in functions.items()}
        operands = shape.operands()
        runs = {name: run_of(f, operands) for name, f in functions.items()}
        best = least_times(runs, seconds=0, rounds=options.repeats, calls=1)  # some take a second
        base = best[names[0]]
        table.add_row(
            shape.name, f"{base * 1e3:.1f}", *(f"{best[name] / base:.2f}" for name in names[1:])
        )
    terminal().print(table)


if __name__ == "__main__":
    leave(run_program(main, Options, __doc__))
