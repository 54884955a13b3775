"""Bytes between ranks: counted while a program runs, and as its price assumes them.

    counted, moved = count_traffic(fn, mesh)(*args)          # inside on_every_rank
    tier_bytes(pairs, mesh) == priced_bytes(trace(lifted, ...), sizes, mesh)

Counting is by brute force. Beside every exchange of a rank's program the same exchange runs once
more, of the same shapes over the same axes, with every element replaced by the number of the rank
that holds it. What arrives says who sent each element, whether XLA moved it between devices or
`vmap` between virtual ranks of one device. No element of a sum has one sender: a reduction counts
as the fused operators of the supernode send it, every rank its addends of a share of the result to
the rank that adds that share up (reduce-scatter), and from there to everybody (all-reduce).

Two quantities are counted. *Moved* bytes are those of the exchanged buffers, which are static: one
block of `capacity` rows per (source rank, slot), full or not. The price of the same program at the
same capacity must be equal to them, tier by tier, to the byte. *Rows* are the tokens in those
blocks that are real. In total they equal the price at a load of 1 (as many rows per block as tokens
send on average); by tier the price assumes that every rank sends equally many to every rank, from
which a routing differs.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jaxtyping import Array, Int, Int32

from cmjax.mesh import RankMesh
from cmjax.primitives.define import reference_of
from cmjax.primitives.exchange import combine_p, dispatch_p
from cmjax.primitives.tensor import gather_group_p, scatter_sum_p
from cmjax.program import Program
from cmjax.program.mark import parse_receivers
from cmjax.program.walk import INLINED, scan_counts

TIERS = ("own", "die", "node", "supernode")
"""Where the other end of a transfer is: the rank itself, the other die of its NPU, another NPU of
its node, another node."""

_MOVES = {"all_to_all", "all_gather", "all_gather_invariant", "ppermute"}
_REDUCES = {"psum", "psum2", "psum_invariant", "pmax", "pmin", "reduce_scatter"}
_OPENED = (gather_group_p, scatter_sum_p)
"""Counted as the exchanges that they are made of."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Received:
    """What one rank received in one exchange. Leading axes are the iterations of loops around it.

    Fields:
      moved: bytes from each rank, its own included.
      rows: of these, bytes of real rows (dispatch and combine only).
    """

    moved: Int32[Array, "*loops ranks"]
    rows: Int32[Array, "*loops ranks"] | None = None


def count_traffic(fn: Callable, mesh: RankMesh) -> Callable:
    """`fn`, a program of one rank of `mesh`, that also counts what this rank receives.

    Returns: a function of the same arguments, to be lifted by `on_every_rank` like `fn`; its result
      is `(result, {name: Received})`. A name is the exchange's primitive and number, such as
      `dispatch.0` or `all_gather.2`; `flags` are the counts of rows that a dispatch sends beside
      them, which a price counts one by one and not by their bytes.
    Raises:
      ValueError: when called, for an exchange inside `while`, which does not say how many bytes
        come from whom.
    """

    def counted(*args):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
        counter = _Counter(mesh)
        results, found = counter.run(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(out), results), found

    return counted


def pair_bytes(
    received: Int[Array, "ranks *loops sources"],
) -> Int[np.ndarray, "sources destinations"]:
    """A field of `Received`, as all ranks returned it (`RANKED`), summed over loops."""
    counts = np.asarray(received, np.int64)
    return counts.reshape(len(counts), -1, counts.shape[-1]).sum(1).T


def tier_bytes(pairs: Int[np.ndarray, "sources destinations"], mesh: RankMesh) -> dict[str, int]:
    """Bytes between all pairs of ranks, added up by where the two are."""
    numbers = np.arange(mesh.ranks)
    npu, node = numbers // mesh.dies, numbers // (mesh.dies * mesh.npus)
    furthest = np.full(pairs.shape, 3)
    furthest[node[:, None] == node] = 2
    furthest[npu[:, None] == npu] = 1
    furthest[numbers[:, None] == numbers] = 0
    return {name: int(pairs[furthest == number].sum()) for number, name in enumerate(TIERS)}


def priced_bytes(program: Program, sizes: Mapping[str, float], mesh: RankMesh) -> dict[str, float]:
    """Bytes of all ranks by tier that the price of `program` assumes; none for a rank's own."""
    totals = program.totals(sizes)
    return {tier: totals[f"{tier}_bytes"] * mesh.ranks for tier in TIERS[1:]}


class _Counter:
    """Evaluates a rank's jaxpr, and its exchanges twice."""

    def __init__(self, mesh: RankMesh):
        self.mesh = mesh
        self.numbers: dict[str, int] = {}

    def run(self, jaxpr: Jaxpr, consts: Sequence, args: Sequence) -> tuple[list, dict]:
        env: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        env |= zip(jaxpr.invars, args, strict=True)
        found: dict[str, Received] = {}

        def read(atom):
            return atom.val if isinstance(atom, Literal) else env[atom]

        for equation in jaxpr.eqns:
            outs, received = self.equation(equation, [read(atom) for atom in equation.invars])
            env.update(zip(equation.outvars, outs, strict=True))
            found |= received
        return [read(atom) for atom in jaxpr.outvars], found

    def equation(self, equation, inputs: list) -> tuple[list, dict[str, Received]]:
        p, params = equation.primitive, equation.params
        if p is dispatch_p or p is combine_p:
            return self._fused(equation, inputs)
        if p in _OPENED:
            reference = reference_of(p)
            assert reference is not None, "they are defined by one"
            body = jax.make_jaxpr(functools.partial(reference, **params))(*inputs)
            return self.run(body.jaxpr, body.consts, inputs)
        if p.name in _MOVES:
            outs = _bind(equation, inputs)
            return outs, {self._name(p.name): Received(self._origins(equation, inputs))}
        if p.name in _REDUCES:
            outs = _bind(equation, inputs)
            return outs, {self._name(p.name): Received(self._addends(equation, inputs))}
        if p.name == "cond" and any(map(_exchanges, _inner(params))):
            return self._cond(equation, inputs)
        if p.name in INLINED:
            inner = params[INLINED[p.name]]
            return self.run(getattr(inner, "jaxpr", inner), getattr(inner, "consts", ()), inputs)
        if p.name == "scan":
            return self._scan(equation, inputs)
        if any(map(_exchanges, _inner(params))):
            raise ValueError(
                f"count_traffic: cannot tell how often {p.name!r} sends; write the exchange in "
                "straight lines, lax.scan or lax.cond"
            )
        return _bind(equation, inputs), {}

    def _fused(self, equation, inputs: list) -> tuple[list, dict[str, Received]]:
        """Dispatch or combine, opened: their buffers move in an exchange of the reference."""
        p, params = equation.primitive, equation.params
        reference = reference_of(p)
        assert reference is not None, "the exchange primitives are defined by one"
        body = jax.make_jaxpr(lambda *xs: reference(*xs, **params))(*inputs)
        kind = p.name.removeprefix("cm_")
        inside = _Counter(self.mesh)
        outs, found = inside.run(body.jaxpr, body.consts, inputs)
        if p is dispatch_p:
            rows, scale, counts, *_ = outs
            per_row = rows.shape[2] * rows.dtype.itemsize
            per_row += scale.dtype.itemsize if params["quantize"] else 0
            real = jnp.sum(counts, axis=1) * per_row
        else:
            rows, slots, position, _ = inputs
            kept = (position < params["capacity"]) * (rows.shape[2] * rows.dtype.itemsize)
            source = slots // params["slots_per_rank"]
            real = jnp.zeros((self.mesh.ranks,), jnp.int32).at[source].add(kept)
        exchanges = list(found.values())
        result = {}
        if p is dispatch_p and exchanges:  # the last one tells how many rows of a block are real
            *exchanges, flags = exchanges
            result[self._name("flags")] = flags
        if exchanges:
            moved = jnp.sum(jnp.stack([each.moved for each in exchanges]), axis=0)
            result[self._name(kind)] = Received(moved, real.astype(jnp.int32))
        return outs, result

    def _scan(self, equation, inputs: list) -> tuple[list, dict[str, Received]]:
        closed, params = equation.params["jaxpr"], equation.params
        constants, carried = scan_counts(equation)
        consts, carry = inputs[:constants], inputs[constants : constants + carried]

        def body(carry, xs):
            outs, found = self.run(closed.jaxpr, closed.consts, [*consts, *carry, *xs])
            return outs[:carried], (outs[carried:], found)

        before = dict(self.numbers)

        def numbered(carry, xs):
            self.numbers = dict(before)  # scan may trace its body more than once
            return body(carry, xs)

        carry, (ys, found) = lax.scan(
            numbered,
            carry,
            inputs[constants + carried :],
            length=params["length"],
            reverse=params["reverse"],
        )
        return [*carry, *ys], found

    def _cond(self, equation, inputs: list) -> tuple[list, dict[str, Received]]:
        """The branch that is taken; exchanges of the others, under names of their own, are 0."""
        index, *operands = inputs
        runs, shapes = [], {}
        for branch in equation.params["branches"]:
            begin = dict(self.numbers)

            def run(*operands, branch=branch, begin=begin):
                self.numbers = dict(begin)  # a branch may be traced more than once
                return self.run(branch.jaxpr, branch.consts, operands)

            shapes |= jax.eval_shape(run, *operands)[1]
            runs.append(run)

        def filled(run):
            def all_names(*operands):
                outs, found = run(*operands)
                absent = {name: shape for name, shape in shapes.items() if name not in found}
                zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), absent)
                return outs, {**found, **zeros}

            return all_names

        after = dict(self.numbers)
        result = lax.switch(index, [filled(run) for run in runs], *operands)
        self.numbers = after
        return result

    def _origins(self, equation, inputs: list) -> Int32[Array, "ranks"]:
        """Bytes from each rank: the exchange of the ranks' numbers in place of their values."""
        rank = lax.axis_index(self.mesh.axes).astype(jnp.int32)
        tags = [jnp.broadcast_to(rank, x.shape) for x in inputs]
        total = jnp.zeros((self.mesh.ranks,), jnp.int32)
        for x, origin in zip(inputs, _bind(equation, tags), strict=True):
            total = total.at[origin.reshape(-1)].add(x.dtype.itemsize)
        if equation.primitive.name == "ppermute":  # who receives nothing is given zeros
            receivers = parse_receivers(str(equation.source_info.name_stack))
            if receivers is None:
                receivers = [destination for _, destination in equation.params["perm"]]
            here = lax.axis_index(equation.params["axis_name"])
            total = jnp.where(jnp.isin(here, jnp.array(receivers)), total, 0)
        return total

    def _addends(self, equation, inputs: list) -> Int32[Array, "ranks"]:
        """Bytes from each rank of a reduction: its addends of this rank's share of the result,
        and, if all ranks get all of it, the share that it added up."""
        params = equation.params
        names = params["axes"] if "axes" in params else params["axis_name"]
        names = tuple(n for n in (names if isinstance(names, tuple) else (names,)) if n)
        group = lax.axis_index(self.mesh.axes).astype(jnp.int32)
        for name in reversed(names):  # one by one: `vmap` gathers along one axis
            group = lax.all_gather(group, name)
        group = group.reshape(-1)
        place, ranks = lax.axis_index(names), group.size
        total = jnp.zeros((self.mesh.ranks,), jnp.int32)
        for x in inputs:
            number = np.arange(ranks)
            shares = (x.size // ranks + (number < x.size % ranks)) * x.dtype.itemsize
            shares = jnp.asarray(shares, jnp.int32)
            total = total.at[group].add(shares[place])
            if equation.primitive.name != "reduce_scatter":
                total = total.at[group].add(shares)
        return total

    def _name(self, kind: str) -> str:
        number = self.numbers.get(kind, 0)
        self.numbers[kind] = number + 1
        return f"{kind}.{number}"


def _bind(equation, inputs: list) -> list:
    params = equation.primitive.get_bind_params(equation.params)
    # Before JAX 0.12, together with the functions that the primitive calls.
    functions, params = params if isinstance(params, tuple) else ((), params)
    outs = equation.primitive.bind(*functions, *inputs, **params)
    return outs if equation.primitive.multiple_results else [outs]


def _inner(params: Mapping[str, Any]) -> list[Jaxpr]:
    """The jaxprs in an equation's parameters."""
    leaves = jax.tree.leaves(list(params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr))
    return [
        x.jaxpr if isinstance(x, ClosedJaxpr) else x
        for x in leaves
        if isinstance(x, ClosedJaxpr | Jaxpr)
    ]


def _exchanges(jaxpr: Jaxpr) -> bool:
    """Whether anything in it talks to other ranks."""
    ours = {p.name for p in (dispatch_p, combine_p, *_OPENED)}
    talks = _MOVES | _REDUCES | ours
    return any(
        equation.primitive.name in talks or any(map(_exchanges, _inner(equation.params)))
        for equation in jaxpr.eqns
    )
