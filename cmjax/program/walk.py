"""Walk a jaxpr down into the nodes of a program, through every call, loop and branch."""

import dataclasses
import functools
import re
from collections.abc import Collection, Mapping, Sequence

import jax
from jax.extend.core import Literal

from cmjax.program import fuse
from cmjax.program.choice import Choices
from cmjax.program.mark import AHEAD, FUSED_PREFIX, parse_stream
from cmjax.program.operation import MAIN, Loop, Node, Program, Stream, Value
from cmjax.program.pipelining import issued_ahead
from cmjax.program.rules import (
    ELEMENTWISE,
    FREE,
    REDUCTIONS,
    RULES,
    UnpricedPrimitive,
    elementwise_work,
    reduction_work,
)
from cmjax.program.shapes import SymbolicSize
from cmjax.program.size import Size
from cmjax.program.tiers import Axes
from cmjax.program.work import COMPUTE, Operand, Work

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
    "custom_vmap_call": "call",
    "composite": "jaxpr",
    "custom_partitioning": "call",
    "eval_jaxpr": "call_jaxpr",
    "linear_call": "callee",
    "remat_opt": "fwd_jaxpr",
    "xla_metadata_call": "jaxpr",
    "cm_on_one_device": "apart",
}
"""Primitives that call a jaxpr, and the parameter that holds it."""

_INDEXED = {"gather", "dynamic_slice"}
_TRANSFORMED = re.compile(r"\w+\((.*)\)")  # transpose(jvp(name)): `name`, differentiated
_VIEWS = FREE - {"iota", "empty", "empty2", "axis_index", "dim_as_value", "platform_index"}


def walk(
    jaxpr, axes: Axes, at: Mapping[str, float] | None, unfused: Collection[str] = ()
) -> tuple[Program, Choices, set[str]]:
    """The program of a jaxpr, with the choices made for it and the names of all mesh axes met.

    Args:
      unfused: names of fused kernels that are not there, so that what is in them runs in kernels of
        its own.
    """
    choices, seen = Choices(at), set(axes)
    walker = _Walker(axes, choices, seen, unfused)
    outputs = walker.walk(jaxpr, walker.constants(jaxpr, jaxpr.invars), _Place())
    return walker.program(outputs, carried=0), choices, seen


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where an equation stands: named scopes, stream, fused kernel, `shard_map`, declared trips."""

    scope: tuple[str, ...] = ()
    stream: Stream = MAIN
    region: int | None = None
    ahead: bool = False
    shard_map: int | None = None

    def enter(self, name_stack: str) -> "_Place":
        scope, stream, ahead = self.scope, self.stream, self.ahead
        for part in name_stack.split("/") if name_stack else ():
            while wrapped := _TRANSFORMED.fullmatch(part):
                part = wrapped[1]
            found = parse_stream(part)
            if found is not None:
                stream = Stream(*found)
            elif part == AHEAD:
                ahead = True
            elif part.replace("_", "").replace("-", "").replace("=", "").isalnum():
                scope = (*scope, part)
        return dataclasses.replace(self, scope=scope, stream=stream, ahead=ahead)

    @property
    def trips(self) -> int | None:
        for part in reversed(self.scope):
            if part.startswith("trips="):
                return int(part.removeprefix("trips="))
        return None


class _Walker:
    """Builds the nodes of one program level (the top, or a loop body)."""

    def __init__(self, axes: Axes, choices: Choices, seen: set[str], unfused: Collection[str]):
        self.axes = axes
        self.choices = choices
        self.seen = seen  # names of all mesh axes met, shared by all levels
        self.unfused = unfused
        self.nodes: list[Node] = []
        self.calls = 0

    def constants(self, jaxpr, more=()) -> dict:
        """Constants of a jaxpr, and other variables, as arrays that are there at the start."""
        return {v: self.external(v.aval, ("const", 0)) for v in (*jaxpr.constvars, *more)}

    def external(self, aval, source: tuple[str, int]) -> Value:
        operand = Operand.of(aval)
        return Value(operand=operand, nbytes=operand.nbytes, external=source)

    def program(self, outputs: Sequence[Value | None], carried: int) -> Program:
        return fuse.assemble(self.nodes, outputs, carried, self.choices)

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
        if name == "custom_linear_solve":
            return self._linear_solve(equation, inputs, here)
        if name == "call_hi_primitive" and name not in RULES:
            return self._inline(equation, _expanded(equation), inputs, here)
        outs = [Operand.of(variable.aval) for variable in equation.outvars]
        if name in _VIEWS:
            piece = (name, *map(str, equation.params.values()))
            # A barrier passes several arrays on; a split views one of them several times.
            viewed = inputs if len(inputs) == len(outs) else inputs[:1] * len(outs)
            pairs = zip(viewed, outs, strict=True)
            return [_view(value, out, (*piece, k)) for k, (value, out) in enumerate(pairs)]
        arguments = [Operand.of(atom.aval) for atom in equation.invars]
        kind, work = _classify(name, arguments, outs, equation.params, self.axes)
        if here.region is not None and work.kind not in COMPUTE:
            raise ValueError(f"{name} inside a fused kernel ({'/'.join(here.scope)}): move it out")
        if kind == "elementwise" and _are_constants(inputs, outs):
            return [Value(operand=out, nbytes=Size(), external=("const", 0)) for out in outs]
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
            ahead=here.ahead,
            shard_map=here.shard_map,
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
            return self._shard_map(equation, jaxpr, inputs, here)
        kernel = str(equation.params.get("name", ""))
        if kernel.startswith(FUSED_PREFIX) and here.region is None:
            name = kernel.removeprefix(FUSED_PREFIX)
            here = dataclasses.replace(here, scope=(*here.scope, name))
            if name not in self.unfused:
                self.calls += 1
                here = dataclasses.replace(here, region=self.calls)
        return self._inline(equation, jaxpr, inputs, here)

    def _inline(self, equation, jaxpr, inputs, here: _Place) -> list[Value]:
        """Results of a jaxpr that the equation calls once."""
        env = self.constants(jaxpr)
        for variable, value in zip(jaxpr.invars, inputs, strict=True):
            env[variable] = value or self.external(variable.aval, ("const", 0))
        results = self.walk(jaxpr, env, here)
        pairs = zip(results, equation.outvars, strict=True)
        return [self.external(v.aval, ("const", 0)) if r is None else r for r, v in pairs]

    def _shard_map(self, equation, jaxpr, inputs, here: _Place) -> list[Value]:
        """A program of one rank, on what this rank holds of the arguments."""
        outer, sizes = self.axes, dict(equation.params["mesh"].shape)
        self.axes = outer.within(sizes)
        self.seen |= set(sizes)
        specs = [str(spec) for spec in equation.params["in_specs"]]
        shards = [
            value and _shard(value, Operand.of(variable.aval), spec, self.choices)
            for value, variable, spec in zip(inputs, jaxpr.invars, specs, strict=True)
        ]
        self.calls += 1
        here = dataclasses.replace(here, shard_map=self.calls)
        results = self._inline(equation, jaxpr, shards, here)
        self.axes = outer
        pairs = zip(results, equation.outvars, strict=True)
        return [_gathered(value, Operand.of(variable.aval)) for value, variable in pairs]

    def _linear_solve(self, equation, inputs, here: _Place) -> list[Value]:
        """A solve whose derivative is another solve: the solver that is run."""
        counts, jaxprs = equation.params["const_lengths"], equation.params["jaxprs"]
        first = counts.matvec + counts.vecmat
        known = first + counts.solve + counts.transpose_solve
        arguments = [*inputs[first : first + counts.solve], *inputs[known:]]
        return self._inline(equation, jaxprs.solve.jaxpr, arguments, here)

    def _scan(self, equation, inputs, here: _Place) -> list[Value]:
        jaxpr = equation.params["jaxpr"]
        consts, carried = scan_counts(equation)
        length = Size.of(equation.params["length"])
        if length.constant is None:
            names = sorted(length.symbols())
            raise SymbolicSize(
                f"scan or map in scope {'/'.join(here.scope) or 'top'} over {length} elements: the "
                f"length of a loop must be a number; trace with one for {', '.join(names)}",
                frozenset(names),
            )
        return self._loop(equation, inputs, here, jaxpr, consts, carried, int(length.constant))

    def _while(self, equation, inputs, here: _Place) -> list[Value]:
        if here.trips is None:
            raise SymbolicSize(
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
        body = _Walker(self.axes, self.choices, self.seen, self.unfused)
        env = body.constants(jaxpr)
        for i, variable in enumerate(jaxpr.invars):
            is_carry = consts <= i < consts + carried
            source = ("carry", i - consts) if is_carry else ("const", 0)
            env[variable] = body.external(variable.aval, source)
        # A trip count was declared for this loop, not for loops inside it.
        scope = tuple(part for part in here.scope if not part.startswith("trips="))
        outputs = body.walk(jaxpr, env, _Place(scope=scope, stream=here.stream))
        program, more = issued_ahead(body.program(outputs, carried), carried)
        loop = Loop(body=program, length=length, carried=carried + len(more))
        outs = [Operand.of(v.aval) for v in equation.outvars]
        node = self._append("loop", "scan", inputs, outs, Work(launches=0.0), here)
        node.loop = loop
        node.carry_inputs = inputs[consts : consts + carried]
        node.carry_inputs += [None if k < 0 else node.carry_inputs[k] for k in more]
        if more:  # what is scanned out comes after what is carried
            for k in range(carried, len(outs)):
                producer = node.index, k + len(more)
                node.outputs[k] = dataclasses.replace(node.outputs[k], producer=producer)
        node.reads = {i: Size() for i in range(len(inputs))}
        node.writes = {i: Size() for i in range(len(outs))}
        return node.outputs

    def _cond(self, equation, inputs, here: _Place) -> list[Value]:
        """The branch with the most FLOPs and bytes is charged; of `lax.platform_dependent` the
        default one, for the chip is no platform of JAX's."""
        branches = [getattr(b, "jaxpr", b) for b in equation.params["branches"]]
        platforms = equation.params.get("branches_platforms")
        if platforms and None in platforms:
            return self._inline(equation, branches[platforms.index(None)], inputs[1:], here)
        costliest = self.choices.largest([self._weight(jaxpr) for jaxpr in branches])
        return self._inline(equation, branches[costliest], inputs[1:], here)

    def _weight(self, jaxpr) -> Size:
        walker = _Walker(self.axes, self.choices, self.seen, self.unfused)
        outputs = walker.walk(jaxpr, walker.constants(jaxpr, jaxpr.invars), _Place())
        return walker.program(outputs, carried=0).total("flops", "read_bytes", "write_bytes")


def _expanded(equation):
    """What JAX makes of an operation that is of a higher level than what XLA compiles."""
    low = functools.partial(equation.primitive.to_lojax, **equation.params)
    shapes = [jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in equation.invars]
    return jax.make_jaxpr(low)(*shapes).jaxpr


def _are_constants(inputs: list[Value | None], outs: list[Operand]) -> bool:
    """Numbers that follow from numbers in the code: any compiler computes them beforehand."""
    written = all(v is None or not (v.producer or v.nbytes.terms) for v in inputs)
    return written and bool(outs) and all(not out.shape for out in outs)


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


def _shard(value: Value, local: Operand, spec: str, choices: Choices) -> Value:
    """What a rank holds of an array that enters a `shard_map`."""
    if local.size == value.operand.size:
        return dataclasses.replace(value, operand=local, base=value.root, part=value.bytes_seen)
    # A broadcast array has fewer bytes behind it than its shape says, on every rank.
    fits = choices.at_most(value.nbytes, local.nbytes)
    return dataclasses.replace(
        value,
        operand=local,
        nbytes=value.nbytes if fits else local.nbytes,
        base=value.root,
        part=(value.bytes_seen, ("shard_map", spec)),
        shard=value.held * (local.size / value.operand.size),
    )


def _gathered(value: Value, whole: Operand) -> Value:
    """The array that the shards of all ranks make up, as it is seen outside their `shard_map`."""
    if whole.size == value.operand.size:
        return dataclasses.replace(value, operand=whole, base=value.root, part=value.bytes_seen)
    return dataclasses.replace(
        value,
        operand=whole,
        nbytes=whole.nbytes,
        base=value.root,
        part=(value.bytes_seen, "shards of all ranks"),
        shard=whole.nbytes,
    )


def _classify(name: str, arguments: list[Operand], outs: list[Operand], params, mesh):
    if name in RULES:
        given = {**params, "out": tuple(outs), "mesh": mesh}
        return "anchor", RULES[name](*arguments, **given)
    if name in ELEMENTWISE:
        return "elementwise", elementwise_work(name, arguments, outs)
    if name in REDUCTIONS:
        return "reduce", reduction_work(name, arguments)
    if name in FREE:
        return "elementwise", Work()
    raise UnpricedPrimitive(
        f"primitive {name!r} has no cost rule; register one with "
        f'@cmjax.program.cost_rule("{name}") returning the Work of one call'
    )
