"""Trace a JAX function once, with symbolic sizes, into a program of priced operations.

The jaxpr is walked down through jit, shard_map, custom derivatives, remat, cond and while; a scan
becomes one `Loop` over its body, so a program does not grow with depth. Element-wise chains are
merged into kernels (`fuse.py`), so that HBM is charged once per chain.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax
from jax.extend.core import Literal

from cmjax.program import fuse
from cmjax.program.mark import FUSED_PREFIX, parse_stream
from cmjax.program.operation import MAIN, Loop, Node, Program, Stream, Value
from cmjax.program.rules import (
    ELEMENTWISE,
    FREE,
    REDUCTIONS,
    RULES,
    UnpricedPrimitive,
    elementwise_work,
    reduction_work,
)
from cmjax.program.size import Size
from cmjax.program.work import Operand, Work

INLINED = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "shard_map": "jaxpr",
    "custom_lin": "jaxpr",
}
"""Primitives that call a jaxpr, and the parameter that holds it."""

_INDEXED = {"gather", "dynamic_slice"}
_TRANSFORMED = re.compile(r"\w+\((.*)\)")  # transpose(jvp(name)): `name`, differentiated
_VIEWS = FREE - {"iota", "axis_index", "dim_as_value", "platform_index"}


def trace(fn: Callable, *args, axis_sizes: Mapping[str, int] | None = None) -> Program:
    """Read `fn` as a program to price; nothing is allocated or run.

    Args:
      fn: a JAX function of one rank, or a `shard_map` of one.
      *args: pytrees of arrays or `jax.ShapeDtypeStruct`s; dimensions may be symbolic
        (`jax.export.symbolic_shape`).
      axis_sizes: sizes of the mesh axes that `fn` names outside any `shard_map`.
    Raises:
      UnpricedPrimitive: a primitive without cost rule, with its name and how to register one.
      ValueError: a `while` without declared trip count; a collective or loop inside a fused kernel.
    """
    axis_env = list((axis_sizes or {}).items())
    closed = jax.make_jaxpr(fn, axis_env=axis_env)(*args)
    return trace_jaxpr(closed.jaxpr, dict(axis_env))


def trace_jaxpr(jaxpr, mesh: Mapping[str, int]) -> Program:
    """Read a jaxpr as a program; `mesh` gives the sizes of axis names already bound."""
    walker = _Walker(mesh)
    env = {}
    for variable in (*jaxpr.constvars, *jaxpr.invars):
        env[variable] = walker.external(variable.aval, ("const", 0))
    outputs = walker.walk(jaxpr, env, _Place())
    return walker.program(outputs, carried=0)


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an equation stands: named scopes, stream, fused kernel, declared trip count."""

    scope: tuple[str, ...] = ()
    stream: Stream = MAIN
    region: int | None = None

    def enter(self, name_stack: str) -> "_Place":
        scope, stream = self.scope, self.stream
        for part in name_stack.split("/") if name_stack else ():
            while wrapped := _TRANSFORMED.fullmatch(part):
                part = wrapped[1]
            found = parse_stream(part)
            if found is not None:
                stream = Stream(*found)
            elif part.replace("_", "").replace("-", "").replace("=", "").isalnum():
                scope = (*scope, part)
        return dataclasses.replace(self, scope=scope, stream=stream)

    @property
    def trips(self) -> int | None:
        for part in reversed(self.scope):
            if part.startswith("trips="):
                return int(part.removeprefix("trips="))
        return None


class _Walker:
    """Builds the nodes of one program level (the top, or a loop body)."""

    def __init__(self, mesh: Mapping[str, int]):
        self.mesh = dict(mesh)
        self.nodes: list[Node] = []
        self.regions = 0

    def external(self, aval, source: tuple[str, int]) -> Value:
        operand = Operand.of(aval)
        return Value(operand=operand, nbytes=operand.nbytes, external=source)

    def program(self, outputs: Sequence[Value | None], carried: int) -> Program:
        return fuse.assemble(self.nodes, outputs, carried)

    def walk(self, jaxpr, env: dict, place: _Place) -> list[Value | None]:
        def read(atom) -> Value | None:
            return None if isinstance(atom, Literal) else env[atom]

        for equation in jaxpr.eqns:
            here = place.enter(str(equation.source_info.name_stack))
            inputs = [read(atom) for atom in equation.invars]
            results = self.equation(equation, inputs, here)
            env.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def equation(self, equation, inputs: list[Value | None], here: _Place) -> list[Value]:
        name = equation.primitive.name
        if name in INLINED and name not in RULES:
            return self._call(equation, inputs, here)
        if name == "scan":
            return self._scan(equation, inputs, here)
        if name == "while":
            return self._while(equation, inputs, here)
        if name == "cond":
            return self._cond(equation, inputs, here)
        outs = [Operand.of(variable.aval) for variable in equation.outvars]
        if name in _VIEWS:
            piece = (name, *map(str, equation.params.values()))
            return [_view(inputs[0], out, (*piece, k)) for k, out in enumerate(outs)]
        arguments = [Operand.of(atom.aval) for atom in equation.invars]
        kind, work = _classify(name, arguments, outs, equation.params, self.mesh)
        if here.region is not None and work.kind not in ("gemm", "attention"):
            raise ValueError(f"{name} inside a fused kernel ({'/'.join(here.scope)}): move it out")
        node = self._append(kind, name, inputs, outs, work, here)
        if name in _INDEXED:
            node.reads[0] = outs[0].nbytes
        if name == "dynamic_update_slice":
            node.reads[0] = Size()
            node.writes[0] = arguments[1].nbytes
        if name.startswith("scatter"):
            node.reads[0] = Size()
            node.writes[0] = arguments[2].nbytes
        return node.outputs

    def _append(self, kind, name, inputs, outs, work, here: _Place) -> Node:
        node = Node(
            index=len(self.nodes),
            kind=kind,
            name=name,
            inputs=inputs,
            work=work,
            scope=here.scope,
            stream=here.stream,
            region=here.region,
        )
        node.outputs = [
            Value(operand=out, nbytes=out.nbytes, producer=(node.index, k))
            for k, out in enumerate(outs)
        ]
        self.nodes.append(node)
        return node

    def _call(self, equation, inputs, here: _Place) -> list[Value]:
        jaxpr = equation.params[INLINED[equation.primitive.name]]
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        if equation.primitive.name == "shard_map":
            self.mesh |= dict(equation.params["mesh"].shape)
        kernel = str(equation.params.get("name", ""))
        if kernel.startswith(FUSED_PREFIX) and here.region is None:
            self.regions += 1
            scope = (*here.scope, kernel.removeprefix(FUSED_PREFIX))
            here = dataclasses.replace(here, region=self.regions, scope=scope)
        env = {v: self.external(v.aval, ("const", 0)) for v in jaxpr.constvars}
        for variable, value, atom in zip(jaxpr.invars, inputs, equation.invars, strict=True):
            env[variable] = self.external(atom.aval, ("const", 0)) if value is None else value
        results = self.walk(jaxpr, env, here)
        pairs = zip(results, equation.outvars, strict=True)
        return [self.external(v.aval, ("const", 0)) if r is None else r for r, v in pairs]

    def _scan(self, equation, inputs, here: _Place) -> list[Value]:
        jaxpr = equation.params["jaxpr"]
        consts, carried = scan_counts(equation)
        return self._loop(
            equation, inputs, here, jaxpr, consts, carried, int(equation.params["length"])
        )

    def _while(self, equation, inputs, here: _Place) -> list[Value]:
        if here.trips is None:
            raise ValueError(
                f"while loop in scope {'/'.join(here.scope) or 'top'} has no known trip count: use "
                "lax.scan or lax.fori_loop with fixed bounds, or wrap it in trip_count(n)"
            )
        skipped = equation.params["cond_nconsts"]
        jaxpr, consts = equation.params["body_jaxpr"], equation.params["body_nconsts"]
        carried = len(inputs) - skipped - consts
        return self._loop(equation, inputs[skipped:], here, jaxpr, consts, carried, here.trips)

    def _loop(self, equation, inputs, here, jaxpr, consts, carried, length) -> list[Value]:
        if here.region is not None:
            raise ValueError(
                f"loop inside a fused kernel ({'/'.join(here.scope)}): its iterations would be "
                "priced as kernels of their own; move it out, or write it without a loop"
            )
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        body = _Walker(self.mesh)
        env = {v: body.external(v.aval, ("const", 0)) for v in jaxpr.constvars}
        for i, variable in enumerate(jaxpr.invars):
            is_carry = consts <= i < consts + carried
            source = ("carry", i - consts) if is_carry else ("const", 0)
            env[variable] = body.external(variable.aval, source)
        # A trip count was declared for this loop, not for loops inside it.
        scope = tuple(part for part in here.scope if not part.startswith("trips="))
        outputs = body.walk(jaxpr, env, _Place(scope=scope, stream=here.stream))
        loop = Loop(body=body.program(outputs, carried), length=length, carried=carried)
        outs = [Operand.of(v.aval) for v in equation.outvars]
        node = self._append("loop", "scan", inputs, outs, Work(launches=0.0), here)
        node.loop = loop
        node.carry_inputs = inputs[consts : consts + carried]
        node.reads = {i: Size() for i in range(len(inputs))}
        node.writes = {i: Size() for i in range(len(outs))}
        return node.outputs

    def _cond(self, equation, inputs, here: _Place) -> list[Value]:
        """The branch with the most FLOPs and bytes (all symbols at 1024) is charged."""

        def weight(closed) -> float:
            totals = trace_jaxpr(getattr(closed, "jaxpr", closed), self.mesh).totals(None)
            return float(totals["flops"] + totals["read_bytes"] + totals["write_bytes"])

        branch = max(equation.params["branches"], key=weight)
        jaxpr = getattr(branch, "jaxpr", branch)
        env = {v: self.external(v.aval, ("const", 0)) for v in jaxpr.constvars}
        for variable, value in zip(jaxpr.invars, inputs[1:], strict=True):
            env[variable] = value or self.external(variable.aval, ("const", 0))
        results = self.walk(jaxpr, env, here)
        pairs = zip(results, equation.outvars, strict=True)
        return [self.external(v.aval, ("const", 0)) if r is None else r for r, v in pairs]


def scan_counts(equation) -> tuple[int, int]:
    """(constants, carries) of a scan, in the parameter layout of old and new JAX versions."""
    params = equation.params
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    # From JAX 0.11 on they are packed as (constants, carries, scanned arrays).
    groups = [len(group) for group in params["ft_in"].unpack()]
    return groups[0], groups[1]


def _view(value: Value | None, out: Operand, piece: tuple) -> Value:
    """The same bytes under another shape; a slice reads only its own part, named by `piece`."""
    if value is None:  # a broadcast literal: no memory behind it
        return Value(operand=out, nbytes=Size(), external=("const", 0))
    nbytes = out.nbytes if out.size != value.operand.size else value.nbytes
    small = value.nbytes.constant
    if small is not None and (out.nbytes.constant is None or out.nbytes.constant > small):
        nbytes = value.nbytes  # a broadcast reads its source
    seen = value.bytes_seen if nbytes == value.nbytes else (value.bytes_seen, piece)
    return dataclasses.replace(value, operand=out, nbytes=nbytes, base=value.root, part=seen)


def _classify(name: str, arguments: list[Operand], outs: list[Operand], params, mesh):
    if name in RULES:
        return "anchor", RULES[name](*arguments, out=tuple(outs), mesh=mesh, **params)
    if name in ELEMENTWISE:
        return "elementwise", elementwise_work(name, arguments, outs)
    if name in REDUCTIONS:
        return "reduce", reduction_work(arguments)
    if name in FREE:
        return "elementwise", Work()
    raise UnpricedPrimitive(
        f"primitive {name!r} has no cost rule; register one with "
        f'@cmjax.program.cost_rule("{name}") returning the Work of one call'
    )
