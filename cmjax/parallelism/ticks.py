"""What one rank of a plan does in a training step: its part of every micro-batch, by the timetable.

A tick runs a layer's forward pass and puts its residuals (`jax.vjp`'s, but for the parameters) into
a slot, or takes them out and runs its backward pass. `Timetable` says when and where; neighbouring
stages exchange what a tick gave.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from cmjax.parallelism.backward import without_unread
from cmjax.parallelism.known import both, choose, put, take, zeros
from cmjax.parallelism.shards import Parts, Tree
from cmjax.parallelism.staged import Pass, Staged, add_to_layer
from cmjax.parallelism.timetable import BACKWARD, FORWARD, WEIGHTS


def gradients(
    program: Staged, params: Parts, tokens: Int[Array, "sequences length"]
) -> tuple[Float[Array, ""], Parts]:
    """This rank's share of the mean loss, and its gradients, summed over the replicas.

    Args:
      params: what the rank holds, spread under zero3.
      tokens: [sequences of a replica, sequence + 1].
    Returns: the loss is 0 on all stages but the last; gradients are float32, spread over the
      replicas with any optimizer but "none".
    """
    tokens = program.own_tokens(tokens)
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
      saved, stashed: by pass of the program, what its backward pass needs, and what its gradients
        of weights need of that (zero_bubble); each array by slot.
      grads: sums so far. loss: likewise.
    """

    x: Array
    g: Array
    saved: list[list[Array]]
    stashed: list[list[Array]]
    grads: Parts
    loss: Float[Array, ""]


class _Ticks:
    """The ticks of a step, on one rank: they change a `_Carry`."""

    def __init__(self, program: Staged, params: Parts, tokens: Array):
        self.of, self.params, self.tokens = program, params, tokens
        self.stage, self.passes, self.stream = program.stage, program.passes, program.stream

    def start(self) -> _Carry:
        table = self.of.table

        def slots(count: int, like):
            return jnp.zeros((count, *like.shape), like.dtype)

        return _Carry(
            x=slots(table.x_slots, self.stream),
            g=slots(table.g_slots, self.stream),
            saved=[
                [slots(table.saved_slots, s) for s in each.backward.saved] for each in self.passes
            ],
            stashed=[
                [slots(table.saved_slots, s) for s in each.backward.stashed] for each in self.passes
            ],
            grads=self.of.zeros(self.params),
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
        first, last = self._ends(at)
        x = choose(
            both(doing, first),
            lambda: self.of.embed(self.params, self._tokens(at)[:, :-1]),
            lambda: take(carry.x, at["x_slot"]),
        )
        carry.saved = list(carry.saved)
        for i, each in enumerate(self.passes):
            buffers = carry.saved[i]

            def forward(each=each, x=x, buffers=buffers):
                y, saved = each.backward.forward(self._layer(each, at), x)
                pairs = zip(buffers, saved, strict=True)
                return y, [put(buffer, at["saved_slot"], value) for buffer, value in pairs]

            runs = self._runs(each, doing, last)
            x, carry.saved[i] = choose(runs, forward, lambda x=x, b=buffers: (x, b))
        carry.g = put(carry.g, at["g_slot"], x, both(doing, last))
        return x

    def _backward(self, carry: _Carry, at: dict, doing) -> Array:
        of, scale = self.of, 1.0 / (self.of.micro_batches * self.of.plan.data)
        first, last = self._ends(at)
        g, tokens = take(carry.g, at["g_slot"]), self._tokens(at)

        def end(g=g):
            return of.end(self.params, g, tokens[:, 1:], scale, at["chunk"])

        def nothing(g=g):
            return jnp.zeros(()), g, zeros(jax.eval_shape(end)[2])

        loss, g, sums = choose(both(doing, last), end, nothing)
        carry.loss, carry.grads = carry.loss + loss, of.add_end(carry.grads, sums, at["chunk"])
        carry.stashed = list(carry.stashed)
        for i, each in reversed(list(enumerate(self.passes))):
            runs = self._runs(each, doing, last)
            saved, shapes = carry.saved[i], self._sums_of(carry, each)
            g, d, stashed = choose(
                runs,
                lambda each=each, saved=saved, g=g, s=shapes: self._layer_backward(
                    each, at, self._taken(saved, at), g, s
                ),
                lambda each=each, g=g, s=shapes: (g, zeros(s), zeros(each.backward.stashed)),
            )
            if each.backward.apart:
                carry.stashed[i] = [
                    put(buffer, at["saved_slot"], value, runs)
                    for buffer, value in zip(carry.stashed[i], stashed, strict=True)
                ]
            else:
                carry.grads = add_to_layer(carry.grads, each.part, at["chunk"], d)
        embedding = choose(
            both(doing, first), lambda: of.embedding_sums(self.params, tokens[:, :-1], g)
        )
        carry.grads = dataclasses.replace(
            carry.grads, embedding=jax.tree.map(jnp.add, carry.grads.embedding, embedding)
        )
        return g

    def _weights(self, carry: _Carry, at: dict, doing) -> None:
        _, last = self._ends(at)
        for i, each in enumerate(self.passes):
            saved, stashed = carry.saved[i], carry.stashed[i]

            def weights(each=each, saved=saved, stashed=stashed):
                def sums(params, saved, stashed):
                    params = self.of.layer(params, each.part, at["chunk"])
                    return self.of.layer_sums(each.backward.weights(params, saved, stashed))

                # Most of a layer's parameters are not read again, and not gathered (zero3).
                taken = self._taken(saved, at), self._taken(stashed, at)
                return without_unread(sums, self.params, *taken)

            d = choose(self._runs(each, doing, last), weights)
            carry.grads = add_to_layer(carry.grads, each.part, at["chunk"], d)

    def _layer_backward(self, each: Pass, at: dict, saved: Sequence, g: Array, shapes: Tree):
        params = self._layer(each, at)
        if each.backward.apart:
            g, stashed = each.backward.inputs(params, saved, g)
            return g, zeros(shapes), stashed
        d, g = each.backward.both(params, saved, g)
        return g, self.of.layer_sums(d), []

    def _layer(self, each: Pass, at: dict) -> Tree:
        return self.of.layer(self.params, each.part, at["chunk"])

    def _taken(self, buffers: list, at: dict) -> list:
        """A layer's arrays of the micro-batch that is worked on; where they are not read, no copy
        of them is made."""
        return [take(buffer, at["saved_slot"]) for buffer in buffers]

    def _sums_of(self, carry: _Carry, each: Pass) -> Tree:
        """Shapes of a layer's gradients as they are added up."""
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), carry.grads.layers[each.part]
        )

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

    def _runs(self, each: Pass, doing, last):
        """Whether a pass runs on this stage, and not as a part of the output."""
        if each.in_output:
            doing = both(doing, not last if isinstance(last, bool) else ~last)
        return doing if all(each.stages) else both(doing, jnp.asarray(each.stages)[self.stage])

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
        return self.of.pass_on(x, pairs, here) if pairs else jnp.zeros_like(x)


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
