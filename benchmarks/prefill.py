"""Prefill on this CPU: how near it comes to the rate of its products alone.

    python -m benchmarks.prefill                                # Qwen3-MoE, 4 prompts of 128 tokens
    python -m benchmarks.prefill --family deepseek --requests 16 --arithmetics bfloat16

Every product of the program, of matrices, of rows by group and of attention, is also compiled and
timed by itself, at the same shapes and with as many rows for every group; program and products
take turns in one process (see `timing`); one thread: pinned to a core, CPU time; more: wall time.

    share = sum over products of the least time alone / least time of the prefill
"""

import collections
import dataclasses
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr
from rich.table import Table

from benchmarks.generate_models import DEEPSEEK, QWEN, Family
from benchmarks.timing import least_times
from cmjax.console import terminal
from cmjax.cores import keep_to_cores, usable_cores
from cmjax.interrupt import leave
from cmjax.models import moe
from cmjax.models.moe.generation.batch import RequestBatch, Sampler
from cmjax.models.moe.generation.open import GeneratorOptions
from cmjax.models.moe.parallelism import one_rank
from cmjax.models.moe.steps import abstract_params, prefill_fn
from cmjax.options import run_program
from cmjax.primitives.define import reference_of
from cmjax.primitives.one_device import on_one_device_p

_PREFILL = "prefill"
_PRODUCTS = ("dot_general", "cm_stacked_dot", "cm_grouped_dot", "cm_attention")


@dataclasses.dataclass(frozen=True)
class Product:
    """An equation that multiplies, by what its time depends on."""

    primitive: Any
    operands: tuple[tuple[tuple[int, ...], str], ...]
    params: tuple[tuple[str, Any], ...]

    def run(self) -> Callable[[], object]:
        """A call that computes it on random numbers."""
        rng = np.random.default_rng(0)
        operands = [_random(rng, shape, dtype) for shape, dtype in self.operands]
        if self.primitive.name == "cm_grouped_dot":
            (rows, _), (groups,) = self.operands[0][0], self.operands[2][0]
            operands[2] = np.full(groups, rows // groups, np.int32)
            operands[2][: rows % groups] += 1
        operands = [jnp.asarray(each) for each in operands]
        bound = jax.jit(functools.partial(self.primitive.bind, **dict(self.params)))
        return lambda: jax.block_until_ready(bound(*operands))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is timed."""

    family: Family = "qwen"
    """Of `benchmarks.generate`."""
    arithmetics: tuple[str, ...] = ("float32", "bfloat16", "int8")
    """As of `cmjax generate`, but none of multi-scale products."""
    requests: int = 4
    """Prompts."""
    prompt: int = 128
    """Tokens of each."""
    layers: int = 3
    """Of the model."""
    threads: int = 1
    """Cores to run on."""
    seconds: float = 20.0
    """How long each arithmetic is repeated."""

    def __post_init__(self):
        if min(self.requests, self.prompt, self.layers, self.threads) < 1 or not self.seconds > 0:
            raise ValueError(
                "--requests, --prompt, --layers and --threads must be at least 1 and --seconds "
                f"positive, got {self.requests}, {self.prompt}, {self.layers}, {self.threads} and "
                f"{self.seconds}"
            )
        if unknown := [name for name in self.arithmetics if "msd" in name or "pasa" in name]:
            raise ValueError(f"--arithmetics: no {unknown[0]!r} here: float32, bfloat16 or int8")


def main(options: Options) -> None:
    """Time and print."""
    keep_to_cores(usable_cores()[-options.threads :])
    console = terminal()
    clock = "CPU" if options.threads == 1 else "wall"
    table = Table(
        title=f"{options.family}, {options.layers} layers, {options.requests} prompts of "
        f"{options.prompt} tokens; {options.threads} thread(s), {clock} time"
    )
    for column in ("", "prefill, ms", "products alone, ms", "of these attention", "share"):
        table.add_column(column, justify="right")
    for arithmetic in options.arithmetics:
        run, counts = _prefill(arithmetic, options)
        runs = {_PREFILL: run} | {product: product.run() for product in counts}
        least = least_times(runs, options.seconds, options.threads)
        alone = {product: count * least[product] for product, count in counts.items()}
        attention = sum(t for p, t in alone.items() if p.primitive.name == "cm_attention")
        times = (least[_PREFILL], sum(alone.values()), attention)
        share = sum(alone.values()) / least[_PREFILL]
        table.add_row(arithmetic, *(f"{1e3 * each:.1f}" for each in times), f"{share:.0%}")
    console.print(table)


def _prefill(
    arithmetic: str, options: Options
) -> tuple[Callable[[], object], "collections.Counter[Product]"]:
    """A call of the program that `cmjax generate` runs, and its products."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = QWEN if options.family == "qwen" else DEEPSEEK
        path = Path(folder) / "config.json"
        path.write_text(json.dumps(sizes | {"num_hidden_layers": options.layers}))
        config = moe.load_config(path)
    generator = moe.open_generator(
        config,
        options=GeneratorOptions(arithmetic=arithmetic, drafts=0),
        requests=options.requests,
        prompt_tokens=options.prompt,
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, config.vocab_size, (options.requests, options.prompt)).tolist()
    batch = RequestBatch.of(prompts, options.prompt, 1, 1, 0, Sampler())
    shape = generator.sizes(
        requests=options.requests, prompt=options.prompt, room=options.prompt + 1, greedy=True
    )
    program, inputs = generator.prefilling(shape).run, batch.prefill_inputs()
    alone = dataclasses.replace(one_rank(config), sort_rows=True)
    fn = prefill_fn(config, alone, generator.precision, generator.kv_cache)
    params = abstract_params(config, alone, generator.precision)
    of_rank = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), inputs)
    closed = jax.make_jaxpr(fn)(params, of_rank)
    return lambda: program(generator.used_params, inputs), collections.Counter(_products(closed))


def _products(jaxpr: ClosedJaxpr | Jaxpr, times: int = 1) -> Iterator[Product]:
    """Every product that running a jaxpr computes, as often as it does."""
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name in _PRODUCTS:
            avals = [cast(Any, v.aval) for v in equation.invars]
            operands = tuple((aval.shape, aval.dtype.name) for aval in avals)
            product = Product(equation.primitive, operands, tuple(sorted(params.items())))
            yield from [product] * times
        elif equation.primitive is on_one_device_p:
            form = reference_of(on_one_device_p)
            assert form is not None, "it is defined by one"
            sorted_rows = functools.partial(form, **params)
            closed = jax.make_jaxpr(sorted_rows)(*(v.aval for v in equation.invars))
            yield from _products(closed, times)
        else:
            inner = times * (params["length"] if name == "scan" else 1)
            leaves = jax.tree.leaves(
                list(params.values()), is_leaf=lambda x: isinstance(x, Jaxpr | ClosedJaxpr)
            )
            for leaf in leaves:
                if isinstance(leaf, Jaxpr | ClosedJaxpr):
                    yield from _products(leaf, inner)


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if np.issubdtype(jnp.dtype(dtype), np.integer):
        return rng.integers(-127, 128, shape).astype(dtype)
    return rng.standard_normal(shape, np.float32).astype(jnp.dtype(dtype))


if __name__ == "__main__":
    leave(run_program(main, Options, __doc__))
