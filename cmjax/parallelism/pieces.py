"""The training step of a dense decoder, traced in pieces: a layer, the two ends, the optimizer.

Every piece is the Flax module that runs, differentiated by JAX and read as a `Program` with the
micro-batch as a symbol. What it keeps for its backward pass is read off its residuals.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.extend.core import Literal

from cmjax.models.dense import Block, DenseConfig, Embedding, Output, Recompute, TensorSplit
from cmjax.models.dense.model import own_words
from cmjax.parallelism.links import GROUPS
from cmjax.program import Operand, Program, Size, trace

BATCH = "micro_batch"
HALF = jnp.bfloat16


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """A part of the model on one rank.

    Fields:
      groups: ranks of those that its collectives are over (`links.GROUPS`).
      programs: traced when they are asked for. `forward`: its forward pass. `both`: that, its
        backward pass, and the accumulation of gradients. `inputs`: as `both`, without gradients of
        parameters (what a zero-bubble schedule sends on first).
      parameters: on the rank. kept: bytes it keeps of a micro-batch between the passes.
      passed: bytes of its input, by which it is made again when everything is recomputed.
    """

    groups: Mapping[str, int]
    programs: Mapping[str, Callable[[], Program]]
    parameters: int
    kept: Size
    passed: Size


def layer(model: DenseConfig, split: TensorSplit, recompute: Recompute, dtype: Any = HALF) -> Piece:
    """One transformer layer."""
    return _layer(model, split, recompute, dtype)


def embedding(model: DenseConfig, split: TensorSplit, dtype: Any = HALF) -> Piece:
    """Words and positions."""
    return _embedding(model, split, dtype)


def output(
    model: DenseConfig, split: TensorSplit, recompute: Recompute, dtype: Any = HALF
) -> Piece:
    """Final norm, query layer if there is one, and the loss."""
    return _output(model, split, recompute if model.query_layer else "none", dtype)


@functools.lru_cache(maxsize=512)
def _layer(model: DenseConfig, split: TensorSplit, recompute: Recompute, dtype: Any) -> Piece:
    x = _stream(model, split, dtype)
    run = functools.partial(run_layer, recompute)
    make = functools.partial(Block, model, split, dtype=dtype)
    return _piece(make, run, (x,), _keys(model, 3), split)


@functools.lru_cache(maxsize=512)
def _embedding(model: DenseConfig, split: TensorSplit, dtype: Any) -> Piece:
    tokens = _tokens(model, split)
    make = functools.partial(Embedding, model, split, dtype=dtype)
    return _piece(make, run_embedding, (tokens,), _keys(model, 1), split)


@functools.lru_cache(maxsize=512)
def _output(model: DenseConfig, split: TensorSplit, recompute: Recompute, dtype: Any) -> Piece:
    words = jax.ShapeDtypeStruct((own_words(model, split), model.hidden), dtype)
    arguments = (_stream(model, split, dtype), words, _tokens(model, split))
    run = functools.partial(run_output, model, recompute)
    make = functools.partial(Output, model, split, dtype=dtype)
    return _piece(make, run, arguments, _keys(model, 3), split)


def run_layer(recompute: Recompute, graph, params, x, keys=None):
    """What is priced, and what `train_step` runs: a layer."""

    def call(params, x):
        return nnx.merge(graph, params)(x, keys=keys, recompute=_inner(recompute))

    return (jax.checkpoint(call) if recompute == "full" else call)(params, x)


def run_embedding(graph, params, tokens, keys=None):
    """Likewise, the embedding."""
    return nnx.merge(graph, params)(tokens, None if keys is None else keys[0])


def run_output(
    model: DenseConfig, recompute: Recompute, graph, params, x, words, targets, keys=None
):
    """Likewise, the output and the loss."""

    def call(params, x, words):
        module = nnx.merge(graph, params)
        return module(x, words, targets, keys=keys, recompute=_inner(recompute))

    whole = recompute == "full" and model.query_layer
    return (jax.checkpoint(call) if whole else call)(params, x, words)


@functools.lru_cache(maxsize=8)
def optimizer_update() -> Program:
    """Adam with decoupled weight decay and clipping, on `parameters` elements: float32 state and
    master weights in, half-precision parameters out (optax)."""
    (n,) = jax.export.symbolic_shape("parameters")
    whole = jax.ShapeDtypeStruct((n,), jnp.float32)
    transform = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(1e-4, b2=0.95, weight_decay=0.1)
    )

    def update(master, grads, state):
        updates, state = transform.update(grads, state, master)
        master = optax.apply_updates(master, updates)
        return master, jnp.asarray(master, HALF), state

    state = jax.eval_shape(transform.init, whole)
    return trace(update, whole, whole, state, at={"parameters": 1e8})


@functools.lru_cache(maxsize=8)
def reduction(kind: str) -> Program:
    """A collective over two ranks of a node, of `elements` elements of 2 bytes on a rank:
    `all_reduce`, `all_gather` (that gives twice as many) or `send`."""
    (n,) = jax.export.symbolic_shape("elements")
    run = {
        "all_reduce": lambda x: jax.lax.psum(x, "group"),
        "all_gather": lambda x: jax.lax.all_gather(x, "group"),
        "send": lambda x: jax.lax.ppermute(x, "group", [(0, 1)]),
    }[kind]
    x, tiers = jax.ShapeDtypeStruct((n,), HALF), {"group": "node"}
    return trace(run, x, axis_sizes={"group": 2}, tiers=tiers, at={"elements": 1e8})


def _inner(recompute: Recompute) -> Recompute:
    return "none" if recompute == "full" else recompute


@functools.cache
def batch_symbol():
    """Sequences of a micro-batch; symbols of one scope compare as equal."""
    return jax.export.symbolic_shape(BATCH)[0]


def _stream(model: DenseConfig, split: TensorSplit, dtype) -> jax.ShapeDtypeStruct:
    """Activations between layers."""
    shape = batch_symbol(), part_between_layers(model, split), model.hidden
    return jax.ShapeDtypeStruct(shape, dtype)


def part_between_layers(model: DenseConfig, split: TensorSplit) -> int:
    """Tokens of a sequence that a rank has between layers."""
    part = model.sequence // split.context
    return part // split.ranks if split.sequence else part


def _tokens(model: DenseConfig, split: TensorSplit) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch_symbol(), model.sequence // split.context), jnp.int32)


def _keys(model: DenseConfig, count: int):
    if model.dropout == 0:
        return None
    return tuple(jax.eval_shape(lambda: jax.random.key(0)) for _ in range(count))


def _piece(make, run, arguments: tuple, keys, split: TensorSplit) -> Piece:
    graph, params = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    moving = tuple(i for i, x in enumerate(arguments) if jnp.issubdtype(x.dtype, jnp.floating))
    keep = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), params)

    def forward(params, arguments, keys):
        return run(graph, params, *arguments, keys)

    def by(params, floats, arguments, keys):
        whole = list(arguments)
        for i, x in zip(moving, floats, strict=True):
            whole[i] = x
        return forward(params, whole, keys)

    def start(out):
        return jnp.ones_like(out) if out.ndim == 0 else out  # as large as the incoming gradient

    def both(params, sums, arguments, keys):
        floats = tuple(arguments[i] for i in moving)
        out, back = jax.vjp(lambda p, f: by(p, f, arguments, keys), params, floats)
        grads, sent = back(start(out))
        return out, jax.tree.map(lambda a, g: a + jnp.asarray(g, a.dtype), sums, grads), sent

    def inputs(params, arguments, keys):
        floats = tuple(arguments[i] for i in moving)
        out, back = jax.vjp(lambda f: by(params, f, arguments, keys), floats)
        return out, back(start(out))

    def kept(params, arguments, keys):
        floats = tuple(arguments[i] for i in moving)
        return jax.tree.leaves(jax.vjp(lambda p, f: by(p, f, arguments, keys), params, floats)[1])

    ranks = {split.axis: split.ranks, split.context_axis: split.context}
    groups = {name: count for name, count in ranks.items() if count > 1}
    tiers: Any = {name: GROUPS[name] for name in groups}

    def read(fn, *xs):
        return trace(fn, *xs, axis_sizes=groups, tiers=tiers, at=_AT)

    return Piece(
        groups=groups,
        programs={
            "forward": functools.cache(lambda: read(forward, params, arguments, keys)),
            "both": functools.cache(lambda: read(both, params, keep, arguments, keys)),
            "inputs": functools.cache(lambda: read(inputs, params, arguments, keys)),
        },
        parameters=sum(x.size for x in jax.tree.leaves(params)),
        kept=kept_bytes(kept, list(groups.items()), params, arguments, keys),
        passed=_nbytes(arguments[0]),
    )


_AT = {BATCH: 1.0}


def kept_bytes(kept: Callable, axes: Sequence[tuple[str, int]], params, *arguments: Any) -> Size:
    """Bytes of the residuals `kept(params, *arguments)` that are neither parameters nor constants;
    what several kernels keep counts once. `axes`: names and sizes of mesh axes."""
    jaxpr = jax.make_jaxpr(kept, axis_env=list(axes))(params, *arguments).jaxpr
    held = len(jax.tree.leaves(params))
    weights = set(jaxpr.invars[:held])
    made = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}

    def origin(variable):
        """The array that a view shows."""
        while (eqn := made.get(variable)) is not None and eqn.primitive.name in _VIEWS:
            if isinstance(eqn.invars[0], Literal):
                return None
            variable = eqn.invars[0]
        return variable

    symbol = Size.symbol(BATCH)
    found = {origin(v) for v in jaxpr.outvars if not isinstance(v, Literal)}
    sizes = [_nbytes(v.aval) for v in found if v is not None and v not in weights]
    return sum((size for size in sizes if symbol.symbols() <= size.symbols()), Size())


_VIEWS = {"reshape", "transpose", "squeeze", "broadcast_in_dim"}


def _nbytes(x) -> Size:
    return Operand.of(x).nbytes
