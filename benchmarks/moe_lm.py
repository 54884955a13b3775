"""Training a mixture of experts on this CPU: how near a step comes to its matrix products alone.

    python -m benchmarks.moe_lm                         # one thread, the sizes of train.moe_lm
    python -m benchmarks.moe_lm --hidden 512 --threads 2

Every matrix product of the step's jaxpr (forward and backward, once per layer of a scan) is also
compiled and timed by itself, at the same shapes; step and products take turns in one process (see
`timing`); one thread: pinned to a core, CPU time; more: wall time.

    share = sum over products of the least time alone / least time of a step

Rows reserved for experts and not filled are part of the products, and of the step: of a capacity
factor of 1.5, a third.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from rich.table import Table

from benchmarks.timing import least_times
from cmjax.console import terminal
from cmjax.cores import keep_to_cores, usable_cores
from cmjax.interrupt import leave
from cmjax.mesh import RankMesh
from cmjax.options import run_program
from train.data.text import Windows, grammar_text
from train.moe.config import LanguageModelConfig
from train.moe.train_step import initial, make_step

STEP = "step"


@dataclass(frozen=True)
class Product:
    """A matrix product, by what its time depends on."""

    left: tuple[int, ...]
    right: tuple[int, ...]
    dtypes: tuple[str, str, str]
    dimension_numbers: Any

    @staticmethod
    def of(equation: JaxprEqn) -> "Product":
        """The product that a `dot_general` equation computes."""
        left, right, out = (cast(Any, var.aval) for var in (*equation.invars, equation.outvars[0]))
        dtypes = (left.dtype.name, right.dtype.name, out.dtype.name)
        return Product(left.shape, right.shape, dtypes, equation.params["dimension_numbers"])

    @property
    def flops(self) -> float:
        """Multiplications and additions."""
        (contract, _), (batch, _) = self.dimension_numbers
        reduced = math.prod(self.left[i] for i in (*contract, *batch))
        return 2.0 * math.prod(self.left) * math.prod(self.right) / reduced

    def run(self) -> Any:
        """A call that computes it on random numbers."""
        rng = np.random.default_rng(0)
        x, y = (
            jnp.asarray(rng.standard_normal(shape), dtype)
            for shape, dtype in zip((self.left, self.right), self.dtypes, strict=False)
        )
        dot = jax.jit(
            lambda x, y: lax.dot_general(
                x, y, self.dimension_numbers, preferred_element_type=self.dtypes[2]
            )
        )
        return lambda: dot(x, y).block_until_ready()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Training steps beside their matrix products."""

    config: tyro.conf.OmitArgPrefixes[LanguageModelConfig]
    threads: int = 1
    """Cores to run on."""
    seconds: float = 20.0
    """How long each is repeated."""


def main(options: Options) -> None:
    """Time and print."""
    config, threads, seconds = options.config, options.threads, options.seconds
    keep_to_cores(usable_cores()[-threads:])
    mesh = RankMesh.parse(config.mesh)
    if mesh.ranks != 1:
        raise ValueError(f"--mesh {config.mesh}: one rank is measured; use 1x1")
    tokens = Windows(grammar_text(seed=config.seed), config.length, config.seed).batch(
        0, config.batch
    )
    step, state = make_step(config, mesh), initial(config, mesh)
    counts = collections.Counter(products(jax.make_jaxpr(step)(state, tokens).jaxpr))

    def train_step():
        nonlocal state
        state, result = step(state, tokens)
        result.loss.block_until_ready()

    least = least_times({STEP: train_step} | {p: p.run() for p in counts}, seconds, threads)
    console = terminal()
    clock = "CPU" if threads == 1 else "wall"
    size = config.batch * config.length
    console.print(f"{threads} thread(s), {clock} time; {size} tokens a step")
    console.print(_table(counts, least))
    alone = sum(count * least[p] for p, count in counts.items())
    flops = sum(count * p.flops for p, count in counts.items())
    console.print(
        f"step {1e3 * least[STEP]:.1f} ms; its products alone {1e3 * alone:.1f} ms "
        f"({flops / alone / 1e9:.0f} GFLOP/s): the step runs at {alone / least[STEP]:.0%} of their "
        f"rate; {size / least[STEP]:,.0f} tokens/s",
        highlight=False,
    )


def products(jaxpr: Jaxpr, times: int = 1) -> Iterator[Product]:
    """Every matrix product that running `jaxpr` computes, as often as it does."""
    for equation in jaxpr.eqns:
        if equation.primitive is lax.dot_general_p:
            yield from [Product.of(equation)] * times
        inner = times * (equation.params["length"] if equation.primitive.name == "scan" else 1)
        for value in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr))
        ):
            if isinstance(value, ClosedJaxpr):
                yield from products(value.jaxpr, inner)
            elif isinstance(value, Jaxpr):
                yield from products(value, inner)


def _table(counts: "collections.Counter[Product]", least: dict) -> Table:
    table = Table(title="Matrix products of a training step, each alone")
    for column in ("left", "right"):
        table.add_column(column)
    for column in ("times", "GFLOP/s", "ms in all"):
        table.add_column(column, justify="right")
    for product, count in sorted(counts.items(), key=lambda item: -item[1] * least[item[0]])[:12]:
        table.add_row(
            "x".join(map(str, product.left)),
            "x".join(map(str, product.right)),
            str(count),
            f"{product.flops / least[product] / 1e9:.0f}",
            f"{1e3 * count * least[product]:.2f}",
        )
    return table


if __name__ == "__main__":
    leave(run_program(main, Options, __doc__))
