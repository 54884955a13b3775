"""What one rank of a plan does in a training step: its part of every micro-batch, by the timetable.

A tick runs a layer's forward pass and puts its residuals (`jax.vjp`'s, but for the parameters) into
a slot, or takes them out and runs its backward pass. `Timetable` says when and where; neighbouring
stages exchange what a tick gave.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from cmjax.models.dense import Recompute
from cmjax.parallelism.backward import Backward, without_unread
from cmjax.parallelism.known import both, choose, put, take, zeros
from cmjax.parallelism.pieces import run_embedding, run_layer, run_output
from cmjax.parallelism.rank_program import RankProgram, words_apart
from cmjax.parallelism.shards import Parts, Tree
from cmjax.parallelism.timetable import BACKWARD, FORWARD, WEIGHTS


def gradients(
    program: RankProgram, params: Parts, tokens: Int[Array, "sequences length"]
) -> tuple[Float[Array, ""], Parts]:
    """This rank's share of the mean loss, and its gradients, summed over the replicas.

    Args:
      params: as `cut` gives them to a rank, spread under zero3.
      tokens: [sequences of a replica, sequence + 1].
    Returns: the loss is 0 on all stages but the last; gradients are float32, spread over the
      replicas with any optimizer but "none".
    """
    tokens = tokens.reshape(program.micro_batches, program.plan.micro_batch, -1)
    tick = _Ticks(program, params, tokens)
    carry = tick.start()
    for first, period, times in program.table.runs():
        carry = tick.run(carry, first, period, times)
    return carry.loss / program.micro_batches, program.reduced(carry.grads)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Carry:
    """What a stage carries from tick to tick.

    Fields:
      x, g: arrived inputs and gradients, by slot; at the end of the model `g` holds the output of
        the last layer, whose backward pass begins with the loss.
      saved, stashed: by layer and kind of recomputation, what its backward pass needs, and what
        its gradients of weights need of that (zero_bubble); each array by slot.
      grads: sums so far. loss: likewise.
    """

    x: Array
    g: Array
    saved: list[dict[Recompute, list]]
    stashed: list[dict[Recompute, list]]
    grads: Parts
    loss: Float[Array, ""]


class _Ticks:
    """The ticks of a step, on one rank: they change a `_Carry`."""

    def __init__(self, program: RankProgram, params: Parts, tokens: Array):
        self.of, self.params, self.tokens = program, params, tokens
        self.stage = program.stage
        model, split, plan = program.model, program.split, program.plan
        part = model.sequence // split.ranks if split.sequence else model.sequence
        shape = plan.micro_batch, part, model.hidden
        self.stream = jax.ShapeDtypeStruct(shape, program.dtype)
        self.modes = [program.modes_of(layer) for layer in range(program.number)]
        self.backward: dict[Recompute, Backward] = {
            mode: self._passes_of(mode) for layer in self.modes for mode in layer
        }

    def _passes_of(self, mode: Recompute) -> Backward:
        of, apart = self.of, self.of.plan.schedule == "zero_bubble"

        def layer(p, x):
            return run_layer(mode, of.graphs.layer, nnx.State(p), x)

        return Backward(layer, of.graphs.one, self.stream, apart=apart)

    def start(self) -> _Carry:
        of, table = self.of, self.of.table

        def slots(count: int, like):
            return jnp.zeros((count, *like.shape), like.dtype)

        def sums(lead: int, x):
            if of.plan.optimizer in ("zero2", "zero3"):
                size = -(-math.prod(x.shape[lead:]) // of.plan.data)
                if of.plan.optimizer == "zero3":
                    size = x.shape[-1]
                return jnp.zeros((*x.shape[:lead], size), jnp.float32)
            return jnp.zeros(x.shape, jnp.float32)

        return _Carry(
            x=slots(table.x_slots, self.stream),
            g=slots(table.g_slots, self.stream),
            saved=[
                {m: [slots(table.saved_slots, s) for s in self.backward[m].saved] for m in modes}
                for modes in self.modes
            ],
            stashed=[
                {m: [slots(table.saved_slots, s) for s in self.backward[m].stashed] for m in modes}
                for modes in self.modes
            ],
            grads=self.params.map(sums),
            loss=jnp.zeros((), jnp.float32),
        )

    def run(self, carry: _Carry, first: int, period: int, times: int) -> _Carry:
        """A stretch of the timetable: a loop, if a period of it repeats."""
        table, spans = self.of.table, []
        for tick in range(first, first + period):
            every = slice(tick, tick + period * times, period)
            kinds = frozenset(table.kind[every].flat)
            rows = {name: getattr(table, name)[every] for name in _ROWS}
            from_x, rows["x_route"] = _routes(rows["x_comes"])
            from_g, rows["g_route"] = _routes(rows["g_comes"])
            known = {name: int(row.flat[0]) for name, row in rows.items() if np.ptp(row) == 0}
            spans.append((_Span(kinds, from_x, from_g, known), rows))

        def body(carry, rows):
            for (span, _), row in zip(spans, rows, strict=True):
                carry = self._tick(carry, span, row)
            return carry, None

        if times == 1:
            return body(carry, [{name: row[0] for name, row in rows.items()} for _, rows in spans])[
                0
            ]
        looped = [
            {name: jnp.asarray(row) for name, row in rows.items() if name not in span.known}
            for span, rows in spans
        ]
        return lax.scan(body, carry, looped)[0]

    def _tick(self, carry: _Carry, span: "_Span", rows: dict[str, Any]) -> _Carry:
        kinds, at = span.kinds, dict(span.known)
        for name, row in rows.items():
            if name not in at:
                at[name] = row if name in ("x_route", "g_route") else row[self.stage]
        carry = dataclasses.replace(carry)
        down = up = jnp.zeros(self.stream.shape, self.stream.dtype)
        if FORWARD in kinds:
            down = self._forward(carry, at, self._doing(FORWARD, kinds, at))
        if BACKWARD in kinds:
            up = self._backward(carry, at, self._doing(BACKWARD, kinds, at))
        if WEIGHTS in kinds:
            self._weights(carry, at, self._doing(WEIGHTS, kinds, at))
        carry.x = self._received(carry.x, at["x_comes"], down, -1, span.from_x, at["x_route"])
        carry.g = self._received(carry.g, at["g_comes"], up, 1, span.from_g, at["g_route"])
        return carry

    # --- a layer's work -------------------------------------------------------------------------

    def _forward(self, carry: _Carry, at: dict, doing) -> Array:
        of = self.of
        first, last = self._ends(at)
        x = choose(
            both(doing, first),
            lambda: run_embedding(
                of.graphs.embedding, nnx.State(self._embedding()), self._tokens(at)[:, :-1]
            ),
            lambda: take(carry.x, at["x_slot"]),
        )
        for layer, mode, backward in self._passes():
            runs = self._runs(layer, mode, both(doing, self._is_layer(layer, last)))
            buffers = carry.saved[layer][mode]

            def forward(layer=layer, x=x, buffers=buffers, backward=backward):
                y, saved = backward.forward(self._layer(layer, at), x)
                pairs = zip(buffers, saved, strict=True)
                return y, [put(buffer, at["saved_slot"], value) for buffer, value in pairs]

            x, buffers = choose(runs, forward, lambda x=x, b=buffers: (x, b))
            carry.saved[layer] = {**carry.saved[layer], mode: buffers}
        carry.g = put(carry.g, at["g_slot"], x, both(doing, last))
        return x

    def _backward(self, carry: _Carry, at: dict, doing) -> Array:
        of, scale = self.of, 1.0 / (self.of.micro_batches * self.of.plan.data)
        first, last = self._ends(at)
        g = take(carry.g, at["g_slot"])
        loss, g, output, query, words = choose(
            both(doing, last),
            lambda: self._output(g, at, scale),
            lambda: (jnp.zeros(()), g, *zeros(self._output_sums())),
        )
        carry.loss = carry.loss + loss
        for layer, mode, backward in reversed(self._passes()):
            runs = self._runs(layer, mode, both(doing, self._is_layer(layer, last)))
            g, d, stashed = choose(
                runs,
                lambda layer=layer, mode=mode, backward=backward, g=g: self._layer_backward(
                    layer, backward, at, self._taken(carry.saved[layer][mode], at), g
                ),
                lambda g=g, b=backward: (g, zeros(self._layer_sums()), zeros(b.stashed)),
            )
            if backward.apart:
                buffers = [
                    put(buffer, at["saved_slot"], value, runs)
                    for buffer, value in zip(carry.stashed[layer][mode], stashed, strict=True)
                ]
                carry.stashed[layer] = {**carry.stashed[layer], mode: buffers}
            else:
                self._add_layer(carry, layer, at, d)
        if of.model.query_layer:
            self._add_layer(carry, of.number - 1, at, query)
        embedding = choose(
            both(doing, first),
            lambda: self._embedding_sums(g, at),
        )
        if not words_apart(of):
            embedding = {**embedding, "words": embedding["words"] + words}
        else:
            output = {**output, "words": words}
        carry.grads = dataclasses.replace(
            carry.grads,
            embedding=jax.tree.map(jnp.add, carry.grads.embedding, embedding),
            output=jax.tree.map(jnp.add, carry.grads.output, output),
        )
        return g

    def _weights(self, carry: _Carry, at: dict, doing) -> None:
        _, last = self._ends(at)
        for layer, mode, backward in self._passes():
            runs = self._runs(layer, mode, both(doing, self._is_layer(layer, last)))
            d = choose(
                runs,
                lambda layer=layer, mode=mode, backward=backward: self._sums(
                    backward.weights(
                        self._layer(layer, at),
                        self._taken(carry.saved[layer][mode], at),
                        self._taken(carry.stashed[layer][mode], at),
                    )
                ),
            )
            self._add_layer(carry, layer, at, d)

    def _passes(self) -> list[tuple[int, Recompute, Backward]]:
        """The layers of a chunk in order, each as often as stages differ in what they recompute."""
        return [(i, mode, self.backward[mode]) for i, by in enumerate(self.modes) for mode in by]

    def _runs(self, layer: int, mode: Recompute, runs):
        """Whether a layer runs, on a stage that recomputes this of it."""
        stages = self.modes[layer][mode]
        return runs if all(stages) else both(runs, jnp.asarray(stages)[self.stage])

    def _taken(self, buffers: list, at: dict) -> list:
        """A layer's arrays of the micro-batch that is worked on; where they are not read, no copy
        of them is made."""
        return [take(buffer, at["saved_slot"]) for buffer in buffers]

    def _layer_backward(self, layer: int, backward: Backward, at: dict, saved: Sequence, g: Array):
        params = self._layer(layer, at)
        if backward.apart:
            g, stashed = backward.inputs(params, saved, g)
            return g, zeros(self._layer_sums()), stashed
        d, g = backward.both(params, saved, g)
        return g, self._sums(d), []

    def _output(self, y: Array, at: dict, scale: float):
        """Loss and gradients of the model's end: (loss, of y, of the output, of the query layer, of
        the words)."""
        of = self.of
        output = of.whole(0, self.params.output, of.graphs.shapes.output)
        if words_apart(of):
            words, output = output["words"], {k: x for k, x in output.items() if k != "words"}
        else:
            name = {"words": self.params.embedding["words"]}
            like = {"words": of.graphs.shapes.embedding["words"]}
            words = of.whole(0, name, like)["words"]
        query = self._layer(of.number - 1, at) if of.model.query_layer else None
        targets = self._tokens(at)[:, 1:]

        def loss(output, query, words, y):
            state = nnx.State(output if query is None else {**output, "query": query})
            run = functools.partial(run_output, of.model, of.mode_of_last, of.graphs.output)
            return run(state, y, words, targets)

        found, back = jax.vjp(loss, output, query, words, y)
        d_output, d_query, d_words, g = back(jnp.asarray(scale, found.dtype))
        d_query = None if d_query is None else self._sums(d_query)
        return (
            found.astype(jnp.float32), g, self._sums(d_output), d_query, self._sums(d_words)
        )  # fmt: skip

    def _embedding_sums(self, g: Array, at: dict) -> Tree:
        def backward(params, tokens, g):
            run = functools.partial(run_embedding, self.of.graphs.embedding)
            return jax.vjp(lambda p: run(nnx.State(p), tokens), params)[1](g)[0]

        tokens = self._tokens(at)[:, :-1]
        return self._sums(without_unread(backward, self._embedding(), tokens, g))

    # --- parameters and sums --------------------------------------------------------------------

    def _layer(self, layer: int, at: dict) -> Tree:
        """Parameters of a layer of the chunk that is worked on."""
        own = jax.tree.map(lambda x: take(x, at["chunk"]), self.params.layers[layer])
        return self.of.whole(0, own, self.of.graphs.one)

    def _embedding(self) -> Tree:
        return self.of.whole(0, self.params.embedding, self.of.graphs.shapes.embedding)

    def _sums(self, d: Tree) -> Tree:
        """Gradients of a micro-batch as they are added up."""
        if self.of.plan.optimizer in ("zero2", "zero3"):
            return self.of.over_replicas(d, 0)
        return jax.tree.map(lambda g: g.astype(jnp.float32), d)

    def _layer_sums(self) -> Tree:
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), self._abstract_sums().layers[0]
        )

    def _output_sums(self) -> tuple:
        sums = self._abstract_sums()
        output = {name: x for name, x in sums.output.items() if name != "words"}
        words = sums.output["words"] if words_apart(self.of) else sums.embedding["words"]
        return output, self._layer_sums() if self.of.model.query_layer else None, words

    @functools.cache  # noqa: B019
    def _abstract_sums(self) -> Parts:
        return jax.eval_shape(lambda: self.start().grads)

    def _add_layer(self, carry: _Carry, layer: int, at: dict, d: Tree) -> None:
        def add(total, g):
            return put(total, at["chunk"], take(total, at["chunk"]) + g)

        layers = list(carry.grads.layers)
        layers[layer] = jax.tree.map(add, layers[layer], d)
        carry.grads = dataclasses.replace(carry.grads, layers=tuple(layers))

    # --- where and when -------------------------------------------------------------------------

    def _doing(self, kind: int, kinds: frozenset, at: dict):
        return True if kinds == {kind} else at["kind"] == kind

    def _ends(self, at: dict):
        """Whether the chunk that is worked on is the model's first, and its last."""
        plan = self.of.plan
        chunk, stage = at["chunk"], self.stage
        return (
            both(chunk == 0, stage == 0),
            both(chunk == plan.interleave - 1, stage == plan.pipeline - 1),
        )

    def _is_layer(self, layer: int, last):
        """Whether it is one, and not the query layer, which belongs to the output."""
        if not self.of.model.query_layer or layer < self.of.number - 1:
            return True
        return not last if isinstance(last, bool) else ~last

    def _tokens(self, at: dict) -> Array:
        return take(self.tokens, at["micro_batch"])

    def _received(self, buffer, slot, x, step: int, routes: Sequence, route) -> Array:
        """`buffer` with what a neighbour sends; `route` says by which of the routes."""
        if not any(map(any, routes)):
            return buffer
        stages = self.of.plan.pipeline
        sends = [
            functools.partial(
                self._sent,
                x,
                [((s + step) % stages, s) for s in range(stages) if comes[s]],
                slot >= 0,
            )
            for comes in routes
        ]
        found = sends[0]() if len(sends) == 1 else lax.switch(route, sends)
        return put(buffer, slot, found, slot >= 0)

    def _sent(self, x: Array, pairs: list[tuple[int, int]], here) -> Array:
        """`x` from neighbouring stages. Ranks of a tensor-parallel group hold the same: each sends
        its part to its own peer, and they gather it there (arXiv 2104.04473, section 4.1)."""
        of, split = self.of, self.of.split
        if not pairs:
            return jnp.zeros_like(x)
        if split.ranks == 1 or split.sequence:
            return of.send(x, pairs)
        width = x.shape[-1] // split.ranks
        part = lax.dynamic_slice_in_dim(x, split.rank * width, width, axis=2)
        part = of.send(part, pairs)
        return choose(here, lambda: lax.all_gather(part, split.axis, axis=2, tiled=True))


@dataclasses.dataclass(frozen=True)
class _Span:
    """What is known of a tick of a loop, in all of its rounds.

    Fields:
      kinds: of work, on any stage. from_x, from_g: which stages receive, as often as that differs.
      known: rows of the timetable that are one number.
    """

    kinds: frozenset
    from_x: Sequence[Sequence[bool]]
    from_g: Sequence[Sequence[bool]]
    known: dict[str, int]


def _routes(comes: np.ndarray) -> tuple[list[list[bool]], np.ndarray]:
    """The sets of stages that receive, and which of them every tick has."""
    routes, numbers = np.unique(comes >= 0, axis=0, return_inverse=True)
    return routes.tolist(), numbers.reshape(-1).astype(np.int32)


_ROWS = ("kind", "micro_batch", "chunk", "x_slot", "saved_slot", "g_slot", "x_comes", "g_comes")
